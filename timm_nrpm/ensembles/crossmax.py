"""CrossMax: one model at several resolutions and depths, whose predictions are joined robustly
(Fort and Lakshminarayanan, arXiv 2408.05446)."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_nrpm.checks import check_integer
from timm_nrpm.ensembles.members import members_of
from timm_nrpm.nn.ensemble import Ensemble, Member, resized

MODEL, MEAN = "model", "mean"

_RECORDING = threading.RLock()


def crossmax(logits: Tensor, rank: int | None = None) -> Tensor:
    """Logits `[B, N]` from those of several predictors `[B, P, N]` (arXiv 2408.05446, algorithm 1).

    Each predictor's largest logit is subtracted from its own, so that none is louder than another; then each class's
    largest over the predictors, so that none is favoured; and the value of a class is the middle one of its predictors,
    which a single predictor cannot move at will.

    Args:
        logits: Logits of P predictors.
        rank: Place of the value that is taken, counted from the largest, which is 1; the default is the middle, and for
            an even number of predictors the lower one of the two.

    Example:
        >>> crossmax(torch.tensor([[[3.0, 1.0], [2.0, 2.5], [0.0, 9.0]]])).argmax(1)
        tensor([1])
    """
    count = logits.shape[1]
    apart = logits - logits.amax(2, keepdim=True)
    apart = apart - apart.amax(1, keepdim=True)
    return apart.sort(1, descending=True).values[:, (count // 2 + 1 if rank is None else rank) - 1]


class CrossMax(Ensemble):
    """One model's predictions at several resolutions, and at several depths by linear probes, joined by CrossMax.

    Nothing is trained but the probes. The median hides the gradient of most predictors, so accuracy along the
    ensemble's own gradient says little: an evaluation follows the mean of the predictors and the model alone as well,
    and its flags say what that finds.

    Args:
        model: The model, a classifier of normalised images or a model on pixels.
        sizes: Heights and widths to which images are reduced, and enlarged again, one predictor each; a size of at
            least that of an image leaves it as it is.
        probes: Linear probes by the name of the layer whose output they see, from
            :func:`timm_nrpm.ensembles.probes.fit_probes`.
        rank: Place of the predictor whose value counts, see :func:`crossmax`.

    Raises:
        ValueError: There are fewer than two predictors, or `rank` is beyond their number.

    Example:
        >>> CrossMax(model, sizes=(8, 6, 4))(pixels).shape
        torch.Size([32, 10])
    """

    kind = "crossmax"
    reference = MODEL

    def __init__(
        self,
        model: nn.Module,
        *,
        sizes: Sequence[int] = (),
        probes: Mapping[str, nn.Linear] | None = None,
        rank: int | None = None,
    ) -> None:
        super().__init__(members_of({MODEL: model}))
        self._configure(sizes, {} if probes is None else probes, rank)

    def _configure(self, sizes: Sequence[int], probes: Mapping[str, nn.Linear], rank: int | None) -> None:
        self.sizes = tuple(check_integer("sizes", size, least=1) for size in sizes)
        self.layers = tuple(probes)
        model = self.member(MODEL).net.model
        for layer in self.layers:
            model.get_submodule(layer)  # raises an AttributeError that names the layer
        self.heads = nn.ModuleList(probes.values())
        predictors = max(len(self.sizes), 1) * (1 + len(self.layers))
        if predictors < 2:
            raise ValueError(
                f"sizes={self.sizes} without probes is one predictor: give two sizes at least, such as (32, 24, 16)."
            )
        self.rank = None if rank is None else check_integer("rank", rank, least=1, most=predictors)
        self.register_buffer("numbers", torch.tensor([*self.sizes, -1, self.rank or 0], dtype=torch.float32))

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits `[B, N]` of pixels `[B, C, H, W]` in [0, 1]."""
        return crossmax(self.predictors(pixels), self.rank)

    def predictors(self, pixels: Tensor) -> Tensor:
        """Logits of all predictors `[B, P, N]`: at each size the probes from the first layer on, and then the model."""
        shape = (int(pixels.shape[-2]), int(pixels.shape[-1]))
        found = []
        for size in self.sizes or (max(shape),):
            view = pixels if size >= min(shape) else resized(resized(pixels, (size, size)), shape)
            with recorded(self.member(MODEL).net.model, self.layers) as outputs:
                logits = self.member(MODEL)(view)
            pooled = (pool(outputs[layer], self.member(MODEL).net.model) for layer in self.layers)
            found += [*(head(each).to(logits.dtype) for head, each in zip(self.heads, pooled, strict=True)), logits]
        return torch.stack(found, 1)

    def followed(self) -> dict[str, nn.Module]:
        return {**super().followed(), MEAN: _Mean(self)}

    def settings(self) -> dict[str, Any]:
        return {"sizes": list(self.sizes), "layers": list(self.layers), "rank": self.rank}

    def tensors(self) -> dict[str, Tensor]:
        return {f"heads.{name}": tensor for name, tensor in self.heads.state_dict().items()}

    @classmethod
    def build(
        cls, members: Mapping[str, Member], settings: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> CrossMax:
        if set(members) != {MODEL} or set(settings) != {"sizes", "layers", "rank"}:
            raise ValueError(f"A CrossMax has the member {MODEL}, not {list(members)}, and sizes, layers and rank.")
        probes = {}
        for place, layer in enumerate(settings["layers"]):
            weight = tensors[f"heads.{place}.weight"]
            probes[str(layer)] = nn.Linear(weight.shape[1], weight.shape[0])
        ensemble = cls.__new__(cls)
        Ensemble.__init__(ensemble, members)
        ensemble._configure(settings["sizes"], probes, settings["rank"])
        ensemble.heads.load_state_dict({name.removeprefix("heads."): tensor for name, tensor in tensors.items()})
        return ensemble

    def __str__(self) -> str:
        probes = f" and {len(self.layers)} depths" if self.layers else ""
        return f"CrossMax of {max(len(self.sizes), 1)} resolutions{probes}"


class _Mean(nn.Module):
    """The mean of the predictors' log-probabilities, whose gradient no median hides."""

    def __init__(self, ensemble: CrossMax) -> None:
        super().__init__()
        self.ensemble = ensemble

    def forward(self, pixels: Tensor) -> Tensor:
        return F.log_softmax(self.ensemble.predictors(pixels), 2).mean(1)


def pool(output: Tensor, model: nn.Module) -> Tensor:
    """Features `[B, D]` of a layer's output: the mean over places of `[B, D, H, W]`, or of `[B, H, W, D]` in a model
    that says so, or over tokens of `[B, T, D]`.

    Raises:
        ValueError: The output is no tensor.
    """
    if not isinstance(output, Tensor):
        raise ValueError(f"The layer gives a {type(output).__name__}, and a probe sees a tensor: choose another layer.")
    if output.ndim == 4:
        return output.mean((1, 2) if getattr(model, "output_fmt", "") == "NHWC" else (2, 3))
    return output.mean(1) if output.ndim == 3 else output.flatten(1)


@contextmanager
def recorded(model: nn.Module, layers: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Record the outputs of some layers of a model, by name, in the forward passes of this context.

    One context at a time: the hooks of a model are the same in all threads, and in the replicas of DataParallel.
    """
    outputs: dict[str, Tensor] = {}
    if not layers:
        yield outputs
        return

    def keep(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            outputs[name] = output

        return hook

    with _RECORDING:
        handles = [model.get_submodule(layer).register_forward_hook(keep(layer)) for layer in layers]
        try:
            yield outputs
        finally:
            for handle in handles:
                handle.remove()
