"""How often sets of classes hold the right one, and how large they are, with and without an attack."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from timm_nrpm.attacks.apgd import climb
from timm_nrpm.attacks.gradients import LOSSES
from timm_nrpm.attacks.threats import Threat
from timm_nrpm.checks import check_choice, check_integer
from timm_nrpm.data.images import check_batch, check_labels, count_of
from timm_nrpm.data.ordering import seed_of
from timm_nrpm.evaluation.conformal import SetPredictor, prediction_seeds
from timm_nrpm.evaluation.intervals import exact
from timm_nrpm.evaluation.sets import members
from timm_nrpm.evaluation.smoothed import Smoothed, noise_of
from timm_nrpm.jobs.progress import progress_bar
from timm_nrpm.models.modes import attackable, evaluating

START, ATTACK, CHOICE = 2, 3, 4
"""Parts of the seeds of an attack's start, of its noise, and of the noise that chooses between its results; those of
calibration and prediction are 0 and 1. The attack knows no noise of the prediction, as the guarantees ask."""
PARTS = ("clean", "attacked")


@dataclass(frozen=True)
class SetRow:
    """The sets of one image.

    Attributes:
        label: The right class.
        clean: Classes of the image's set, ascending.
        attacked: Classes of the set of the attacked image; None without an attack.
    """

    label: int
    clean: tuple[int, ...]
    attacked: tuple[int, ...] | None = None

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> SetRow:
        attacked = data["attacked"]
        return cls(data["label"], tuple(data["clean"]), None if attacked is None else tuple(attacked))


@dataclass(frozen=True)
class SetReport:
    """The sets of a predictor on images that it was not calibrated on.

    Attributes:
        method: Method of the sets.
        guarantee: What holds of them, in words.
        alpha: Share of the sets that may miss the right class.
        radius: Bound of the attack, an L2 norm in pixel units.
        classes: Number of classes of the model.
        steps, average: Number of steps of the attack, and of noisy copies that it averages over.
        seed: Seed of the noise and of the attack.
        images: Sets of the images, in the order of the loader.
    """

    method: str
    guarantee: str
    alpha: float
    radius: float
    classes: int
    steps: int
    average: int
    seed: int
    images: tuple[SetRow, ...] = field(repr=False)

    def covered(self, part: str = "clean") -> tuple[bool, ...]:
        """Return whether each set holds the right class; `part` is `"clean"` or `"attacked"`."""
        return tuple(image.label in each for image, each in zip(self.images, self._sets(part), strict=True))

    def coverage(self, part: str = "clean") -> float:
        """Return the share of the sets that hold the right class, from 0 to 1."""
        return sum(self.covered(part)) / len(self.images)

    def coverage_interval(self, part: str = "clean") -> tuple[float, float]:
        """Return the 95 % confidence interval of the coverage (the exact interval of Clopper and Pearson, 1934)."""
        return exact(sum(self.covered(part)), len(self.images))

    def sizes(self, part: str = "clean") -> tuple[int, ...]:
        """Return the number of classes in each set."""
        return tuple(map(len, self._sets(part)))

    def size(self, part: str = "clean") -> float:
        """Return the mean number of classes in a set."""
        return sum(self.sizes(part)) / len(self.images)

    def size_interval(self, part: str = "clean") -> tuple[float, float]:
        """Return the 95 % confidence interval of the mean size, by the normal approximation."""
        sizes = torch.tensor(self.sizes(part), dtype=torch.float64)
        half = 1.96 * float(sizes.var(correction=1 if len(sizes) > 1 else 0).sqrt()) / math.sqrt(len(sizes))
        return self.size(part) - half, self.size(part) + half

    def __str__(self) -> str:
        shown = f"{self.method}, {len(self.images)} images: {self._described('clean')}"
        if self.images[0].attacked is None:
            return shown
        return f"{shown}; attacked within L2 {self.radius:g}: {self._described('attacked')}"

    def _described(self, part: str) -> str:
        low, high = (100 * share for share in self.coverage_interval(part))
        least, most = self.size_interval(part)
        right = f"{100 * self.coverage(part):.1f} % hold the right class ({low:.1f} to {high:.1f})"
        return f"{right}, {self.size(part):.2f} of {self.classes} classes in a set ({least:.2f} to {most:.2f})"

    def _sets(self, part: str) -> list[tuple[int, ...]]:
        found = [getattr(image, check_choice("part", part, PARTS)) for image in self.images]
        if found[0] is None:
            raise ValueError("The sets were measured without an attack: give evaluate_sets a number of steps above 0.")
        return found

    def to_json(self) -> str:
        return json.dumps(asdict(self), allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> SetReport:
        data = json.loads(text)
        return cls(**{**data, "images": tuple(map(SetRow.from_dict, data["images"]))})


def evaluate_sets(
    predictor: SetPredictor,
    loader: Iterable[tuple[Tensor, Tensor]],
    *,
    steps: int = 20,
    average: int = 16,
    seed: int = 0,
    progress: bool = False,
) -> SetReport:
    """Measure coverage and size of the sets on images, and under an attack within the predictor's radius.

    The attack knows the model, the labels and the limit of the sets, but not the noise of the prediction. It climbs by
    Auto-PGD the losses of the mean probabilities over `average` noisy copies (Salman et al., arXiv 1906.04584, section
    3.1), and of its results and the clean image keeps what harms the most under other noise.

    Args:
        predictor: Predictor of sets, from :func:`timm_nrpm.evaluation.conformal.conformal`.
        loader: Batches of pixels `[B, C, H, W]` in [0, 1] and labels `[B]`, of images that it was not calibrated on.
        steps: Number of steps of each ascent, >= 0; 0 for no attack, as there is none within a radius of 0.
        average: Number of noisy copies of the attack, >= 1; `"vanilla"` has no noise to average over.
        seed: Seed of the noise and of the attack, >= 0.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: A setting is outside its range, pixels are outside [0, 1], labels are not classes of the model, or
            the loader is empty.

    Example:
        >>> predictor = timm_nrpm.conformal.conformal(model, loader, alpha=0.2, sigma=0.25, radius=0.125)
        >>> print(evaluate_sets(predictor, loader, steps=2, average=2))
        one-sample, 32 images: ... % hold the right class (... to ...), ... of 10 classes in a set (... to ...); ...
    """
    steps, average = check_integer("steps", steps, least=0), check_integer("average", average, least=1)
    seed, rule, rows = check_integer("seed", seed, least=0), predictor.calibration.rule, list[SetRow]()
    steps, classes = steps if rule.radius else 0, 0
    with progress_bar(progress) as bar, torch.random.fork_rng(devices=[]):
        for batch in bar.track(loader, count_of(loader), description="Evaluating sets"):
            pixels, labels = check_batch(batch)
            pixels = predictor.smoothed.place(pixels)
            seeds = prediction_seeds(seed, len(rows), len(pixels))
            found = predictor.calibration.inside(predictor.probabilities(pixels, seeds))
            classes = found.shape[1]
            labels = check_labels(labels, classes, count=len(pixels)).cpu()
            parts: list[Sequence[tuple[int, ...] | None]] = [members(found), [None] * len(pixels)]
            if steps:
                copies = _copies(predictor, average)
                results = attacked(predictor.smoothed, pixels, labels, rule.radius, steps, copies, seed, len(rows))
                worst = most_harmful(predictor, results, labels, average, seed, len(rows))
                parts[1] = members(predictor.calibration.inside(predictor.probabilities(worst, seeds)))
            rows += [SetRow(*row) for row in zip(labels.tolist(), *parts, strict=True)]
    if not rows:
        raise ValueError("The loader gave no images: there is nothing to measure.")
    return SetReport(
        rule.method, predictor.guarantee, rule.alpha, rule.radius, classes, steps, average, seed, tuple(rows)
    )


def attacked(
    smoothed: Smoothed,
    pixels: Tensor,
    labels: Tensor,
    radius: float,
    steps: int,
    copies: int,
    seed: int,
    start: int = 0,
) -> list[Tensor]:
    """Return candidates for the most harmful images within an L2 radius, each `[B, C, H, W]`: the clean images, and one
    ascent for each loss of the mean probabilities over noisy copies.

    Args:
        smoothed: Model under noise.
        pixels: Images `[B, C, H, W]` in [0, 1], placed by :meth:`Smoothed.place`.
        labels: Right classes `[B]`.
        radius: Largest L2 norm of the change, in pixel units, above 0.
        steps: Number of steps of each ascent.
        copies: Number of noisy copies, the same in all steps; 0 for the image without noise.
        seed, start: Seed of the attack, and number of the first image, on which its noise depends too.
    """
    threat, found = Threat("L2", radius), [pixels]
    labels = labels.to(pixels.device)
    many = max(1, smoothed.batch_size // max(copies, 1))  # images whose copies fill a forward
    with attackable(smoothed.net.model):
        for loss in LOSSES:
            climbed = []
            for first in range(0, len(pixels), many):
                images = pixels[first : first + many]
                numbers = range(start + first, start + first + len(images))
                follow = _MeanProbabilities(smoothed, images, copies, [seed_of(seed, ATTACK, each) for each in numbers])
                starts = [seed_of(seed, START, each) for each in numbers]
                result, _ = climb(
                    follow, images, labels[first : first + many], threat, starts, steps=steps, loss=loss, fooled=False
                )
                climbed.append(result)
            found.append(torch.cat(climbed))
    return found


def most_harmful(
    predictor: SetPredictor, results: Sequence[Tensor], labels: Tensor, average: int, seed: int, start: int = 0
) -> Tensor:
    """Return the images `[B, C, H, W]` that make the predictor's sets miss the labels the most, of several results.

    Args:
        predictor: Predictor of sets.
        results: Images `[B, C, H, W]` of each attack.
        labels: Right classes `[B]`, on the CPU.
        average, seed, start: The same as in :func:`attacked`; the noise is other noise.
    """
    seeds = [seed_of(seed, CHOICE, number) for number in range(start, start + len(labels))]
    copies, harm = _copies(predictor, average), []
    with evaluating(predictor.smoothed.net.model):
        for images in results:
            probabilities = predictor.smoothed.probabilities(images, copies, seeds)
            harm.append(predictor.calibration.harm(probabilities, labels))
    best = torch.stack(harm).argmax(0).to(results[0].device)
    return torch.stack(list(results))[best, torch.arange(len(labels), device=best.device)]


class _MeanProbabilities:
    """The logarithms of the mean probabilities of images' noisy copies, as logits `[B, N]` that an attack climbs."""

    def __init__(self, smoothed: Smoothed, images: Tensor, copies: int, seeds: Sequence[int]) -> None:
        self.net, self.copies = smoothed.net, max(copies, 1)
        self.noise = torch.zeros_like(images).unsqueeze(1)
        if copies:
            drawn = [torch.stack(list(islice(noise_of(images[0], seed), copies))) for seed in seeds]
            self.noise = smoothed.sigma * torch.stack(drawn).to(images)

    def __call__(self, pixels: Tensor) -> Tensor:
        noisy = (pixels.unsqueeze(1) + self.noise).flatten(0, 1)
        logarithms = self.net(noisy).log_softmax(1).view(len(pixels), self.copies, -1)
        return logarithms.logsumexp(1) - math.log(self.copies)


def _copies(predictor: SetPredictor, average: int) -> int:
    """Number of noisy copies of an attack on a predictor; 0 where it has no noise."""
    return average if predictor.calibration.rule.copies else 0
