"""Effect of corruptions on a model and on a baseline: answers image by image, corruption errors, and both as JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Answers:
    """Which images a model got right.

    Attributes:
        correct: Whether each image is right without a corruption.
        corrupted: Whether each of the same images, in the same order, is right, by kind and severity of a corruption.
    """

    correct: tuple[bool, ...]
    corrupted: dict[str, dict[int, tuple[bool, ...]]]

    @property
    def clean(self) -> float:
        """Accuracy without a corruption, from 0 to 1."""
        return sum(self.correct) / len(self.correct)

    @property
    def accuracy(self) -> dict[str, dict[int, float]]:
        """Accuracy by kind and severity, from 0 to 1."""
        return {k: {s: sum(images) / len(images) for s, images in by.items()} for k, by in self.corrupted.items()}

    def errors(self, kind: str, relative: bool = False) -> int:
        """Return the number of wrong answers under a kind, over all severities. If `relative`, the number of those on
        the clean images is subtracted once for each severity."""
        clean_errors = self.correct.count(False) if relative else 0
        return sum(images.count(False) - clean_errors for images in self.corrupted[kind].values())

    def to_dict(self) -> dict[str, Any]:
        """Return the answers for JSON, as strings with one digit for each image, 1 if it is right."""
        packed = {k: {s: _pack(images) for s, images in by.items()} for k, by in self.corrupted.items()}
        return {"clean": _pack(self.correct), "corrupted": packed}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Answers:
        by_kind = data["corrupted"].items()
        return cls(_unpack(data["clean"]), {k: {int(s): _unpack(by[s]) for s in by} for k, by in by_kind})


@dataclass(frozen=True)
class CorruptionReport:
    """Effect of corruptions on a model, and on a baseline on the very same images.

    Attributes:
        model: Answers of the model, image by image.
        baseline: Answers of the baseline; None for a model that is not reprogrammed and was evaluated without another
            model. There is no corruption error then.
        seed: Seed of the corruptions.
        versions: Versions, by name, of the packages that made the images and the answers.

    Example:
        >>> report = evaluate_corruptions(model, loader, ("white_noise", "missing_pixels"))
        >>> report.model.accuracy["white_noise"][5], report.mean_corruption_error
        (0.9, 0.9)
    """

    model: Answers = field(repr=False)
    baseline: Answers | None = field(repr=False)
    seed: int
    versions: dict[str, str]

    @property
    def samples(self) -> int:
        return len(self.model.correct)

    @property
    def mean_corruption_error(self) -> float | None:
        """mCE, the mean of :meth:`corruption_errors`; None if one of them is."""
        return _mean(self.corruption_errors())

    @property
    def relative_mean_corruption_error(self) -> float | None:
        """Relative mCE, the mean of the relative :meth:`corruption_errors`; None if one of them is."""
        return _mean(self.corruption_errors(relative=True))

    def corruption_errors(self, relative: bool = False) -> dict[str, float | None]:
        """Return the CE of each kind: errors of the model over errors of the baseline, over all severities (Hendrycks
        and Dietterich, arXiv 1903.12261, section 4.1).

        1 is as good as the baseline, and less is better. If `relative`, only the errors that a corruption adds to those
        on clean images count. A CE is None if there is no baseline, or if the baseline makes, or adds, no error.
        """
        ratios: dict[str, float | None] = {}
        for kind in self.model.corrupted:
            # Both counts are of the same images and severities, so their ratio is that of the error rates.
            of_baseline = 0 if self.baseline is None else self.baseline.errors(kind, relative)
            ratios[kind] = self.model.errors(kind, relative) / of_baseline if of_baseline > 0 else None
        return ratios

    def __str__(self) -> str:
        accuracy, baseline = self.model.accuracy, self.baseline
        head = f"{self.samples} images, clean {_percent(self.model.clean)}"
        if baseline is not None:
            head += f" (baseline {_percent(baseline.clean)}), mCE {_percent(self.mean_corruption_error)}"
            head += f", relative mCE {_percent(self.relative_mean_corruption_error)}"
        lines = [head, f"{'accuracy, %':18}" + "".join(f"{s:7}" for s in next(iter(accuracy.values()))) + f"{'CE':>11}"]
        for kind, error in self.corruption_errors().items():
            shares = "".join(f"{100 * share:7.1f}" for share in accuracy[kind].values())
            lines.append(f"{kind:18}{shares}{_percent(error):>11}")
        for name, relative, verb in (("mCE", False, "makes no error"), ("relative mCE", True, "loses nothing")):
            undefined = [kind for kind, error in self.corruption_errors(relative).items() if error is None]
            if undefined and baseline is not None:
                lines.append(f"{name} is undefined: the baseline {verb} under {', '.join(undefined)}.")
        return "\n".join(lines)

    def to_json(self) -> str:
        """Return the report as JSON, with the accuracies and corruption errors that follow from the answers."""
        baseline = self.baseline
        numbers = {
            "accuracy": self.model.accuracy,
            "baseline_accuracy": baseline and baseline.accuracy,
            "corruption_errors": self.corruption_errors(),
            "mean_corruption_error": self.mean_corruption_error,
            "relative_mean_corruption_error": self.relative_mean_corruption_error,
        }
        answers = {"model": self.model.to_dict(), "baseline": baseline and baseline.to_dict()}
        return json.dumps({**answers, "seed": self.seed, "versions": self.versions, **numbers})

    @classmethod
    def from_json(cls, text: str) -> CorruptionReport:
        data = json.loads(text)
        baseline = data["baseline"] and Answers.from_dict(data["baseline"])
        return cls(Answers.from_dict(data["model"]), baseline, data["seed"], data["versions"])


def _mean(errors: dict[str, float | None]) -> float | None:
    values = [error for error in errors.values() if error is not None]
    return sum(values) / len(values) if values and len(values) == len(errors) else None


def _percent(ratio: float | None) -> str:
    return "undefined" if ratio is None else f"{100 * ratio:.1f} %"


def _pack(images: tuple[bool, ...]) -> str:
    return "".join("01"[right] for right in images)


def _unpack(digits: str) -> tuple[bool, ...]:
    return tuple(digit == "1" for digit in digits)
