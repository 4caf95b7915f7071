"""Effect of an attack inside a model: how far its embeddings move, layer by layer, to and from JSON."""

from __future__ import annotations

import difflib
import fnmatch
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from timm_nrpm.data.images import check_pair
from timm_nrpm.evaluation.history import finite
from timm_nrpm.models.modes import evaluating
from timm_nrpm.models.reprogramming import reprogrammed_layers
from timm_nrpm.nn.pixel_model import PixelModel
from timm_nrpm.nn.wrappers import subject_of

NORMS = ("L1", "L2", "L2^2", "Linf")

AT_ONCE = 16
"""Number of images whose embeddings are held at the same time: those of all layers of a large model take gigabytes."""


@dataclass(frozen=True)
class Difference:
    """How far an attack moves one embedding.

    Attributes:
        layer: Name of the module, or `"pixels"` for the images themselves, in [0, 1].
        side: `"input"` or `"output"`; empty for the pixels.
        absolute: Norms of the difference for each image, by `"L1"`, `"L2"` and `"Linf"`; infinite where a norm was not
            finite. All entries of an embedding count, in every call of the layer.
        clean: Norms of the clean embedding for each image, likewise.
    """

    layer: str
    side: str
    absolute: dict[str, tuple[float, ...]] = field(repr=False)
    clean: dict[str, tuple[float, ...]] = field(repr=False)

    @property
    def name(self) -> str:
        """Name of the embedding, such as `"conv1 output"`."""
        return f"{self.layer} {self.side}".strip()

    def values(self, norm: str = "L2", relative: bool = False) -> tuple[float, ...]:
        """Return the difference of each image in `norm`: "L1", "L2", "L2^2" (its square) or "Linf". If `relative`, it
        is divided by the norm of the clean embedding, and 0 where both are 0."""
        if norm not in NORMS:
            raise ValueError(f"norm={norm!r} is not known: choose one of {', '.join(NORMS)}.")
        power = 2 if norm == "L2^2" else 1
        key = norm.removesuffix("^2")
        values = self.absolute[key]
        if relative:
            values = tuple(map(_share, values, self.clean[key]))
        return tuple(value**power for value in values)

    def mean(self, norm: str = "L2", relative: bool = False) -> float:
        """Return the mean of :meth:`values` over the images."""
        return fmean(self.values(norm, relative))


def _share(part: float, whole: float) -> float:
    if part == 0:
        return 0.0
    return part / whole if whole > 0 and math.isfinite(part) else math.inf


@dataclass(frozen=True)
class EmbeddingDifferences:
    """How far an attack moves the embeddings of a model, image by image.

    Attributes:
        rows: Differences of the pixels, and then of the inputs and outputs of layers in the order the model calls them.

    Example:
        >>> differences = embedding_differences(model, pixels, attacked)
        >>> differences.of("conv1 output").mean("L2", relative=True)
        0.23
    """

    rows: tuple[Difference, ...]

    @property
    def samples(self) -> int:
        return len(self.rows[0].absolute["L2"])

    def of(self, name: str) -> Difference:
        """Return the row of a name, such as "pixels", "conv1 input" or "conv1 output"."""
        names = {row.name: row for row in self.rows}
        if name not in names:
            near = difflib.get_close_matches(name, names, n=3, cutoff=0.3) or list(names)[:3]
            raise ValueError(f"{name!r} is not among the {len(names)} embeddings. Near names: {', '.join(near)}.")
        return names[name]

    def __str__(self) -> str:
        width = max(len("embedding"), *(len(row.name) for row in self.rows))
        shares = [norm for norm in NORMS if norm != "L2^2"]
        titles = [*NORMS, *(f"{norm}, %" for norm in shares)]
        lines = [
            f"{self.samples} images; means of the difference, and of its share of the clean embedding in %",
            f"{'embedding':<{width}}" + "".join(f"{title:>10}" for title in titles),
        ]
        for row in self.rows:
            numbers = [f"{row.mean(norm):10.4g}" for norm in NORMS]
            numbers += [f"{100 * row.mean(norm, relative=True):10.1f}" for norm in shares]
            lines.append(f"{row.name:<{width}}" + "".join(numbers))
        return "\n".join(lines)

    def to_json(self) -> str:
        data = asdict(self)
        for row in data["rows"]:
            for kind in ("absolute", "clean"):
                row[kind] = {norm: [finite(value) for value in values] for norm, values in row[kind].items()}
        return json.dumps(data)

    @classmethod
    def from_json(cls, text: str) -> EmbeddingDifferences:
        def norms(data: dict[str, list[float | None]]) -> dict[str, tuple[float, ...]]:
            return {norm: tuple(math.inf if v is None else v for v in values) for norm, values in data.items()}

        rows = json.loads(text)["rows"]
        return cls(tuple(Difference(r["layer"], r["side"], norms(r["absolute"]), norms(r["clean"])) for r in rows))


def embedding_differences(
    model: nn.Module,
    pixels: Tensor,
    attacked: Tensor,
    layers: str | Sequence[str] | None = None,
    *,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
) -> EmbeddingDifferences:
    """Measure how far an attack moves the embeddings of every layer (NRPM, arXiv 2410.04577, Table 3).

    The paper's numbers are absolute: its Linf of the images is their eps. Its column L2 must hold squares, here
    `"L2^2"`, since its 27.54 for the images is above 0.3 * sqrt(784) = 8.4, the largest possible L2 norm. Absolute
    numbers only compare models whose layers have the same scale, which lambda and calibration change. Relative numbers
    compare other models too. Neither shows that a model is robust: an attack that is misled moves little.

    Args:
        model: Classifier of normalised images. The first dimension of an embedding must be that of the images, unless a
            single image is given.
        pixels, attacked: The same images `[B, C, H, W]` in [0, 1], clean and attacked.
        layers: Globs of names of convolutional and linear layers, or the name of any module. The default is all
            reprogrammed layers, or all `Conv2d` and `Linear` of a model without any. Layers that the model never calls
            are left out.
        mean, std: The model's normalisation, one number for each channel; by default timm's for this model, and none
            for a model that is not timm's.

    Raises:
        ValueError: The images differ in shape or are outside [0, 1], a glob matches nothing, or the model never calls a
            layer that is named.

    Example:
        >>> print(embedding_differences(model, pixels, attacked, "conv1"))
        32 images; means of the difference, and of its share of the clean embedding in %
        embedding           L1        L2      L2^2      Linf     L1, %     L2, %   Linf, %
        pixels           5.869     0.762     0.581       0.1      30.8      20.4      10.0
        conv1 input      11.74     1.524     2.324       0.2      24.1      23.0      20.0
        conv1 output      52.7     2.821     7.965     0.366      23.9      23.1      22.5
    """
    pixels, attacked = check_pair(pixels, attacked)
    net = subject_of(model, mean, std).on_pixels()
    columns: dict[tuple[str, str], list[tuple[Tensor, Tensor]]] = {}
    for images in zip(pixels.split(AT_ONCE), attacked.split(AT_ONCE), strict=True):
        # The clean and the attacked images are separate batches, so that equal images differ by exactly 0.
        clean, moved = ({("pixels", ""): [x], **embeddings(net, x, layers)[0]} for x in images)
        if {key: len(calls) for key, calls in clean.items()} != {key: len(calls) for key, calls in moved.items()}:
            raise ValueError(
                "The model calls other layers for the attacked images than for the clean ones: choose layers= that it "
                "calls for both."
            )
        for key, calls in clean.items():
            a, b = (_rows(values, len(images[0]), key[0]) for values in (calls, moved[key]))
            columns.setdefault(key, []).append((b - a, a))
    rows = []
    for (layer, side), parts in columns.items():
        absolute, before = (_norms([part[i] for part in parts]) for i in (0, 1))
        rows.append(Difference(layer, side, absolute, before))
    return EmbeddingDifferences(tuple(rows))


def _rows(calls: list[Tensor], images: int, layer: str) -> Tensor:
    """Return the embeddings of all calls of a layer, side by side, `[B, n]` in float64."""
    for values in calls:
        if values.ndim == 0 or len(values) % images:
            raise ValueError(
                f"{layer} has an embedding {list(values.shape)} for {images} images, which cannot be split among them: "
                "give one image at a time, or other layers=."
            )
    return torch.cat([values.cpu().double().reshape(images, -1) for values in calls], 1)


def _norms(parts: list[Tensor]) -> dict[str, tuple[float, ...]]:
    orders = {"L1": 1.0, "L2": 2.0, "Linf": math.inf}
    values = {norm: torch.cat([torch.linalg.vector_norm(p, order, 1) for p in parts]) for norm, order in orders.items()}
    return {norm: tuple(v.nan_to_num(math.inf, math.inf).tolist()) for norm, v in values.items()}


@torch.no_grad()
def embeddings(
    net: PixelModel, pixels: Tensor, layers: str | Sequence[str] | None = None
) -> tuple[dict[tuple[str, str], list[Tensor]], Tensor]:
    """Return the inputs and outputs of layers, one tensor for each call, by the name of the layer and `"input"` or
    `"output"`; and the logits `[B, N]`.

    Raises:
        ValueError: `layers` matches nothing, or names a layer that the model never calls.
    """
    chosen = choose_layers(net.model, layers)
    seen: dict[tuple[str, str], list[Tensor]] = {}

    def recorder(key: tuple[str, str]) -> Callable[..., None]:
        def record(_: nn.Module, *values: Any) -> None:
            # A hook gets (inputs, keyword arguments) before a forward, and (inputs, output) after it.
            passed = (*values[0], *values[1].values()) if key[1] == "input" else values[-1]
            passed = passed if isinstance(passed, (tuple, list)) else (passed,)
            tensor = next((value for value in passed if isinstance(value, Tensor)), None)
            if tensor is None:
                raise ValueError(f"{key[0]} has no tensor as its {key[1]}: leave it out of layers=.")
            seen.setdefault(key, []).append(tensor.detach().clone())  # an activation may overwrite it

        return record

    hooks: list[Any] = []
    try:
        for name, module in chosen.items():
            hooks.append(module.register_forward_pre_hook(recorder((name, "input")), with_kwargs=True))
            hooks.append(module.register_forward_hook(recorder((name, "output"))))
        with evaluating(net):
            logits = net(pixels.to(net.mean.device))
    finally:
        for hook in hooks:
            hook.remove()
    patterns = [layers] if isinstance(layers, str) else list(layers or ())
    unused = [name for name in patterns if name in chosen and (name, "input") not in seen]
    if unused or not seen:
        raise ValueError(f"The model never calls {', '.join(unused or chosen)}: choose other layers=.")
    return seen, logits


def choose_layers(model: nn.Module, layers: str | Sequence[str] | None) -> dict[str, nn.Module]:
    """Return the modules that `layers` selects, by name; see :func:`embedding_differences`."""
    modules = dict(model.named_modules())
    known = {name: m for name, m in modules.items() if isinstance(m, (nn.Conv2d, nn.Linear))}
    if layers is None:
        chosen: Mapping[str, nn.Module] = reprogrammed_layers(model) or known
        if not chosen:
            raise ValueError("The model has no Conv2d and no Linear: name its modules in layers=.")
        return dict(chosen)
    patterns = [layers] if isinstance(layers, str) else list(layers)
    if not patterns or not all(isinstance(pattern, str) for pattern in patterns):
        raise ValueError(f'layers={layers!r} is not understood: give a glob like "layer1.*", or several in a list.')
    names: set[str] = set()
    for pattern in patterns:
        matches = [pattern] if pattern in modules else fnmatch.filter(known, pattern)
        if not matches:
            near = difflib.get_close_matches(pattern, modules, n=3, cutoff=0.3) or list(known)[:3]
            raise ValueError(
                f"layers={pattern!r} matches none of the {len(known)} convolutional and linear layers, and no module "
                f"has that name. Near names: {', '.join(near)}."
            )
        names.update(matches)
    return {name: module for name, module in modules.items() if name in names}
