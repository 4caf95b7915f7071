"""One question: a model, a threat, the images it is judged on, and how every candidate is measured."""

from __future__ import annotations

import hashlib
import json
import re
import statistics
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias, TypedDict

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from timm_nrpm.attacks.threats import Threat
from timm_nrpm.config import NRPMConfig
from timm_nrpm.data.images import check_batch, check_labels
from timm_nrpm.evaluation.corruptions import right_on
from timm_nrpm.evaluation.evaluate import evaluate, first_images
from timm_nrpm.evaluation.report import RobustnessReport
from timm_nrpm.evaluation.shifts import Shift
from timm_nrpm.evaluation.stopwatch import clock_of_work
from timm_nrpm.evaluation.trials import Bounds, Kept, digits_of
from timm_nrpm.models.calibration import calibrate_
from timm_nrpm.models.reprogramming import reprogram_, reprogrammed_layers
from timm_nrpm.nn.ensemble import Ensemble
from timm_nrpm.nn.pixel_model import PixelModel
from timm_nrpm.nn.wrappers import copied, subject_of

Danger: TypeAlias = Threat | Shift
"""What a model is to withstand: an attacker, or a shift of its images."""


class Given(TypedDict):
    """A normalisation as arguments; None for that in timm's config of the model."""

    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None


TIMED = 32
"""Largest number of images in a batch whose latency is measured."""

TURNS = 3
"""Number of turns in which the latencies of two models are measured."""


def file_name(words: str) -> str:
    """A name of files, from words."""
    return re.sub(r"[^\w.]+", "-", words).strip("-")


@dataclass(frozen=True)
class Part:
    """Images of one purpose, in memory.

    Attributes:
        pixels, labels: Images `[N, C, H, W]` in [0, 1] and their classes `[N]`.
        batch_size: Number of images in a batch.
    """

    pixels: Tensor
    labels: Tensor
    batch_size: int

    @classmethod
    def of(cls, loader: Iterable[Any]) -> Part:
        """All images of a loader.

        Raises:
            ValueError: The loader is empty, or gives no pairs of pixels in [0, 1] and labels.
        """
        batches = []
        for batch in loader:
            pixels, labels = check_batch(batch)
            if labels.ndim == 1 and len(labels) and not labels.is_floating_point() and int(labels.min()) < 0:
                raise ValueError(
                    "The loader gives images without a label: advice has to count right answers. Without labels there "
                    "are adapt_(model, images) and calibrate_(model, images), which look at none."
                )
            batches.append((pixels.float(), check_labels(labels, count=len(pixels))))
        if not batches:
            raise ValueError("The loader gave no images: there is nothing to advise on.")
        pixels, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
        return cls(pixels, labels, len(batches[0][0]))

    def batches(self) -> list[tuple[Tensor, Tensor]]:
        """The images in batches."""
        parts = (part.split(self.batch_size) for part in (self.pixels, self.labels))
        return list(zip(*parts, strict=True))

    def chosen(self, rows: Tensor) -> Part:
        """Some of the images."""
        return Part(self.pixels[rows], self.labels[rows], self.batch_size)

    def digests(self) -> list[bytes]:
        """A hash of each image, by which equal ones are found."""
        return [hashlib.sha256(pixels.numpy().tobytes()).digest() for pixels in self.pixels.contiguous()]


def _has_estimate(model: nn.Module) -> bool:
    """Whether a model, and not one among others, has a layer that is not plain."""
    layers = reprogrammed_layers(model).values()
    return not isinstance(model, Ensemble) and not all(layer.is_plain() for layer in layers)


class Study:
    """A model, a danger and images, for which candidates are made and measured.

    Args:
        model: A reprogrammed model with every lambda at 1; it is not changed.
        danger: What candidates are to withstand.
        selection: Images on which candidates are chosen.
        report: Images on which nothing is chosen.
        training: Other images, with labels, that candidates are calibrated and tuned on; None where there are none.
        bounds: What an advised model may cost.
        effort: How long the adaptive suite of attacks tries.
        seed: Seed of everything random.
        folder: Folder of attacks and runs that a stopped study goes on from.
        mean, std: The model's normalisation, as for :func:`timm_nrpm.evaluate`.
    """

    def __init__(
        self,
        model: nn.Module,
        danger: Danger,
        selection: Part,
        report: Part,
        training: DataLoader[Any] | None,
        bounds: Bounds,
        effort: str,
        seed: int,
        folder: Path,
        mean: tuple[float, ...] | None,
        std: tuple[float, ...] | None,
    ) -> None:
        self.model, self.danger, self.bounds, self.effort, self.seed = model, danger, bounds, effort, seed
        self.parts = {"selection": selection, "report": report}
        self.training, self.folder = training, folder
        self.mean, self.std = mean, std
        self.calibration = first_images(selection.batches() if training is None else training)
        self.quick_seconds = 0.0  # of the last quick attacks
        self._reports: dict[str, RobustnessReport] = {}
        self._shifted: dict[str, Tensor] = {}
        self._last: tuple[NRPMConfig, nn.Module] | None = None  # of the last model that was calibrated

    def fresh(self, config: NRPMConfig | None = None) -> nn.Module:
        """A copy of the model, reprogrammed anew and calibrated if a config is given."""
        if config is None:
            return copied(self.model).eval()
        if self._last is None or self._last[0] != config:
            model = reprogram_(copied(self.model), config)
            self._last = config, calibrate_(model, self.calibration, mean=self.mean, std=self.std).eval()
        return copied(self._last[1])

    def fresh_seconds(self, config: NRPMConfig) -> float:
        """Expected time of calibrating a reprogrammed model and of running it on the images of the selection."""
        images = sum(map(len, self.calibration)) + 3 * len(self.parts["selection"].labels)
        config = replace(config, standardize=False)  # as fast, and needs no calibration
        return self.forward_seconds(reprogram_(copied(self.model), config)) * images

    def forward_seconds(self, model: nn.Module) -> float:
        """Time of a forward of one image, in a batch of some."""
        net, seconds = self.on_pixels(model), 0.0
        batch = self.parts["selection"].pixels[: TIMED // 4].to(net.mean.device)
        with torch.no_grad():
            for _ in range(2):  # the first one warms up
                start = time.perf_counter()
                net(batch).cpu()
                seconds = time.perf_counter() - start
        return seconds / len(batch)

    def shifted(self, part: str) -> Tensor:
        """The images of the selection or the report as an unattacked model meets them, `[N, C, H, W]`."""
        pixels = self.parts[part].pixels
        if isinstance(self.danger, Threat):
            return pixels
        if part not in self._shifted:
            first = 0 if part == "report" else len(self.parts["report"].pixels)  # no two images are corrupted alike
            self._shifted[part] = self.danger.applied(pixels, seed=self.seed, first=first)
        return self._shifted[part]

    def right(self, model: nn.Module, pixels: Tensor, part: str) -> str:
        """A digit for each image, 1 where the model is right."""
        part_of, net = self.parts[part], self.on_pixels(model)
        batches = zip(pixels.split(part_of.batch_size), part_of.labels.split(part_of.batch_size), strict=True)
        with torch.no_grad():
            right = [each for batch, labels in batches for each in right_on(net, batch, labels)]
        return digits_of(right)

    def kept(self, model: nn.Module, clean: str, part: str, name: str, plain: nn.Module | None = None) -> Kept:
        """The images that a candidate is right on.

        Args:
            model: The candidate.
            clean: What it is right on without the danger, from :meth:`right`.
            part: `"selection"` or `"report"`.
            name: Name of the candidate, under which its attacks are found again.
            plain: The model it was made from, if its weights were trained. Where the candidate has an estimate, whose
                own gradient misleads, attacks follow it too; anything else is attacked as by anyone who evaluates it.
        """
        if isinstance(self.danger, Shift):
            return Kept(clean, self.right(model, self.shifted(part), part))
        report = evaluate(
            model,
            self.parts[part].batches(),
            self.danger,
            effort=self.effort,
            seed=self.seed + (part == "selection"),
            base=plain if _has_estimate(model) else None,
            control=False,
            **self.normalisation(model),
            resume=self.folder / f"{file_name(name)}-{part}.jsonl",
        )
        if part == "report":
            self._reports[name] = report
            (self.folder / f"{file_name(name)}.json").write_text(report.to_json() + "\n", encoding="utf-8")
        return Kept(digits_of(report.correct), digits_of(report.survivors))

    def most(self, model: nn.Module) -> float | None:
        """Largest share of the selection images that a candidate can keep, by quick attacks; None without attacks."""
        if isinstance(self.danger, Shift):
            return None
        images, start = self.parts["selection"].batches(), time.perf_counter()
        report = evaluate(
            model, images, self.danger, "quick", seed=self.seed + 1, control=False, **self.normalisation(model)
        )
        self.quick_seconds = time.perf_counter() - start
        return report.worst_case

    def report_of(self, name: str) -> RobustnessReport | None:
        """The report of a candidate on the report images; None for a shift, or if there is none."""
        path = self.folder / f"{file_name(name)}.json"
        if name not in self._reports and path.exists():
            self._reports[name] = RobustnessReport.from_dict(json.loads(path.read_text(encoding="utf-8")))
        return self._reports.get(name)

    def slowdown(self, model: nn.Module) -> float:
        """Latency of a candidate over that of the model as it is, measured by turns."""
        same = not isinstance(model, Ensemble)
        if same and all(layer.is_plain() for layer in reprogrammed_layers(model).values()):
            return 1.0  # the same operations
        batch = self.parts["selection"].pixels[:TIMED]
        nets = [self.on_pixels(each) for each in (self.model, model)]
        seconds: list[list[float]] = [[], []]
        clock = clock_of_work()
        with torch.no_grad():
            for turn in range(TURNS + 1):
                for net, times in zip(nets, seconds, strict=True):
                    start = clock()
                    net(batch.to(net.mean.device)).cpu()
                    times += [clock() - start] * (turn > 0)  # the first turn warms up
        plain, ours = map(statistics.median, seconds)
        return ours / plain

    def step_seconds(self, model: nn.Module) -> float:
        """Seconds of a forward and a backward of a batch of training images."""
        assert self.training is not None
        pixels, _ = next(iter(self.training))
        net = self.on_pixels(copied(model))
        seconds = 0.0
        for _ in range(2):  # the first one warms up
            start = time.perf_counter()
            net(pixels.float().to(net.mean.device).requires_grad_()).sum().backward()
            seconds = time.perf_counter() - start
        return seconds

    def on_pixels(self, model: nn.Module) -> PixelModel:
        """A model as one on pixels in [0, 1], in evaluation mode."""
        return subject_of(model, **self.normalisation(model)).on_pixels().eval()

    def normalisation(self, model: nn.Module) -> Given:
        """The normalisation of a candidate: the study's, or that of its members, which an ensemble has inside."""
        inside = isinstance(model, Ensemble)
        return {"mean": None if inside else self.mean, "std": None if inside else self.std}
