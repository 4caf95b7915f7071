"""Directions in which two variables go together, fitted on some samples for others: canonical ones, of two sets of
coordinates, and those of a linear discriminant, of coordinates and classes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

PROJECTED = 512
"""Number of coordinates beyond which there are random projections of them instead (p-stable hashing)."""

DIRECTIONS = 64
"""Largest number of pairs of canonical directions."""

SHUFFLES = 2
"""Number of shuffles that say how large a correlation is by chance."""

DOUBT = 0.01
"""Share of the classes' own distribution in what a discriminant says, which bounds its loss where it is wrong."""


@dataclass(frozen=True)
class Told:
    """What a discriminant tells of the classes of samples that it was not fitted on.

    Attributes:
        loss: Its mean cross-entropy, in nats; 0 without a direction.
        directions: Number of directions that it looks at, each of which tells more than by chance.
    """

    loss: float
    directions: int


def few_of(coordinates: Tensor, generator: torch.Generator) -> Tensor:
    """The coordinates `[N, D]`, or random projections where there are too many."""
    if coordinates.shape[1] <= PROJECTED:
        return coordinates
    return coordinates @ torch.randn(coordinates.shape[1], PROJECTED, generator=generator, dtype=torch.float64)


def canonical_directions(x: Tensor, y: Tensor, most: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Canonical directions of two sets of coordinates, `[D, K]` each: those pairs whose correlation is larger than any
    of shuffled pairs.

    Args:
        x, y: Samples `[N, D]` of both.
        most: Largest number of principal directions of each that they are sought among.
        generator: Generator of the shuffles.
    """
    whitened = [_whitening(each, max(1, most)) for each in (x, y)]
    u, v = (_centred(each) @ w for each, w in zip((x, y), whitened, strict=True))
    left, correlations, right = torch.linalg.svd(u.T @ v / len(u), full_matrices=False)
    shuffled = [v[torch.randperm(len(v), generator=generator)] for _ in range(SHUFFLES)]
    kept = _above(correlations, [u.T @ each / len(u) for each in shuffled])
    return whitened[0] @ left[:, :kept], whitened[1] @ right[:kept].T


def discriminant_loss(
    fitted: tuple[Tensor, Tensor], held: tuple[Tensor, Tensor], most: int, generator: torch.Generator
) -> Told:
    """Fit a linear discriminant on samples, and judge it on others.

    Args:
        fitted, held: Samples `[N, D]` and the numbers of their classes `[N]`, from 0 on.
        most: Largest number of principal directions that its directions are sought among.
        generator: Generator of the shuffles.
    """
    (x, seen), (others, codes) = fitted, held
    classes = int(torch.cat([seen, codes]).max()) + 1
    whitening, origin = _whitening(x, max(1, most)), x.mean(0)
    u, v = ((each - origin) @ whitening for each in (x, others))
    shares = (torch.bincount(seen, minlength=classes) + 0.5) / (len(seen) + 0.5 * classes)
    _, correlations, right = torch.linalg.svd(_between(u, seen, shares), full_matrices=False)
    shuffled = [seen[torch.randperm(len(seen), generator=generator)] for _ in range(SHUFFLES)]
    kept = _above(correlations, [_between(u, each, shares) for each in shuffled])
    if not kept:
        return Told(0.0, 0)
    u, v = u @ right[:kept].T, v @ right[:kept].T
    means = _class_means(u, seen, classes)
    within = _whitening(u - means[seen], kept, centre=False)
    distances = torch.cdist(v @ within, means @ within) ** 2
    posterior = (1 - DOUBT) * (shares.log() - distances / 2).softmax(1) + DOUBT * shares
    return Told(-float(posterior[torch.arange(len(codes)), codes].log().mean()), kept)


def _between(samples: Tensor, codes: Tensor, shares: Tensor) -> Tensor:
    """The means of whitened samples over the classes, `[classes, K]`, each times the root of its share; its singular
    values are the canonical correlations of samples and classes."""
    return _class_means(samples, codes, len(shares)) * shares.sqrt()[:, None]


def _above(correlations: Tensor, by_chance: list[Tensor]) -> int:
    """Number of canonical correlations that are larger than any of those by chance, whose matrices are given."""
    if not correlations.numel():
        return 0
    bar = max(float(torch.linalg.matrix_norm(each, ord=2)) for each in by_chance)
    return min(int((correlations > bar).sum()), DIRECTIONS)


def _class_means(samples: Tensor, codes: Tensor, classes: int) -> Tensor:
    """The mean of the samples `[N, K]` of each class, `[classes, K]`; zeros for a class without samples."""
    sums = samples.new_zeros(classes, samples.shape[1]).index_add_(0, codes, samples)
    return sums / torch.bincount(codes, minlength=classes).clamp_min(1)[:, None]


def _whitening(samples: Tensor, most: int, *, centre: bool = True) -> Tensor:
    """Directions `[D, K]` in which samples `[N, D]` are uncorrelated and of variance 1: the first principal ones."""
    samples = _centred(samples) if centre else samples
    variances, directions = torch.linalg.eigh(samples.T @ samples / len(samples))
    kept = min(most, int((variances > 1e-9 * variances[-1]).sum()))
    return directions[:, len(variances) - kept :] / variances[len(variances) - kept :].sqrt()


def _centred(samples: Tensor) -> Tensor:
    return samples - samples.mean(0)
