"""Losses that attacks climb, their gradients, and the directions of their steps within any threat.

The model that an attack follows and the model that it is meant to fool may differ. Each image has random draws of its
own, so that its result depends neither on the batch nor on how many processes share the images.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from timm_nrpm.attacks.threats import Threat, wide

Forward = Callable[[Tensor], Tensor]
"""Function from pixels `[B, C, H, W]` to logits `[B, N]`."""

LOSSES = ("cross_entropy", "margin")


DENSE = 0.2
"""Share of the values, those with the largest gradient, that the first steps under L1 move (arXiv 2103.01208)."""


def losses(logits: Tensor, labels: Tensor, loss: str, target: Tensor | None = None) -> Tensor:
    """Return the loss that an attack climbs for each image, `[B]`.

    The margin is the logit of the strongest other class, or of `target`, minus that of the label (Carlini and Wagner,
    arXiv 1608.04644): unlike the cross-entropy of a confident model, it never has a gradient of zero.
    """
    if loss == "cross_entropy":
        return F.cross_entropy(logits, labels, reduction="none")
    own = logits.gather(1, labels.unsqueeze(1)).squeeze(1)
    if target is not None:
        return logits.gather(1, target.unsqueeze(1)).squeeze(1) - own
    return logits.scatter(1, labels.unsqueeze(1), -math.inf).amax(1) - own


def generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """Return one random generator for each image, on the CPU, seeded by the image's seed."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def slope(
    follow: Forward, x: Tensor, labels: Tensor, loss: str, target: Tensor | None, average: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the logits `[B, N]`, the losses `[B]` and the gradient of the losses `[B, C, H, W]` at images `x`.

    The logits are the mean over `average` forwards (expectation over transformation, arXiv 1707.07397, for a forward
    that is random). Entries of the gradient that are not finite are set to 0.
    """
    x = x.detach().requires_grad_()
    logits = torch.stack([follow(x) for _ in range(average)]).mean(0)
    values = losses(logits, labels, loss, target)
    (gradient,) = torch.autograd.grad(values.sum(), x)
    return logits.detach(), values.detach(), gradient.nan_to_num(0.0, 0.0, 0.0)


def direction(gradient: Tensor, threat: Threat, x: Tensor, share: Tensor) -> Tensor:
    """Return the steepest step `[B, C, H, W]` of length 1 in the threat's norm, from images `x`.

    Under L1 the step is spread over a share `[B]` of the values. Values that cannot move further in the direction of
    the gradient without leaving [0, 1] are left out (arXiv 2103.01208, section 3).
    """
    if threat.norm == "Linf":
        return gradient.sign()
    if threat.norm == "L2":
        return gradient / wide(gradient.flatten(1).norm(dim=1).clamp(min=1e-12), gradient)
    flat = gradient.where((gradient > 0) & (x < 1) | (gradient < 0) & (x > 0), 0.0).flatten(1)
    last = (share * flat.shape[1]).long().clamp(1, flat.shape[1]) - 1
    least = flat.abs().sort(1, descending=True).values.gather(1, last.unsqueeze(1))
    flat = flat.sign() * (flat.abs() >= least)
    return (flat / flat.abs().sum(1, keepdim=True).clamp(min=1e-12)).view_as(gradient)
