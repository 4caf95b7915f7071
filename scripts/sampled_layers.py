"""An estimate from a fixed subset of the input channels of every layer, which `scripts/sampled.py` measures."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_nrpm.models.reprogramming import reprogrammed_layers
from timm_nrpm.nn import layers
from timm_nrpm.nn.functional import nrpm_conv2d, nrpm_linear
from timm_nrpm.nn.pixel_model import PixelModel

RULES = ("first", "even", "random", "norm")
LEAST = 8
"""Number of input channels below which a layer keeps the full estimate."""


@dataclass(frozen=True)
class Sample:
    """A subset of the input channels of every layer.

    Attributes:
        rule: How channels are chosen: the first, evenly spaced, at random with a fixed seed, or those whose weights
            have the largest norm.
        size: Number of channels of a layer if 1 or more, or else their share.
        scaled: Whether the correction is scaled up from the subset to all products.
    """

    rule: str
    size: float
    scaled: bool = True
    known: dict[tuple[int, torch.Size], tuple[Tensor, Tensor | None]] = field(
        default_factory=dict, compare=False, repr=False
    )

    def __str__(self) -> str:
        size = f"{self.size:g}" if self.size >= 1 else f"1/{1 / self.size:g}"
        return f"{self.rule}, {size}{'' if self.scaled else ', unscaled'}"

    def channels(self, weight: Tensor) -> Tensor | None:
        """Indices of the chosen channels of a weight `[O, C, ...]`, computed once; None for all of them."""
        key = (weight.data_ptr(), weight.shape)
        if key not in self.known:
            self.known[key] = (weight, self._choose(weight.detach()))  # a weight that is held keeps its address
        return self.known[key][1]

    def _choose(self, weight: Tensor) -> Tensor | None:
        total = weight.shape[1]
        count = min(total, math.ceil(self.size * total) if self.size < 1 else int(self.size))
        if total < LEAST or count == total:
            return None
        if self.rule == "first":
            return torch.arange(count)
        if self.rule == "even":
            return torch.arange(count) * total // count
        if self.rule == "random":
            return torch.randperm(total, generator=torch.Generator().manual_seed(0))[:count].sort().values
        return weight.transpose(0, 1).flatten(1).norm(dim=1).topk(count).indices.sort().values


def sampled(
    sample: Sample,
    estimate: Callable[..., Tensor],
    linear: Callable[..., Tensor],
    dim: int,
    x: Tensor,
    weight: Tensor,
    *,
    lam: Tensor,
    iterations: int,
    eps: float,
    penalty: str,
    delta: float,
    gamma: float,
    **shape: Any,
) -> Tensor:
    """The mixed sum with the robust correction of a subset of channels, in the place of `estimate`.

    Args:
        sample: The subset.
        estimate, linear: `nrpm_conv2d` and `conv2d`, or `nrpm_linear` and `linear`.
        dim: Dimension of the channels in `x`, counted from the end.
        x, weight: Input and weight of the layer.
        lam, iterations, eps, penalty, delta, gamma: See :class:`timm_nrpm.NRPMConfig`.
        **shape: Stride, padding, dilation and groups of a convolution.
    """
    robust = partial(
        estimate, iterations=iterations, eps=eps, penalty=penalty, delta=delta, gamma=gamma, **shape
    )  # of a subset or of all
    channels = sample.channels(weight)
    if channels is None:
        return robust(x, weight, lam=lam)
    groups = shape.get("groups", 1)
    few = x.unflatten(dim, (groups, -1)).index_select(dim, channels).flatten(dim - 1, dim)
    part = weight.index_select(1, channels)
    gap = robust(few, part, lam=0.0) - linear(few, part, **shape)
    scale = weight.shape[1] / len(channels) if sample.scaled else 1.0
    return linear(x, weight, **shape) + (1 - lam) * scale * gap


def sampling(sample: Sample | None) -> AbstractContextManager[Any]:
    """Make every reprogrammed layer, those of surrogates included, compute the sampled estimate inside the context."""
    if sample is None:
        return nullcontext()
    convolution = partial(sampled, sample, nrpm_conv2d, F.conv2d, -3)
    return mock.patch.multiple(
        layers, nrpm_conv2d=convolution, nrpm_linear=partial(sampled, sample, nrpm_linear, F.linear, -1)
    )


@contextmanager
def uncorrected(layer: layers.Reprogrammed, lam: float | None = None) -> Iterator[None]:
    """Leave a layer's correction out, and set its lambda, inside the context."""
    correction, before = layer.correction, layer.lam.detach().clone()
    layer.correction = None
    layer.lam.data.copy_(before if lam is None else torch.tensor(lam))
    try:
        yield
    finally:
        layer.correction = correction
        layer.lam.data.copy_(before)


def layer_errors(model: nn.Module, pixels: Tensor, samples: Sequence[Sample]) -> dict[str, dict[str, float]]:
    """Means over the layers of relative errors of their outputs, each on the inputs that the full model gives it.

    `"layers"` is the error of the estimate, `"best"` what would be left if its correction had the best coefficient, and
    `"products"` the share of the products. `"plain"` is a layer without any correction.
    """
    errors: dict[str, list[tuple[float, float, float]]] = {name: [] for name in ("plain", *map(str, samples))}

    def compare(layer: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        def call(sample: Sample | None, lam: float | None = None) -> Tensor:
            with sampling(sample), uncorrected(layer, lam):
                result: Tensor = type(layer).forward(layer, *inputs)
                return result.flatten()

        exact, z = call(None), call(None, 1.0)
        norm, products = float(exact.norm()), output.numel() * layer.weight[0].numel()
        errors["plain"].append((float((z - exact).norm()) / norm, float((z - exact).norm()) / norm, 0.0))
        for sample in samples:
            value, channels = call(sample), sample.channels(layer.weight)
            cosine = float(F.cosine_similarity(value - z, exact - z, dim=0))
            best = float((z - exact).norm()) / norm * math.sqrt(max(0.0, 1 - cosine**2))
            used = 1.0 if channels is None else len(channels) / layer.weight.shape[1]
            errors[str(sample)].append((float((value - exact).norm()) / norm, best, used * products))
        totals.append(products)

    totals: list[int] = []
    hooks = [layer.register_forward_hook(compare) for layer in reprogrammed_layers(model).values()]
    with torch.no_grad():
        PixelModel(model).eval()(pixels)
    for hook in hooks:
        hook.remove()
    result = {}
    for name, rows in errors.items():
        output, best, used = zip(*rows, strict=True)
        means = {"layers": statistics.mean(output), "best": statistics.mean(best)}
        result[name] = {**means, "products": sum(used) / sum(totals)}
    return result
