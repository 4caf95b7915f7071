"""Confidence intervals of a share, of the difference between paired shares, and of a mean."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist, fmean, stdev

CONFIDENCE = 0.95
"""Confidence of the intervals in reports."""

Z = 1.96
"""Two-sided quantile of the standard normal distribution at this confidence."""


def quantile(confidence: float) -> float:
    """Two-sided quantile of the standard normal distribution, such as 1.96 for a confidence of 0.95."""
    return NormalDist().inv_cdf((1 + confidence) / 2)


def exact(right: int, count: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Exact interval of a share (Clopper and Pearson, Biometrika 26, 1934), from 0 to 1.

    Args:
        right: Number of images that count, from 0 to `count`.
        count: Number of all images.
        confidence: Probability that the interval holds the true share, at least.

    Example:
        >>> exact(18, 20)
        (0.683, 0.988)
    """
    from scipy.special import betaincinv

    tail = (1 - confidence) / 2
    low = float(betaincinv(right, count - right + 1, tail)) if right else 0.0
    return low, float(betaincinv(right + 1, count - right, 1 - tail)) if right < count else 1.0


def paired(more: int, fewer: int, count: int, z: float = Z) -> tuple[float, float]:
    """Interval of the difference between two shares of the same images, by Wald's method with half an image added to
    both kinds of images that only one share counts (Agresti and Min, Statistics in Medicine 24, 2005).

    Args:
        more, fewer: Number of images that only the first share counts, and that only the second does.
        count: Number of all images.
        z: Quantile of the standard normal distribution, see :func:`quantile`.

    Example:
        >>> paired(8, 2, 100)
        (-0.003, 0.121)
    """
    n, apart = count + 2, more + fewer + 1
    middle, half = (more - fewer) / n, z * math.sqrt(max(apart - (more - fewer) ** 2 / n, 0)) / n
    return middle - half, middle + half


def of_mean(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of a mean by the normal approximation; from minus to plus infinity for less than two values.

    Example:
        >>> of_mean([0.0, 0.5, 1.0, 0.5])
        (0.1, 0.9)
    """
    if len(values) < 2:
        return -math.inf, math.inf
    middle, half = fmean(values), Z * stdev(values) / math.sqrt(len(values))
    return middle - half, middle + half
