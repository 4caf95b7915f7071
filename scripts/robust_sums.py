"""Other robust sums than the package's, as layers that hold every product: to find out whether one of them gains."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_nrpm.nn.pixel_model import PixelModel

Estimate = Callable[[Tensor], Tensor]
"""Function from products `[..., D]` to an estimate of their sum, `[...]`."""

ROWS = 16
"""Number of images whose products are held at once."""


def trimmed(share: float) -> Estimate:
    """D times the mean of the products but for the smallest and the largest, this share of them each, at least one."""

    def estimate(products: Tensor) -> Tensor:
        count = products.shape[-1]
        cut = max(1, int(share * count))
        return products.sort(-1).values[..., cut : count - cut].mean(-1) * count

    return estimate


def winsorized(share: float) -> Estimate:
    """The sum of the products, of which this share at either end is moved to the nearest that is left."""

    def estimate(products: Tensor) -> Tensor:
        count = products.shape[-1]
        cut = max(1, int(share * count))
        kept = products.sort(-1).values[..., cut : count - cut]
        return kept.sum(-1) + cut * (kept[..., 0] + kept[..., -1])

    return estimate


def median_of_means(groups: int) -> Estimate:
    """D times the median of the means of so many groups of products, drawn once."""

    def estimate(products: Tensor) -> Tensor:
        count = products.shape[-1]
        order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
        means = torch.stack([products[..., part].mean(-1) for part in order.tensor_split(groups)], -1)
        return means.median(-1).values * count

    return estimate


def reweighted(steps: int, eps: float, start: str = "mean") -> Estimate:
    """D times the L1 estimate after some steps of reweighted least squares from the mean or from the median; `eps` is
    relative to the median distance from there, so that it suits every layer."""

    def estimate(products: Tensor) -> Tensor:
        centre = products.mean(-1, keepdim=True) if start == "mean" else products.median(-1, keepdim=True).values
        scale = eps * (products - centre).abs().median(-1, keepdim=True).values.detach() + 1e-8
        for _ in range(steps):
            weights = 1 / ((products - centre).abs() + scale)
            centre = (weights * products).sum(-1, keepdim=True) / weights.sum(-1, keepdim=True)
        return centre.squeeze(-1) * products.shape[-1]

    return estimate


class HeldSum(nn.Module):
    """A linear map mixed with another estimate of its sums, whose products are held in memory, corrected so that every
    output keeps its mean and spread.

    Args:
        layer: A Linear, or a Conv2d with one group.
        lam: Share of the linear map.
        estimate: The estimate of a sum.
        centred: Whether products of the inputs' distances from their means are estimated, and the rest is summed.

    Attributes:
        fitting: Whether a forward fits the correction to its inputs.
        linear_backward: Whether gradients go through the linear map alone (BPDA, arXiv 1802.00420).
    """

    def __init__(self, layer: nn.Conv2d | nn.Linear, lam: float, estimate: Estimate, centred: bool = False) -> None:
        super().__init__()
        self.layer, self.lam, self.estimate, self.centred = layer, lam, estimate, centred
        self.fitting = self.linear_backward = False
        self.register_buffer("scale", torch.ones(len(layer.weight)))
        self.register_buffer("shift", torch.zeros(len(layer.weight)))
        self.register_buffer("centre", torch.zeros(layer.weight[0].numel()))

    def forward(self, x: Tensor) -> Tensor:
        linear = self.layer(x)
        robust = self.robust(x)
        flat = linear.flatten(2) if linear.ndim == 4 else linear.unsqueeze(2)
        if self.layer.bias is not None:
            robust = robust + self.layer.bias.view(1, -1, 1)
        if self.fitting:
            want, have = (_moments(each) for each in (flat, robust))
            self.scale = want[1] / have[1].clamp(min=1e-6)
            self.shift = want[0] - self.scale * have[0]
        robust = robust * self.scale.view(1, -1, 1) + self.shift.view(1, -1, 1)
        mixed = (self.lam * flat + (1 - self.lam) * robust).view_as(linear)
        return linear + (mixed - linear).detach() if self.linear_backward else mixed

    def robust(self, x: Tensor) -> Tensor:
        """Estimates of all sums without a bias, `[B, O, L]`."""
        inputs = self._inputs(x)  # [B, L, D]
        if self.fitting and self.centred:
            self.centre = inputs.flatten(0, 1).mean(0)
        weight = self.layer.weight.flatten(1)  # [O, D]
        return torch.cat([self._estimated(part, weight) for part in inputs.split(ROWS)]).movedim(2, 1)

    def _inputs(self, x: Tensor) -> Tensor:
        if isinstance(self.layer, nn.Linear):
            return x.unsqueeze(1)
        conv = self.layer
        assert not isinstance(conv.padding, str)
        return F.unfold(x, conv.kernel_size, conv.dilation, conv.padding, conv.stride).movedim(2, 1)

    def _estimated(self, inputs: Tensor, weight: Tensor) -> Tensor:
        products = (inputs - self.centre).unsqueeze(2) * weight  # [b, L, O, D]
        return self.estimate(products) + weight @ self.centre


def _moments(outputs: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of every output, from `[B, O, L]`."""
    rows = outputs.detach().movedim(1, 0).flatten(1)
    return rows.mean(1), rows.std(1)


def with_sums_(
    model: nn.Module, images: Tensor, names: Sequence[str], make: Callable[..., HeldSum], lam: float
) -> nn.Module:
    """Replace layers of a plain model, and fit their corrections to images, one layer after the other.

    Args:
        model: The plain model, in evaluation mode; it is changed.
        images: Pixels `[B, C, H, W]` in [0, 1] without labels.
        names: Names of the layers, in forward order.
        make: Function from a layer and lambda, `lam=`, to its replacement.
        lam: Share of the linear map.
    """
    for name in names:
        parent, _, last = name.rpartition(".")
        layer = make(getattr(model.get_submodule(parent), last), lam=lam)
        setattr(model.get_submodule(parent), last, layer)
        layer.fitting = True
        with torch.no_grad():
            PixelModel(model).eval()(images)
        layer.fitting = False
    return model


def with_linear_backward(model: nn.Module) -> nn.Module:
    """A copy of a model whose gradients go through the linear maps behind its sums alone."""
    copy = deepcopy(model)
    for layer in copy.modules():
        if isinstance(layer, HeldSum):
            layer.linear_backward = True
    return copy
