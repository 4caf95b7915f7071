"""Mean and variance of channels over several images, of which some may be unlike the others."""

from __future__ import annotations

import torch
from torch import Tensor

from timm_nrpm.nn.estimator import Penalty, robust_mean

STEPS = 10
"""Number of steps of the L1 estimate over images."""


def location(values: Tensor, robust: str) -> Tensor:
    """The location of the rows of `values`, `[N, C]`, in each column: `[C]`.

    "l1" is the package's reweighted estimate (:func:`timm_nrpm.nn.estimator.robust_mean`), from the median on, with
    distances in units of half the median deviation.
    """
    if robust == "mean":
        return values.mean(0)
    middle = values.quantile(0.5, 0)
    spread = (values - middle).abs().quantile(0.5, 0) / 2
    unit = torch.where(spread > 0, spread, 1)  # where more than half of the values are the median, that is it
    scaled = torch.where(spread > 0, (values - middle) / unit, 0)  # [N, C]
    return middle + unit * robust_mean(scaled.T, Penalty.named("l1", 1.0), STEPS, start=torch.zeros_like(middle))


def statistics(means: Tensor, squares: Tensor, robust: str) -> tuple[Tensor, Tensor]:
    """Mean and variance `[C]` of each channel over images, from those of each image; autograd can follow.

    Args:
        means, squares: Mean, and mean square, of each channel of each image over its positions, `[N, C]`.
        robust: "mean" or "l1", see :func:`location`.
    """
    mean = location(means, robust)
    return mean, location(squares - 2 * means * mean + mean.square(), robust)


def median_statistics(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Median `[C]` over all values of a batch `[B, C, L]`, and their mean squared distance to it (MedBN)."""
    middle = rows.transpose(0, 1).flatten(1).median(1).values
    return middle, (rows - middle.view(-1, 1)).square().mean((0, 2))
