"""Effect of a moving crop on predictions: answers image by image, with and without crop selection, to and from JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field

from timm_nrpm.evaluation.intervals import exact, of_mean
from timm_nrpm.evaluation.trials import Effect

MOVES = 4
"""Number of the moves of a frame by one pixel: up, down, left and right."""


@dataclass(frozen=True)
class Frames:
    """What one way of inference makes of each image as its frame moves.

    Attributes:
        correct: A digit for each image, 1 where the prediction is right with the frame in the middle.
        stays: A digit for each image from 0 to 4, the number of moves by one pixel that leave the prediction as it is.
        survived: A digit for each image, 1 where the prediction is right at every place of the frame.
    """

    correct: str
    stays: str
    survived: str

    @property
    def accuracy(self) -> float:
        """Accuracy with the frame in the middle, from 0 to 1."""
        return self.correct.count("1") / len(self.correct)

    @property
    def consistency(self) -> float:
        """One-pixel consistency: share of the images whose prediction stays, averaged over the four moves."""
        return sum(self.shares) / len(self.shares)

    @property
    def worst_case(self) -> float:
        """Share of the images that are right at every place of the frame, from 0 to 1."""
        return self.survived.count("1") / len(self.survived)

    @property
    def shares(self) -> tuple[float, ...]:
        """Share of the four moves that leave the prediction as it is, for each image."""
        return tuple(int(digit) / MOVES for digit in self.stays)

    @property
    def unmoved(self) -> str:
        """A digit for each image, 1 where all four moves leave the prediction as it is."""
        return "".join(str(int(digit == str(MOVES))) for digit in self.stays)


@dataclass(frozen=True)
class ShiftReport:
    """Predictions of a model as the crop moves inside larger images, with and without crop selection.

    Attributes:
        middle: Inference on the crop in the middle of the frame.
        selected: Inference by crop selection.
        size: Height and width of the crops, the model's input.
        budget: Largest move of the frame in pixels, down and across.
        search: Largest distance, in pixels, of a selected crop from the middle of its frame.
        rule: Score that selects, see :func:`timm_nrpm.translations.evaluate_shifts`.

    Example:
        >>> larger = [(torch.nn.functional.pad(pixels, (3, 3, 3, 3)), labels) for pixels, labels in loader]
        >>> report = timm_nrpm.translations.evaluate_shifts(model, larger)
        >>> report.middle.accuracy, report.middle.consistency, report.middle.worst_case
        (1.0, 1.0, 0.97)
        >>> ShiftReport.from_json(report.to_json()) == report
        True
    """

    middle: Frames = field(repr=False)
    selected: Frames = field(repr=False)
    size: tuple[int, int]
    budget: int
    search: int
    rule: str

    @property
    def samples(self) -> int:
        return len(self.middle.correct)

    @property
    def accuracy_effect(self) -> Effect:
        """Accuracy with crop selection less that without, paired image by image."""
        return Effect.of(self.selected.correct, self.middle.correct)

    @property
    def worst_effect(self) -> Effect:
        """Worst case with crop selection less that without, paired image by image."""
        return Effect.of(self.selected.survived, self.middle.survived)

    @property
    def unmoved_effect(self) -> Effect:
        """Share of the images whose prediction withstands all four moves, with crop selection less that without."""
        return Effect.of(self.selected.unmoved, self.middle.unmoved)

    @property
    def consistency_effect(self) -> tuple[float, float, float]:
        """One-pixel consistency with crop selection less that without, from -1 to 1, and its paired 95 % interval by
        the normal approximation."""
        apart = [a - b for a, b in zip(self.selected.shares, self.middle.shares, strict=True)]
        return (sum(apart) / len(apart), *of_mean(apart))

    def __str__(self) -> str:
        moves = f"moves of up to {self.budget} pixel{'s' if self.budget > 1 else ''}"
        lines = [
            f"{self.samples} images, crops of {self.size[0]} x {self.size[1]}, {moves}",
            f"{'':17}{'accuracy, %':25}{'one-pixel consistency, %':27}worst case, %",
        ]
        for name, frames in (("middle crop", self.middle), ("crop by content", self.selected)):
            right, kept = (_share(digits) for digits in (frames.correct, frames.survived))
            low, high = of_mean(frames.shares)
            consistent = f"{100 * frames.consistency:.1f} ({100 * max(low, 0):.1f} to {100 * min(high, 1):.1f})"
            lines.append(f"{name:17}{right:25}{consistent:27}{kept}")
        value, low, high = (100 * each for each in self.consistency_effect)
        effect = f"{value:+.1f} ({low:+.1f} to {high:+.1f})"
        return "\n".join([*lines, f"{'difference':17}{self.accuracy_effect!s:25}{effect:27}{self.worst_effect}"])

    def to_json(self) -> str:
        """Return the report as JSON, with the shares that follow from the answers."""
        ways = {"middle": self.middle, "selected": self.selected}
        shares = {
            name: {"accuracy": way.accuracy, "consistency": way.consistency, "worst_case": way.worst_case}
            for name, way in ways.items()
        }
        return json.dumps({**asdict(self), "shares": shares})

    @classmethod
    def from_json(cls, text: str) -> ShiftReport:
        data = json.loads(text)
        ways = Frames(**data["middle"]), Frames(**data["selected"])
        return cls(*ways, tuple(data["size"]), data["budget"], data["search"], data["rule"])


def _share(digits: str) -> str:
    """A share of the images in percent, with its exact interval."""
    right = digits.count("1")
    low, high = exact(right, len(digits))
    return f"{100 * right / len(digits):.1f} ({100 * low:.1f} to {100 * high:.1f})"
