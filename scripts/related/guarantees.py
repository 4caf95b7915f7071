"""Guarantees without retraining: smoothing in halves, against that of the whole, and conformal sets under attack."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from bases import Bases, Images
from row import Row
from torch import Tensor, nn

from timm_nrpm.data.ordering import seed_of
from timm_nrpm.evaluation.certificates import Certificate, CertificationReport
from timm_nrpm.evaluation.certification import certify
from timm_nrpm.evaluation.coverage import CHOICE, attacked
from timm_nrpm.evaluation.halves import certify_halves
from timm_nrpm.evaluation.sets import METHODS, Calibrated, Rule, calibrated, own_scores
from timm_nrpm.evaluation.smoothed import Smoothed
from timm_nrpm.evaluation.trials import Effect, digits_of
from timm_nrpm.models.modes import evaluating

RADIUS = 0.25
"""L2 radius, in pixel units, at which certified images are counted."""
ALPHA, COPIES = 0.1, 256
SPLITS = 20

NAMES = {"digits": "resnet8_digits, digits", "narrow": "narrow ResNet-18, adversarially trained, CIFAR-10"}


def rows(bases: Bases, kept: Path) -> list[Row]:
    """Measure all of it, or read from `kept` what was measured before: about ten minutes on one core."""
    kept.mkdir(parents=True, exist_ok=True)
    digits, narrow = bases.digits(), bases.narrow(robust=True)
    few, many = bases.digit_images("selection", 60), bases.digit_images("report", 180)
    smoothing = [
        Smoothing("digits", digits, few, many, (0.12, 0.25, 0.5), 180),
        Smoothing("narrow", narrow, bases.cifar("selection", 20), bases.cifar("report", 100), (0.12, 0.25), 50),
    ]
    once: Splits = [(range(200), range(200, 300))]
    conformal = [
        Conformal("digits", digits, _joined(bases.digit_images, 180, 180), _random_splits(360), 0.25, 0.25, 20, 16),
        Conformal("narrow", narrow, _joined(bases.cifar, 200, 100), once, 0.25, 0.125, 10, 4),
    ]
    found = [row for part in conformal for row in part.rows(kept)]
    return [*(row for part in smoothing for row in part.rows(kept)), *found]


Worth = Callable[[CertificationReport], tuple[float, float]]


@dataclass(frozen=True)
class Smoothing:
    """A base on which both ways of smoothing are measured, with as many samples each.

    Attributes:
        name: Name of the base, a key of `NAMES`.
        model: The model.
        selection, report: Images to choose sigma on, and to judge on.
        sigmas: Standard deviations of the noise, of which each way of smoothing takes its own best for each measure: at
            one sigma, halves would gain in mean radius what a larger sigma brings the whole.
        few: Number of the report images that mean radii are measured on.
    """

    name: str
    model: nn.Module
    selection: Images
    report: Images
    sigmas: tuple[float, ...]
    few: int

    def rows(self, kept: Path) -> list[Row]:
        """The rows of halves against the whole."""
        halves, whole = (self.best(way, "share", _share, self.report, kept) for way in ("halves", "whole"))
        effect = str(Effect.of(*(digits_of(_certified(report)) for report in (halves, whole))))
        shares = [100 * report.certified_accuracy(RADIUS) for report in (whole, halves)]
        share = self.row(f"images certified right at L2 {RADIUS:g}, %", halves, whole, shares, effect)
        few = self.report[0][: self.few], self.report[1][: self.few]
        halves, whole = (self.best(way, "mean", _mean_radius, few, kept) for way in ("halves", "whole"))
        pairs = zip(halves.images, whole.images, strict=True)
        effect = interval([1000 * (_radius_of(ours) - _radius_of(theirs)) for ours, theirs in pairs])
        means = [1000 * report.average_certified_radius for report in (whole, halves)]
        return [
            share,
            self.row("mean certified radius, thousandths of the pixels' range", halves, whole, means, effect),
        ]

    def row(
        self, measure: str, halves: CertificationReport, whole: CertificationReport, values: list[float], effect: str
    ) -> Row:
        """A row of a measure, whose values are that of the whole and that of the halves."""
        control = f"smoothing of the whole, {whole.n0 + whole.n} forwards each"
        sigmas = f"Sigma {halves.sigma:g} against {whole.sigma:g}, each the best of {len(self.sigmas)} on other images"
        note = f"{sigmas}; {len(halves.images)} images."
        return Row("dual randomized smoothing", NAMES[self.name], measure, control, values[0], values[1], effect, note)

    def best(self, way: str, kind: str, worth: Worth, images: Images, kept: Path) -> CertificationReport:
        """The report on `images` at the sigma that is worth the most on the selection images."""
        start = kept / f"{self.name}-{way}"
        tried = [
            WAYS[way](self.model, [self.selection], sigma, resume=f"{start}-selection-{sigma:g}.jsonl")
            for sigma in self.sigmas
        ]
        sigma = max(tried, key=worth).sigma
        return WAYS[way](self.model, [images], sigma, resume=f"{start}-{kind}-{sigma:g}.jsonl")


WAYS: dict[str, Callable[..., CertificationReport]] = {"whole": certify, "halves": certify_halves}


def _share(report: CertificationReport) -> tuple[float, float]:
    """Share of the images that are certified at `RADIUS`, and the mean radius, which decides between equal ones."""
    return report.certified_accuracy(RADIUS), report.average_certified_radius


def _mean_radius(report: CertificationReport) -> tuple[float, float]:
    """Mean radius."""
    return report.average_certified_radius, 0.0


def _certified(report: CertificationReport) -> list[bool]:
    return [image.predicted == image.label and image.radius >= RADIUS for image in report.images]


def _radius_of(image: Certificate) -> float:
    """Certified radius of an image; 0 where the prediction is wrong."""
    return image.radius if image.predicted == image.label else 0.0


@dataclass
class Tally:
    """What was counted of an image in all splits that tested it.

    Attributes:
        splits: Number of those splits.
        clean, attacked: Number of the sets that held the right class.
        size, attacked_size: Number of classes in the sets, added up.
    """

    splits: int = 0
    clean: int = 0
    attacked: int = 0
    size: int = 0
    attacked_size: int = 0

    def share(self, name: str) -> float:
        """One of the numbers, divided by that of the splits."""
        return float(getattr(self, name)) / self.splits


Tallies = dict[str, list[Tally]]
"""The tallies of the tested images, by method."""
Splits = Sequence[tuple[Sequence[int], Sequence[int]]]
"""Numbers of the images to calibrate on, and of those to test, for each split."""


@dataclass(frozen=True)
class Conformal:
    """A base on which sets of classes are measured.

    Attributes:
        name: Name of the base, a key of `NAMES`.
        model: The model.
        images: Images, to calibrate on and to test.
        splits: Numbers of the images to calibrate on, and of those to test, for each split.
        sigma, radius: Standard deviation of the noise, and L2 bound of the attack, in pixel units.
        steps, average: Number of steps of the attack, and of noisy copies that it averages over.
    """

    name: str
    model: nn.Module
    images: Images
    splits: Splits
    sigma: float
    radius: float
    steps: int
    average: int

    def rows(self, kept: Path) -> list[Row]:
        """The rows of each method against vanilla sets."""
        counted: Tallies = {}
        for noisy in (False, True):
            path = kept / f"{self.name}-sets-{'noisy' if noisy else 'plain'}.json"
            if not path.exists():
                measured = self.measure(noisy)
                path.write_text(json.dumps({name: [asdict(each) for each in part] for name, part in measured.items()}))
            counted |= {name: [Tally(**each) for each in part] for name, part in json.loads(path.read_text()).items()}
        return [row for method in METHODS[1:] for row in self._compared(method, counted)]

    def _compared(self, method: str, counted: Tallies) -> list[Row]:
        ours, theirs = ([each for each in counted[name] if each.splits] for name in (method, METHODS[0]))
        mean = {name: _mean(ours, name) for name in ("clean", "attacked", "size", "attacked_size")}
        splits = f"{len(self.splits)} splits" if len(self.splits) > 1 else "one split"
        note = (
            f"Alpha {ALPHA:g}, sigma {self.sigma:g}, {splits}, {len(ours)} images; clean images are covered in "
            f"{100 * mean['clean']:.1f} %, and attacked ones have {mean['attacked_size']:.2f} classes in a set."
        )
        common, found = (f"conformal sets, {method}", NAMES[self.name]), []
        for name, measure, times in (
            ("attacked", f"attacked images (L2 {self.radius:g}) whose set holds their class, %", 100),
            ("size", "classes in a set of a clean image", 1),
        ):
            changes = [times * (a.share(name) - b.share(name)) for a, b in zip(ours, theirs, strict=True)]
            effect = interval(changes)
            if len(self.splits) == 1 and name == "attacked":  # each image is covered or not
                effect = str(Effect.of(*(digits_of(each.attacked > 0 for each in part) for part in (ours, theirs))))
            found.append(
                Row(*common, measure, "vanilla", times * _mean(theirs, name), times * mean[name], effect, note)
            )
        return found

    def measure(self, noisy: bool) -> Tallies:
        """Count the sets of the methods with or without noise. The model is asked once for all that the splits need,
        since neither noise nor attack depends on the split."""
        smoothed, labels = Smoothed(self.model, None, None, self.sigma, 0, 1000), self.images[1]
        pixels = smoothed.place(self.images[0])
        tested = torch.tensor(sorted({i for _, test in self.splits for i in test}))
        average = self.average if noisy else 0
        moved = attacked(smoothed, pixels[tested], labels[tested], self.radius, self.steps, average, seed=0)
        chosen = torch.stack([_probabilities(smoothed, images, average, tested, CHOICE) for images in moved])
        rows = torch.full((len(pixels),), -1)
        rows[tested] = torch.arange(len(tested))
        rules = [Rule(method, ALPHA, self.sigma, self.radius, n=COPIES) for method in METHODS]
        found: Tallies = {}
        for copies in sorted({rule.copies for rule in rules if bool(rule.copies) == noisy}):
            own = own_scores("hps", _probabilities(smoothed, pixels, copies, torch.arange(len(pixels)), 0), labels)
            predicted = torch.stack([_probabilities(smoothed, images, copies, tested, 1) for images in moved])
            seen = Seen(own, predicted, chosen, rows)
            for rule in (each for each in rules if each.copies == copies):
                found[rule.method] = [Tally() for _ in labels]
                for number, (known, test) in enumerate(self.splits):
                    predictor = calibrated(rule, own[torch.tensor(list(known))], seed=number)
                    seen.count(predictor, labels, torch.tensor(list(test)), found[rule.method])
        return found


def _probabilities(smoothed: Smoothed, images: Tensor, copies: int, numbers: Tensor, part: int) -> Tensor:
    """Probabilities of the classes under the noise of images with these numbers, `[B, S, N]`."""
    with evaluating(smoothed.net.model):
        return smoothed.probabilities(images, copies, [seed_of(0, part, int(number)) for number in numbers])


@dataclass(frozen=True)
class Seen:
    """What a model says of images under noise.

    Attributes:
        own: Scores of the right classes of the clean images, that limits are found on, `[M, S]`.
        predicted: Probabilities of the tested images under other noise, by result of the attack, `[R, T, S, N]`; the
            first result is the clean image.
        chosen: The same under the noise by which the attack chooses between its results, `[R, T, A, N]`.
        rows: Place of each image among the tested ones, `[M]`; -1 for one that is not tested.
    """

    own: Tensor
    predicted: Tensor
    chosen: Tensor
    rows: Tensor

    def count(self, predictor: Calibrated, labels: Tensor, test: Tensor, tallies: list[Tally]) -> None:
        """Add the sets of the tested images of a split to their tallies."""
        rows = self.rows[test]
        harm = torch.stack([predictor.harm(result[rows], labels[test]) for result in self.chosen])
        worst = self.predicted[harm.argmax(0), rows]
        clean, changed = (predictor.inside(each) for each in (self.predicted[0, rows], worst))
        for place, index in enumerate(test.tolist()):
            tally, label = tallies[index], int(labels[index])
            tally.splits += 1
            tally.clean += int(clean[place, label])
            tally.attacked += int(changed[place, label])
            tally.size += int(clean[place].sum())
            tally.attacked_size += int(changed[place].sum())


def interval(changes: Sequence[float]) -> str:
    """Mean of paired differences with its 95 % interval, by the normal approximation, as :class:`Effect` writes it."""
    values = torch.tensor(changes, dtype=torch.float64)
    mean, half = float(values.mean()), 1.96 * float(values.std()) / math.sqrt(len(values))
    return f"{mean:+.1f} ({mean - half:+.1f} to {mean + half:+.1f})"


def _mean(tallies: Sequence[Tally], name: str) -> float:
    return sum(each.share(name) for each in tallies) / len(tallies)


def _joined(images: Callable[[str, int], Images], selection: int, report: int) -> Images:
    """Selection images and report images, one after the other."""
    first, second = images("selection", selection), images("report", report)
    return torch.cat((first[0], second[0])), torch.cat((first[1], second[1]))


def _random_splits(count: int) -> Splits:
    """Random halves of the images, to calibrate on and to test."""
    orders = [torch.randperm(count, generator=torch.Generator().manual_seed(i)).tolist() for i in range(SPLITS)]
    return [(order[: count // 2], order[count // 2 :]) for order in orders]
