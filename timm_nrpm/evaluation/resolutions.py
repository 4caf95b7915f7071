"""Accuracy on images of low resolution, which are enlarged again to the size that the model takes.

Relative robustness and its weighted aggregate follow LR0.FM (Pathak et al., arXiv 2502.03950).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_nrpm.checks import check_integer, check_number
from timm_nrpm.data.images import check_batch, check_images, check_labels, count_of
from timm_nrpm.evaluation.corruptions import right_on
from timm_nrpm.evaluation.intervals import exact
from timm_nrpm.evaluation.trials import Effect, digits_of
from timm_nrpm.jobs.progress import progress_bar
from timm_nrpm.models.modes import evaluating
from timm_nrpm.nn.wrappers import subject_of

SIZES = (16, 32, 64, 128)
"""Sizes of LR0.FM: numbers of pixels of the shorter side."""

ALPHA = 200.0
"""How fast a robustness near chance is discounted, see :attr:`ResolutionReport.trust`."""


@dataclass(frozen=True)
class ResolutionReport:
    """Accuracy of a model by the size that its images were reduced to.

    Attributes:
        correct: A digit for each image, 1 where the model is right at full size.
        reduced: The same on the same images by size, the number of pixels of the shorter side that they were reduced
            to.
        classes: Number of classes of the model; chance is 1 / `classes`.
        alpha: Rate of :attr:`trust`.

    Example:
        >>> report = evaluate_resolutions(model, loader, (2, 4))
        >>> report.accuracy, report.accuracy_at(4), report.relative(4), report.weighted(4)
        (1.0, 0.7, 0.7, 0.7)
        >>> ResolutionReport.from_json(report.to_json()) == report
        True
    """

    correct: str = field(repr=False)
    reduced: Mapping[int, str] = field(repr=False)
    classes: int
    alpha: float = ALPHA

    @property
    def samples(self) -> int:
        return len(self.correct)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Sizes in the order in which they were measured."""
        return tuple(self.reduced)

    @property
    def accuracy(self) -> float:
        """Accuracy at full size, from 0 to 1."""
        return self.correct.count("1") / self.samples

    def accuracy_at(self, size: int) -> float:
        """Return the accuracy at a size, from 0 to 1."""
        return self.reduced[size].count("1") / self.samples

    def effect(self, size: int) -> Effect:
        """Return the accuracy at a size less that at full size, paired image by image."""
        return Effect.of(self.reduced[size], self.correct)

    def relative(self, size: int) -> float | None:
        """Return the relative robustness: accuracy at a size over that at full size; None where the latter is 0."""
        return self.accuracy_at(size) / self.accuracy if self.accuracy else None

    @property
    def trust(self) -> float:
        """Factor from 0 to 1 by which LR0.FM discounts the robustness of a model that is near chance at full size,
        where low resolution has little to take: 1 - exp(-alpha * e^2), with e the accuracy above chance."""
        return 1 - math.exp(-self.alpha * max(0.0, self.accuracy - 1 / self.classes) ** 2)

    def weighted(self, size: int) -> float | None:
        """Return the improved relative robustness of LR0.FM: :meth:`relative` times :attr:`trust`."""
        relative = self.relative(size)
        return None if relative is None else relative * self.trust

    def __str__(self) -> str:
        low, high = exact(self.correct.count("1"), self.samples)
        lines = [
            f"{self.samples} images, at full size {100 * self.accuracy:.1f} % ({100 * low:.1f} to {100 * high:.1f})",
            f"{'size':>5}  {'accuracy, %':21}{'less full size, points':27}relative  weighted",
        ]
        for size in self.sizes:
            low, high = exact(self.reduced[size].count("1"), self.samples)
            share = f"{100 * self.accuracy_at(size):.1f} ({100 * low:.1f} to {100 * high:.1f})"
            ratios = (f"{'-' if ratio is None else f'{ratio:.3f}':>8}" for ratio in self._ratios(size))
            lines.append(f"{size:5}  {share:21}{self.effect(size)!s:27}{'  '.join(ratios)}")
        return "\n".join(lines)

    def _ratios(self, size: int) -> tuple[float | None, float | None]:
        return self.relative(size), self.weighted(size)

    def to_json(self) -> str:
        """Return the report as JSON, with the numbers that follow from the answers."""
        numbers = {
            "accuracy": self.accuracy,
            "accuracies": {size: self.accuracy_at(size) for size in self.sizes},
            "relative": {size: self.relative(size) for size in self.sizes},
            "weighted": {size: self.weighted(size) for size in self.sizes},
        }
        return json.dumps({**asdict(self), "numbers": numbers})

    @classmethod
    def from_json(cls, text: str) -> ResolutionReport:
        data = json.loads(text)
        reduced = {int(size): digits for size, digits in data["reduced"].items()}
        return cls(data["correct"], reduced, data["classes"], data["alpha"])


def aggregate(reports: Sequence[ResolutionReport], weights: Sequence[float] | None = None) -> dict[int, float | None]:
    """Aggregate the robustness of one model over several sets of images (the weighted aggregated robustness of LR0.FM).

    Args:
        reports: One report for each set of images, all with the same sizes.
        weights: Weight of each set, >= 0 and not all 0; by default all are equal. LR0.FM weights its sets such that
            they all count in the ranking of models, and publishes the weights with its code.

    Returns:
        The weighted mean of :meth:`ResolutionReport.weighted` by size; None where one of them is.

    Raises:
        ValueError: There are no reports, their sizes differ, or the weights are not one such number for each.

    Example:
        >>> reports = [evaluate_resolutions(model, loader, (4,)), evaluate_resolutions(plain, loader, (4,))]
        >>> aggregate(reports, (1, 3))
        {4: 0.7}
    """
    if not reports or len({report.sizes for report in reports}) > 1:
        raise ValueError(
            f"The sizes of the {len(reports)} reports are {[report.sizes for report in reports]}: give one report at "
            "least, and all with the same sizes."
        )
    shares = [check_number("weight", weight, least=0) for weight in weights or [1.0] * len(reports)]
    if len(shares) != len(reports) or not sum(shares):
        raise ValueError(f"weights={shares} for {len(reports)} reports: give one for each, not all of them 0.")
    found: dict[int, float | None] = {}
    for size in reports[0].sizes:
        values = [value for report in reports if (value := report.weighted(size)) is not None]
        whole = len(values) == len(reports)
        found[size] = sum(w * v for w, v in zip(shares, values, strict=True)) / sum(shares) if whole else None
    return found


def reduce(pixels: Tensor, size: int) -> Tensor:
    """Return images reduced to a size and enlarged again to their own, both by bicubic interpolation that averages
    where it reduces, as LR0.FM does.

    Args:
        pixels: Images `[B, C, H, W]` in [0, 1].
        size: Number of pixels of the shorter side in between, from 1 to the shorter of H and W.

    Returns:
        Pixels `[B, C, H, W]` in [0, 1].

    Raises:
        ValueError: The images are not such images, or `size` is larger than they are.

    Example:
        >>> reduce(pixels, 4).shape == pixels.shape
        True
    """
    pixels = check_images(pixels)
    height, width = pixels.shape[2:]
    size = check_integer("size", size, least=1, most=min(height, width))
    between = [max(1, round(side * size / min(height, width))) for side in (height, width)]
    for sides in (between, [height, width]):
        pixels = F.interpolate(pixels, sides, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
    return pixels


@torch.no_grad()
def evaluate_resolutions(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    sizes: Sequence[int] | None = None,
    *,
    alpha: float = ALPHA,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    progress: bool = False,
) -> ResolutionReport:
    """Measure accuracy on images that were reduced to each size and enlarged again (LR0.FM, arXiv 2502.03950).

    LR0.FM measures the zero-shot accuracy of vision-language models; here the same images go to a classifier. The
    modes, gradient flags and statistics of the model are left unchanged.

    Args:
        model: Classifier of normalised images, or a wrapper of one.
        loader: Batches of pixels `[B, C, H, W]` in [0, 1], of the size that the model takes, and labels `[B]`.
        sizes: Numbers of pixels of the shorter side, each below that of the images; by default those of 16, 32, 64 and
            128 that are.
        alpha: Rate at which the robustness of a model near chance is discounted, > 0.
        mean, std: The model's normalisation, one number for each channel; by default timm's for this model, and none
            for a model that is not timm's.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: A size is not below that of the images, pixels are outside [0, 1], labels are not classes of the
            model, or the loader is empty.

    Example:
        >>> print(evaluate_resolutions(model, loader, (2, 4)))
        32 images, at full size 100.0 % (89.1 to 100.0)
         size  accuracy, %          less full size, points     relative  weighted
            2  ...
            4  ...
    """
    alpha = check_number("alpha", alpha, above=0)
    net = subject_of(model, mean, std).on_pixels()
    wanted = None if sizes is None else _checked(sizes)
    correct: list[bool] = []
    reduced: dict[int, list[bool]] = {}
    classes = 0
    with evaluating(net), progress_bar(progress) as bar:
        task = bar.add_task("Reducing", total=count_of(loader))
        for batch in loader:
            pixels, labels = check_batch(batch)
            labels = check_labels(labels, count=len(pixels))
            if not correct:
                wanted = _below(min(pixels.shape[2:]), wanted)
                reduced = {size: [] for size in wanted}
                classes = net(pixels[:1].to(net.mean.device, torch.float32)).shape[1]
            _below(min(pixels.shape[2:]), wanted)
            correct += right_on(net, pixels, labels)
            for size, right in reduced.items():
                right += right_on(net, reduce(pixels.float(), size), labels)
            bar.advance(task)
    if not correct:
        raise ValueError("The loader gave no images: there is nothing to evaluate.")
    return ResolutionReport(digits_of(correct), {s: digits_of(right) for s, right in reduced.items()}, classes, alpha)


def _checked(sizes: Sequence[int]) -> tuple[int, ...]:
    """The sizes as integers, if there are any and all of them differ."""
    whole = tuple(check_integer("size", size, least=1) for size in sizes)
    if not whole or len(set(whole)) < len(whole):
        raise ValueError(f"sizes={tuple(sizes)!r}: give at least one number of pixels, each once.")
    return whole


def _below(side: int, sizes: tuple[int, ...] | None) -> tuple[int, ...]:
    """The sizes, by default those of LR0.FM, if they are below the shorter side of the images."""
    chosen = tuple(size for size in SIZES if size < side) if sizes is None else sizes
    if not chosen or max(chosen) >= side:
        raise ValueError(
            f"The images have {side} pixels on their shorter side, and sizes={sizes or SIZES}: give sizes below {side}."
        )
    return chosen
