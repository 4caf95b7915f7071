"""How far a network can be from a robust one in loss, given how far it is in weights (arXiv 2307.03803, section 2.2).

This is the paper's first bound. Its second one, a product of the norms of all layers, holds for chains of layers
without normalisation and without shortcuts alone, and is not computed here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from timm_nrpm.checks import check_integer
from timm_nrpm.models.modes import evaluating
from timm_nrpm.nn.pixel_model import PixelModel


@dataclass(frozen=True)
class WeightBound:
    """The difference of two networks in loss, and what their distance in weights bounds it by.

    Attributes:
        difference: Mean cross-entropy of the other network less that of the network, in nats.
        distance: Euclidean distance of their weights.
        slope: Size of the linear term of Taylor's series, which the paper takes to be zero where training converged.
        curvature: Size of the eigenvalue of the network's Hessian that is largest in size.
    """

    difference: float
    distance: float
    slope: float
    curvature: float

    @property
    def bound(self) -> float:
        """Largest size of the difference to second order: `slope + curvature * distance^2 / 2` (equations 12 and 13).
        Terms of higher order may exceed it where the distance is large."""
        return self.slope + self.curvature * self.distance**2 / 2

    @property
    def holds(self) -> bool:
        """Whether the difference is within the bound."""
        return abs(self.difference) <= self.bound


def weight_bound(
    net: PixelModel, other: PixelModel, images: Iterable[tuple[Tensor, Tensor]], *, iterations: int = 20, seed: int = 0
) -> WeightBound:
    """Compare two networks of one architecture, such as a robust one and one whose late part was tuned alone.

    Args:
        net: The network at whose weights the loss is expanded, on pixels.
        other: The other one; statistics of BatchNorm that differ count in the difference of the losses alone.
        images: Batches of pixels `[B, C, H, W]` in [0, 1], clean or attacked, and labels `[B]`.
        iterations: Number of power iterations for the eigenvalue.
        seed: Seed of their start.

    Raises:
        ValueError: The two have weights of other names or shapes, or there are no images.

    Example:
        >>> net = PixelModel(plain).eval()
        >>> found = weight_bound(net, net, [(pixels, labels)])
        >>> found.difference, found.distance, found.holds
        (0.0, 0.0, True)
    """
    iterations = check_integer("iterations", iterations, least=1)
    batches = [(pixels.to(net.mean.device), labels.to(net.mean.device)) for pixels, labels in images]
    ours, theirs = (dict(each.model.named_parameters()) for each in (net, other))
    if {name: each.shape for name, each in ours.items()} != {name: each.shape for name, each in theirs.items()}:
        raise ValueError("The two networks have weights of other names or shapes: give two of one architecture.")
    if not batches:
        raise ValueError("There are no images: give some to take the loss on.")
    moved = [name for name in ours if not torch.equal(ours[name], theirs[name].to(ours[name]))]
    weights = [ours[name] for name in moved]
    step = [(theirs[name].to(ours[name]) - ours[name]).detach() for name in moved]
    with evaluating(net), evaluating(other), torch.no_grad():
        difference = _loss(other, batches) - _loss(net, batches)
    if not moved:
        return WeightBound(float(difference), 0.0, 0.0, 0.0)
    flags = [each.requires_grad for each in weights]
    try:
        with evaluating(net), torch.enable_grad():
            for each in weights:
                each.requires_grad_(True)
            curvature = _curvature(net, batches, weights, iterations, seed)
            slope = _dot(torch.autograd.grad(_loss(net, batches), weights), step)
    finally:
        for each, flag in zip(weights, flags, strict=True):
            each.requires_grad_(flag)
    return WeightBound(float(difference), _dot(step, step) ** 0.5, abs(slope), curvature)


def _curvature(
    net: PixelModel, batches: Sequence[tuple[Tensor, Tensor]], weights: Sequence[Tensor], iterations: int, seed: int
) -> float:
    """The size of the Hessian's eigenvalue that is largest in size, by power iterations."""
    generator = torch.Generator().manual_seed(seed)
    direction = [torch.randn(each.shape, generator=generator).to(each) for each in weights]
    size = 0.0
    for _ in range(iterations):
        length = _dot(direction, direction) ** 0.5
        if not length:  # the Hessian is zero in all directions that were left
            return 0.0
        direction = _hessian_times(net, batches, weights, [each / length for each in direction])
        size = _dot(direction, direction) ** 0.5
    return size


def _loss(net: PixelModel, batches: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Mean cross-entropy on all images."""
    count = sum(len(labels) for _, labels in batches)
    return torch.stack([F.cross_entropy(net(x).float(), y, reduction="sum") for x, y in batches]).sum() / count


def _hessian_times(
    net: PixelModel, batches: Sequence[tuple[Tensor, Tensor]], weights: Sequence[Tensor], direction: Sequence[Tensor]
) -> list[Tensor]:
    """The Hessian of the mean cross-entropy times a direction, a batch at a time."""
    count = sum(len(labels) for _, labels in batches)
    total = [torch.zeros_like(each) for each in weights]
    for pixels, labels in batches:
        loss = F.cross_entropy(net(pixels).float(), labels, reduction="sum") / count
        slopes = torch.autograd.grad(loss, weights, create_graph=True)
        along = torch.stack([(s * d).sum() for s, d in zip(slopes, direction, strict=True)]).sum()
        for sum_, each in zip(total, torch.autograd.grad(along, weights), strict=True):
            sum_ += each
    return total


def _dot(first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
    return float(torch.stack([(a.double() * b.double()).sum() for a, b in zip(first, second, strict=True)]).sum())
