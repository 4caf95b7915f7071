"""Accuracy of each class under one condition: the worst class and the gap, with intervals that hold at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from timm_nrpm.evaluation.intervals import CONFIDENCE, exact

DRAWS = 1999
"""Number of permutations of the labels, so that the smallest p-value is 1 / 2000."""

Bounds: TypeAlias = tuple[tuple[float, float], ...]
"""Lower and upper bound of each class."""


@dataclass(frozen=True)
class ClassShare:
    """Accuracy on the images of one class.

    Attributes:
        label: The class.
        count: Number of its images.
        right: Number of those that the model is right on.
    """

    label: int
    count: int
    right: int

    @property
    def share(self) -> float:
        """Share of the images that the model is right on, from 0 to 1."""
        return self.right / self.count

    def interval(self, confidence: float = CONFIDENCE) -> tuple[float, float]:
        """Return the exact interval of this class alone; see :meth:`ClassShares.bounds` for all at once."""
        return exact(self.right, self.count, confidence)


@dataclass(frozen=True)
class ClassShares:
    """Accuracy of every class that has enough images, under one condition.

    Attributes:
        classes: The classes in the order of their labels, two at least.
    """

    classes: tuple[ClassShare, ...]

    @property
    def worst(self) -> ClassShare:
        """The class with the lowest accuracy; of equal ones the one with more images, and then the first."""
        return min(self.classes, key=lambda each: (each.share, -each.count))

    @property
    def best(self) -> ClassShare:
        """The class with the highest accuracy, likewise."""
        return max(self.classes, key=lambda each: (each.share, each.count))

    @property
    def gap(self) -> float:
        """Accuracy of the best class less that of the worst, from 0 to 1."""
        return self.best.share - self.worst.share

    def bounds(self, risk: float = 1 - CONFIDENCE) -> Bounds:
        """Return exact intervals, one for each class, that all hold at once but for a probability of `risk`
        (Bonferroni)."""
        return tuple(each.interval(1 - risk / len(self.classes)) for each in self.classes)

    @property
    def worst_interval(self) -> tuple[float, float]:
        """The 95 % interval of the lowest true accuracy, whichever class has it: where all bounds hold, it is at least
        the lowest lower bound and at most the lowest upper one."""
        return lowest(self.bounds())

    @property
    def gap_interval(self) -> tuple[float, float]:
        """The 95 % interval of the true gap, from the same bounds."""
        return spread(self.bounds())

    @property
    def p_value(self) -> float:
        """Probability of such a gap or a larger one if the class of an image has nothing to do with whether the model
        is right on it, by :data:`DRAWS` permutations of the labels with a fixed seed."""
        import numpy as np

        counts = np.array([each.count for each in self.classes])
        right = sum(each.right for each in self.classes)
        # Permuted labels share the right images out among the classes like draws without replacement.
        drawn = np.random.default_rng(0).multivariate_hypergeometric(counts, right, DRAWS) / counts
        gaps = drawn.max(1) - drawn.min(1)
        return float((1 + (gaps >= self.gap - 1e-12).sum()) / (1 + DRAWS))


def lowest(bounds: Bounds) -> tuple[float, float]:
    """Bounds of the lowest share."""
    lows, highs = zip(*bounds, strict=True)
    return min(lows), min(highs)


def spread(bounds: Bounds) -> tuple[float, float]:
    """Bounds of the highest share less the lowest."""
    lows, highs = zip(*bounds, strict=True)
    return max(0.0, max(lows) - min(highs)), max(highs) - min(lows)
