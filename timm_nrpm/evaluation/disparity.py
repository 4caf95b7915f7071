"""Accuracy class by class: the worst class, the gap between classes, and what chance alone makes of both.

A model that keeps most images may keep few of one class, and training for robustness may widen the gap (Hu et al.,
"Understanding the Impact of Adversarial Robustness on Accuracy Disparity", arXiv 2211.15762). The lowest of several
measured shares is below the lowest true share on average, and the gap above the true gap, since each class is measured
with an error of its own. So the intervals here hold for all classes at once, and a permutation test says how often
chance alone would make such a gap.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from timm_nrpm.evaluation.class_shares import Bounds, ClassShare, ClassShares, lowest, spread
from timm_nrpm.evaluation.intervals import CONFIDENCE, paired, quantile

ENOUGH = 20
"""Smallest number of images of a class that is compared with others: with fewer, its interval says next to nothing."""


class Judged(Protocol):
    """What :func:`by_class` needs to know of an evaluation; a :class:`RobustnessReport` has it."""

    @property
    def labels(self) -> tuple[int, ...]:
        """Class of each image; empty if they were not recorded."""

    @property
    def correct(self) -> tuple[bool, ...]:
        """Whether the model was right on each image without an attack."""

    @property
    def survivors(self) -> tuple[bool, ...]:
        """Whether the model was right on each image under every attack."""

    @property
    def control(self) -> Judged | None:
        """The evaluation of the plain model; None if there was none."""


@dataclass(frozen=True)
class Difference:
    """Difference between two models, from -1 to 1, with its 95 % interval.

    Attributes:
        value: Value of the first model less that of the second.
        low, high: Ends of the interval.
    """

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{100 * self.value:+.1f} points ({100 * self.low:+.1f} to {100 * self.high:+.1f})"


@dataclass(frozen=True)
class Disparity:
    """Accuracy class by class, of a model and of the plain one.

    Attributes:
        clean: Accuracy of each class without an attack.
        kept: Share of each class that is right under every attack.
        control: The same of the plain model, on the same images; None if there was none.
        apart: For each class, the number of images that survive only in the model, and only in the plain one; empty
            without a plain model.
    """

    clean: ClassShares
    kept: ClassShares
    control: Disparity | None = None
    apart: tuple[tuple[int, int], ...] = ()

    @property
    def worst_change(self) -> Difference | None:
        """Accuracy of the worst class under every attack, less that of the plain model's worst class; None without one.

        The two classes may differ. If j is this model's worst, the difference is at least that of the two models on j;
        if i is the plain model's worst, it is at most that on i. So the interval goes from the lowest bound over all j
        that may be the worst to the highest over all such i, and no further than the bounds of both models alone allow.
        Half of the risk of 5 % goes to these exact bounds, and half to the paired differences. A bootstrap would be
        narrower, but where several classes are equally bad it holds the truth far too seldom.
        """
        if self.control is None:
            return None
        ours, theirs = self._bounds()
        low, high = _both(self._range(worst=True), _less(lowest(ours), lowest(theirs)))
        return Difference(self.kept.worst.share - self.control.kept.worst.share, low, high)

    @property
    def gap_change(self) -> Difference | None:
        """Gap under every attack less that of the plain model, from the same bounds; None without a plain model."""
        if self.control is None:
            return None
        ours, theirs = self._bounds()
        paired_ends = _less(self._range(worst=False), self._range(worst=True))
        low, high = _both(paired_ends, _less(spread(ours), spread(theirs)))
        return Difference(self.kept.gap - self.control.kept.gap, low, high)

    def _bounds(self) -> tuple[Bounds, Bounds]:
        """Bounds of the classes of this model and of the plain one, which all hold at once with half of the risk."""
        assert self.control is not None
        return self.kept.bounds((1 - CONFIDENCE) / 4), self.control.kept.bounds((1 - CONFIDENCE) / 4)

    def _range(self, *, worst: bool) -> tuple[float, float]:
        """Bounds of the difference between the two models' worst classes, or between their best ones, from the paired
        differences of all classes, which hold at once with the other half."""
        z = quantile(1 - (1 - CONFIDENCE) / 2 / len(self.apart))
        pairs = zip(self.apart, self.kept.classes, strict=True)
        between = [paired(more, fewer, each.count, z) for (more, fewer), each in pairs]
        ours, theirs = (_candidates(bounds, worst) for bounds in self._bounds())
        below, above = (ours, theirs) if worst else (theirs, ours)
        return min(between[i][0] for i in below), max(between[i][1] for i in above)

    def sentences(self, where: str, plain: str) -> str:
        """What a reader must know of the classes, in one sentence, and in a second of the plain model.

        Args:
            where: What the images were kept under, such as `"in the worst case"`.
            plain: Name of the plain model, such as `"the plain model"`.
        """
        kept, worst = self.kept, self.kept.worst
        clean = next(each for each in self.clean.classes if each.label == worst.label)
        told = (
            f"Of {len(kept.classes)} classes with {ENOUGH} images or more, class {worst.label} has the lowest "
            f"accuracy: {_percent(worst.share)} % ({_ends(kept.worst_interval)}, for all classes at once) {where} and "
            f"{_percent(clean.share)} % clean; the best, class {kept.best.label}, has {_percent(kept.gap)} points more "
            f"({_ends(kept.gap_interval)}; permutation test, p = {kept.p_value:.2g})."
        )
        if self.control is None:
            return told
        theirs = self.control.kept
        return (
            f"{told} With {plain} the lowest is class {theirs.worst.label} at {_percent(theirs.worst.share)} %, and "
            f"the best has {_percent(theirs.gap)} points more: a difference of {self.worst_change} for the worst class "
            f"and of {self.gap_change} for the gap."
        )

    def __str__(self) -> str:
        parts = {"clean, %": self.clean, "kept, %": self.kept}
        if self.control is not None:
            parts |= {"plain, clean, %": self.control.clean, "plain, kept, %": self.control.kept}
        lines = ["class  images" + "".join(f"{name:>24}" for name in parts)]
        bounds = [shares.bounds() for shares in parts.values()]
        for row, each in enumerate(self.kept.classes):
            cells = [
                f"{_percent(shares.classes[row].share)} ({_ends(ends[row])})"
                for shares, ends in zip(parts.values(), bounds, strict=True)
            ]
            lines.append(f"{each.label:5}  {each.count:6}" + "".join(f"{cell:>24}" for cell in cells))
        return "\n".join([*lines, "The intervals hold for all classes of a column at once."])


def by_class(report: Judged) -> Disparity | None:
    """Compare the accuracies of the classes in a report.

    Args:
        report: Result of :func:`timm_nrpm.evaluate`, or anything else with its labels and outcomes.

    Returns:
        The comparison; None if the report has no labels, or less than two classes have :data:`ENOUGH` images.

    Example:
        >>> labels = (3,) * 20 + (5,) * 20
        >>> found = by_class(dataclasses.replace(report, labels=labels, correct=(True,) * 30 + (False,) * 10,
        ...                                      attacks=(), control=None))
        >>> found.kept.worst.label, found.kept.gap, found.kept.gap_interval, found.kept.p_value
        (5, 0.5, (0.05, 0.75), 0.001)
    """
    counts = Counter(report.labels)
    enough = sorted(label for label, count in counts.items() if count >= ENOUGH)
    if len(enough) < 2:
        return None
    control: Disparity | None = None
    apart: tuple[tuple[int, int], ...] = ()
    if report.control is not None and len(report.control.correct) == len(report.labels):
        control = _of(report.control, report.labels, enough)
        apart = _apart(report.survivors, report.control.survivors, report.labels, enough)
    found = _of(report, report.labels, enough)
    return Disparity(found.clean, found.kept, control, apart)


def _of(report: Judged, labels: Sequence[int], enough: Sequence[int]) -> Disparity:
    """The shares of one model, on the classes that have enough images."""
    return Disparity(_shares(report.correct, labels, enough), _shares(report.survivors, labels, enough))


def _shares(right: Iterable[bool], labels: Sequence[int], enough: Sequence[int]) -> ClassShares:
    counts = Counter(labels)
    kept = Counter(label for label, each in zip(labels, right, strict=True) if each)
    return ClassShares(tuple(ClassShare(label, counts[label], kept[label]) for label in enough))


def _apart(
    ours: Sequence[bool], theirs: Sequence[bool], labels: Sequence[int], enough: Sequence[int]
) -> tuple[tuple[int, int], ...]:
    """For each class, the number of images that only one model is right on, and that only the other is."""
    pairs = Counter(zip(labels, ours, theirs, strict=True))
    return tuple((pairs[label, True, False], pairs[label, False, True]) for label in enough)


def _less(first: tuple[float, float], second: tuple[float, float]) -> tuple[float, float]:
    """Bounds of a difference, from those of its terms."""
    return first[0] - second[1], first[1] - second[0]


def _both(first: tuple[float, float], second: tuple[float, float]) -> tuple[float, float]:
    """The part that two intervals share."""
    return max(first[0], second[0]), min(first[1], second[1])


def _candidates(bounds: Bounds, worst: bool) -> list[int]:
    """Places of the classes that may be the worst, or the best, where all bounds hold."""
    lows, highs = zip(*bounds, strict=True)
    if worst:
        return [i for i, low in enumerate(lows) if low <= min(highs)]
    return [i for i, high in enumerate(highs) if high >= max(lows)]


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _ends(interval: tuple[float, float]) -> str:
    return " to ".join(map(_percent, interval))
