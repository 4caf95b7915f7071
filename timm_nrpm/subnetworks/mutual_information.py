"""EDGE: mutual information by locality-sensitive hashing and dependence graphs (Noshad et al., arXiv 1801.09125).

Samples of x and of y are hashed into cells. The cells of x and those of y are the nodes of a graph, and an edge joins
two cells with its number of samples in common; mutual information is a sum over the edges. Wide cells blur it, and
narrow ones hold too few samples: an ensemble of widths is weighted so that the blur cancels.

This module differs from the paper where images of a network need it to. Coordinates are ranks, mapped to those of a
normal distribution, which leaves mutual information as it is and tames heavy tails. Cells are as narrow as the samples
fill them. Entropies are Grassberger's estimates (arXiv physics/0307138), and what remains of shuffled pairs, which
share nothing, is subtracted. And since no hash of many coordinates at once is filled by the samples at hand, many
coordinates are hashed by pairs of canonical directions, fitted on one half of the samples and hashed on the other. A
discrete variable beside many coordinates is told by a linear discriminant instead.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from timm_nrpm.checks import check_integer
from timm_nrpm.subnetworks.directions import canonical_directions, discriminant_loss, few_of

LEAST = 100
"""Smallest number of samples, of each class where classes are given."""

WIDEST, NARROWEST, SHRINK = 4.0, 0.02, 1.15
"""Widths of cells, in standard deviations of a coordinate: the largest, the smallest, and the factor between two."""

FILLED, FILLED_JOINTLY = 0.99, 0.98
"""Share of the samples that are not alone in their cell: of a pair of coordinates, and of more of them. Cells are as
narrow as that allows. It is also the chance that another sample falls into a cell that is known (Good-Turing)."""

ENSEMBLE, SPAN = 8, 2.0
"""Number of widths of the ensemble, and the widest of them in units of the narrowest."""

SHUFFLES = 2
"""Number of shuffles whose mean is what pairs that share nothing leave."""

JOINTLY = 2
"""Largest number of coordinates of a variable that are also hashed all at once."""

PER_DIRECTION = 20
"""Number of samples for each principal direction among which canonical ones are sought."""


@dataclass(frozen=True)
class Estimate:
    """An estimate of mutual information.

    Attributes:
        nats: The estimate, in nats. It is below zero where less than chance was found.
        chance: What shuffled pairs leave, in nats; it is subtracted already. Where it is large beside `nats`, there are
            too few samples.
        pairs: Number of pairs of directions, or of directions of a discriminant, that it is of, the mean of two halves
            of the samples; 0 if no direction was found, and the estimate is 0.
    """

    nats: float
    chance: float
    pairs: float


def edge(x: Tensor, y: Tensor, *, given: Tensor | None = None, seed: int = 0) -> float:
    """Mutual information of two variables from samples of both, in nats.

    It sees every dependence of up to two coordinates each. Of more coordinates it sees what canonical directions see,
    in which a linear function of x goes with a linear function of y, and sums over pairs of them: a dependence without
    any correlation is missed, and one that several pairs share is counted for each of them. From few samples it sees
    few directions, one for every 40 at most: estimates can be compared where they are of equally many samples.

    Args:
        x, y: Samples `[N, ...]`, of any shape. Those of integers or booleans are discrete, and equal rows are equal
            values; floats are continuous.
        given: Classes `[N]` of the samples, for the mutual information within a class: the mean over the classes,
            weighted by their samples.
        seed: Seed of shuffles, of the places of cells and of random projections.

    Returns:
        The estimate. For independent variables it is near zero, on either side; of two coordinates, where two
        estimates are made and the larger is taken, about 0.01 above at 200 samples.

    Raises:
        ValueError: There are fewer than 100 samples, of all or of a class; the numbers of samples differ; or a value is
            not finite.

    Example:
        >>> x = torch.randn(2000, 1, generator=torch.Generator().manual_seed(0))
        >>> edge(x, x > 0), math.log(2)
        (0.67, 0.69)
        >>> edge(x, x.flip(0))
        0.0
    """
    return estimate(x, y, given=given, seed=seed).nats


def estimate(x: Tensor, y: Tensor, *, given: Tensor | None = None, seed: int = 0) -> Estimate:
    """The same as :func:`edge`, with what chance leaves and with the number of pairs of directions.

    Example:
        >>> x = torch.randn(2000, 5, generator=torch.Generator().manual_seed(0))
        >>> estimate(x, x + x.roll(1, dims=1)).pairs
        5.0
    """
    seed = check_integer("seed", seed, least=0)
    if x.ndim < 1 or y.ndim < 1 or len(x) != len(y):
        raise ValueError(f"x is {list(x.shape)} and y is {list(y.shape)}: give as many samples of both, [N, ...].")
    if given is None:
        _check_count(len(x), "")
        return _estimate(_Variable.of("x", x), _Variable.of("y", y), torch.Generator().manual_seed(seed))
    if given.shape != x.shape[:1] or given.is_floating_point():
        raise ValueError(
            f"given is {list(given.shape)} of {given.dtype}: give a class for each sample, {[len(x)]} of integers."
        )
    given = given.detach().cpu()
    parts: list[tuple[float, Estimate]] = []
    for label in given.unique().tolist():
        rows = (given == label).nonzero()[:, 0]
        _check_count(len(rows), f" of class {label}")
        inside = _estimate(_Variable.of("x", x, rows), _Variable.of("y", y, rows), torch.Generator().manual_seed(seed))
        parts.append((len(rows) / len(x), inside))
    return _mean(parts)


def _check_count(count: int, of: str) -> None:
    if count < LEAST:
        raise ValueError(
            f"{count} samples{of} are too few to estimate mutual information from: give {LEAST} or more"
            f"{', or leave the class out' if of else ''}."
        )


def _mean(parts: list[tuple[float, Estimate]]) -> Estimate:
    """The weighted mean of estimates; the weights sum to 1."""
    values = ((w * each.nats, w * each.chance, w * each.pairs) for w, each in parts)
    return Estimate(*map(sum, zip(*values, strict=True)))


@dataclass(frozen=True)
class _Variable:
    """Samples of a variable: coordinates `[N, D]` of a continuous one, as normal scores and as they are but for their
    mean and deviation; or codes `[N]` of a discrete one."""

    coordinates: Tensor | None
    codes: Tensor | None = None
    linear: Tensor | None = None

    @classmethod
    def of(cls, name: str, samples: Tensor, rows: Tensor | None = None) -> _Variable:
        samples = samples.detach().flatten(1) if samples.ndim > 1 else samples.detach()[:, None]
        samples = (samples if rows is None else samples[rows.to(samples.device)]).cpu()
        if samples.is_complex():
            raise ValueError(f"{name} is complex: give its real and imaginary parts as coordinates.")
        if not samples.is_floating_point():
            return cls(None, _codes(samples.long()))
        if not torch.isfinite(samples).all():
            raise ValueError(f"{name} has values that are not finite: leave these samples out.")
        samples = samples.double()
        samples = samples[:, (samples != samples[:1]).any(0)]
        return cls(normal_scores(samples), None, _standard(samples))

    @property
    def size(self) -> int:
        """Number of coordinates that are not constant."""
        return 1 if self.coordinates is None else self.coordinates.shape[1]

    def hashed(self, width: float, generator: torch.Generator) -> Tensor:
        """Codes `[N]` of the cells of all coordinates at once; those of a discrete variable are its values."""
        if self.coordinates is None:
            assert self.codes is not None
            return self.codes
        shift = torch.rand(self.size, generator=generator, dtype=torch.float64)
        return _codes((self.coordinates / width + shift).floor().long())


def _standard(samples: Tensor) -> Tensor:
    """Samples `[N, D]` less their mean, in units of their deviation."""
    centred = samples - samples.mean(0)
    return centred / centred.square().mean(0).sqrt()


def _codes(rows: Tensor) -> Tensor:
    """A number from 0 on for each different row of `[N, D]`, `[N]`."""
    if rows.shape[1] == 1:
        rows = rows[:, 0]
        low, high = int(rows.min()), int(rows.max())
        if high - low < 4 * len(rows):
            return rows - low
        return torch.unique(rows, return_inverse=True)[1]
    return torch.unique(rows, dim=0, return_inverse=True)[1]


def normal_scores(samples: Tensor) -> Tensor:
    """Each coordinate of `[N, D]` as if it were normal: its rank among the samples, where equal ones share their mean
    rank, through the inverse of the normal distribution."""
    count = len(samples)
    columns = []
    for column in samples.T:
        _, codes, counts = torch.unique(column, return_inverse=True, return_counts=True)
        ranks = counts.cumsum(0) - counts.double() / 2  # of the middle of the equal ones, in samples
        columns.append(torch.special.ndtri(ranks / count)[codes])
    return torch.stack(columns, dim=1) if columns else samples.new_empty(count, 0)


def _estimate(x: _Variable, y: _Variable, generator: torch.Generator) -> Estimate:
    if not x.size or not y.size:  # a constant tells nothing
        return Estimate(0.0, 0.0, 0)
    found = []
    if x.size <= JOINTLY and y.size <= JOINTLY:
        found.append(_graph(x, y, generator))
    if max(x.size, y.size) > 1:
        if x.coordinates is not None and y.coordinates is not None:
            found.append(_canonical(x.coordinates, y.coordinates, generator))
        elif x.linear is not None and y.codes is not None:
            found.append(_classified(x.linear, y.codes, generator))
        elif y.linear is not None and x.codes is not None:
            found.append(_classified(y.linear, x.codes, generator))
    return max(found, key=lambda each: each.nats)


def _halves(count: int, generator: torch.Generator) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The samples in two halves, of which each is fitted on once and held out once."""
    order = torch.randperm(count, generator=generator)
    first, second = order[: count // 2], order[count // 2 :]
    return (first, second), (second, first)


def _canonical(x: Tensor, y: Tensor, generator: torch.Generator) -> Estimate:
    """The sum over pairs of canonical directions of two continuous variables."""
    features, parts = [few_of(each, generator) for each in (x, y)], []
    for fitted, held in _halves(len(x), generator):
        directions = canonical_directions(
            features[0][fitted], features[1][fitted], len(fitted) // PER_DIRECTION, generator
        )
        sides = [normal_scores(f[held] @ d) for f, d in zip(features, directions, strict=True)]
        total = Estimate(0.0, 0.0, 0)
        for u, v in zip(sides[0].T, sides[1].T, strict=True):
            pair = _graph(_Variable(u[:, None]), _Variable(v[:, None]), generator)
            total = Estimate(total.nats + pair.nats, total.chance + pair.chance, total.pairs + 1)
        parts.append((0.5, total))
    return _mean(parts)


def _classified(x: Tensor, codes: Tensor, generator: torch.Generator) -> Estimate:
    """What a linear discriminant tells of the values of a discrete variable: their entropy, less the cross-entropy of
    the discriminant on samples that it was not fitted on (a lower bound in expectation, Barber and Agakov 2003)."""
    features, parts = few_of(x, generator), []
    for fitted, held in _halves(len(x), generator):
        told = discriminant_loss(
            (features[fitted], codes[fitted]), (features[held], codes[held]), len(fitted) // PER_DIRECTION, generator
        )
        nats = _entropy(codes[held]) - told.loss if told.directions else 0.0
        parts.append((0.5, Estimate(nats, 0.0, told.directions)))
    return _mean(parts)


def _graph(x: _Variable, y: _Variable, generator: torch.Generator) -> Estimate:
    """EDGE between all coordinates of one variable and all of the other, less what shuffled pairs leave."""
    if x.coordinates is None and y.coordinates is None:
        widths, weights = torch.ones(1), torch.ones(1)
    else:
        filled = FILLED if x.size == y.size == 1 else FILLED_JOINTLY
        widths = _width(x, y, filled, generator) * torch.linspace(1, SPAN, ENSEMBLE, dtype=torch.float64)
        weights = _weights(widths)
    nats = chance = 0.0
    for width, weight in zip(widths.tolist(), weights.tolist(), strict=True):
        i, j = x.hashed(width, generator), y.hashed(width, generator)
        apart = _entropy(i) + _entropy(j)
        nats += weight * (apart - _entropy(_joint(i, j)))
        for _ in range(SHUFFLES):
            shuffled = j[torch.randperm(len(j), generator=generator)]
            chance += weight * (apart - _entropy(_joint(i, shuffled))) / SHUFFLES
    return Estimate(nats - chance, chance, 1)


def _width(x: _Variable, y: _Variable, filled: float, generator: torch.Generator) -> float:
    """The width of the narrowest cells that the samples fill."""
    # Places in the list of widths, from wide to narrow.
    low, high = 0, int(math.log(WIDEST / NARROWEST) / math.log(SHRINK))
    while low < high:
        middle = (low + high + 1) // 2
        width = WIDEST / SHRINK**middle
        joint = _joint(x.hashed(width, generator), y.hashed(width, generator))
        alone = int((torch.bincount(joint) == 1).sum())
        low, high = (middle, high) if 1 - alone / len(joint) >= filled else (low, middle - 1)
    return WIDEST / SHRINK**low


def _weights(widths: Tensor) -> Tensor:
    """The smallest weights with sum 1 that cancel what grows with the square of the width (Noshad et al., section 4).

    With cells in random places, the blur of a smooth density has no term that grows with the width itself.
    """
    terms = torch.stack([torch.ones_like(widths), (widths / widths[0]) ** 2])
    return terms.T @ torch.linalg.solve(terms @ terms.T, torch.tensor([1.0, 0.0], dtype=torch.float64))


def _joint(i: Tensor, j: Tensor) -> Tensor:
    """A code for each pair of codes."""
    return _codes((i * (int(j.max()) + 1) + j)[:, None])


def _entropy(codes: Tensor) -> float:
    """Grassberger's estimate of the entropy of codes `[N]`, in nats."""
    return math.log(len(codes)) - float(_summands(len(codes))[torch.bincount(codes)].sum()) / len(codes)


@lru_cache(16)
def _summands(most: int) -> Tensor:
    """What a value with n samples gives to Grassberger's sum, for n from 0 to `most`."""
    counts = torch.arange(1, most + 1, dtype=torch.float64)
    sign = 1 - 2 * (counts % 2)
    expected = torch.digamma(counts) + sign / 2 * (torch.digamma((counts + 1) / 2) - torch.digamma(counts / 2))
    return torch.cat([torch.zeros(1, dtype=torch.float64), counts * expected])
