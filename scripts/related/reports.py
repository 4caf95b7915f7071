"""What else a report says: classes, moving crops, low resolutions and embeddings, of robust and natural models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import torch.nn.functional as F
from bases import Bases, Images
from row import Row
from timm.data import create_transform
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset
from torchvision.datasets import ImageFolder

from timm_nrpm.attacks.threats import Threat
from timm_nrpm.evaluation.disparity import Difference, by_class
from timm_nrpm.evaluation.embedding import EmbeddingReport, embedding_change
from timm_nrpm.evaluation.evaluate import evaluate
from timm_nrpm.evaluation.intervals import of_mean
from timm_nrpm.evaluation.report import RobustnessReport
from timm_nrpm.evaluation.resolutions import ResolutionReport, evaluate_resolutions
from timm_nrpm.evaluation.shift_report import ShiftReport
from timm_nrpm.evaluation.translations import evaluate_shifts
from timm_nrpm.evaluation.trials import Effect

CLASSIFIED, IMAGES, EMBEDDED, PHOTOS = 1000, 500, 200, 100
"""Number of report images of CIFAR-10 whose classes are compared, of those that are moved and reduced, of those whose
embedding is attacked, and of photos."""

THREAT = Threat("Linf", 2 / 255)
NARROW = "narrow ResNet-18, CIFAR-10"
LITE = "tf_efficientnet_lite0, photos"
NATURAL, ROBUST = "naturally trained", "adversarially trained"
LARGER = 256
"""Side of the photos in which crops of 224 move; the scale is that of timm's evaluation."""


def rows(bases: Bases, kept: Path) -> list[Row]:
    """Every effect; what was measured before is read from `kept`."""
    return [*_classes(bases, kept), *_shifts(bases, kept), *_resolutions(bases, kept), *_embeddings(bases, kept)]


def _classes(bases: Bases, kept: Path) -> list[Row]:
    """The worst class and the gap, of the adversarially trained model against the naturally trained one."""
    images = bases.cifar("report", CLASSIFIED)

    def measured(robust: bool) -> RobustnessReport:
        def measure() -> str:
            return evaluate(bases.narrow(robust=robust), _batches(images), THREAT, "quick", control=False).to_json()

        return RobustnessReport.from_json(_once(kept / f"classes-{_name(robust)}.json", measure))

    natural, robust = measured(False), measured(True)
    found = []
    for where, ours, theirs in (
        ("clean", replace(robust, attacks=()), replace(natural, attacks=())),
        (f"{THREAT}, suite quick", robust, natural),
    ):
        classes = by_class(replace(ours, control=theirs))
        if classes is None or classes.control is None:
            raise ValueError(f"Of {ours.samples} images, too few are of the same class: measure more.")
        kept_ours, kept_theirs = classes.kept, classes.control.kept
        for measure, before, after, change in (
            ("worst class", kept_theirs.worst.share, kept_ours.worst.share, classes.worst_change),
            ("gap between classes", kept_theirs.gap, kept_ours.gap, classes.gap_change),
        ):
            note = (
                f"The worst class is {kept_theirs.worst.label} before and {kept_ours.worst.label} after; the "
                f"permutation test of the gap gives p = {kept_theirs.p_value:.2g} and {kept_ours.p_value:.2g}."
            )
            told = f"{measure}, {where}, {ours.samples} images, points"
            found.append(Row(ROBUST, NARROW, told, NATURAL, 100 * before, 100 * after, str(change), note))
    return found


def _shifts(bases: Bases, kept: Path) -> list[Row]:
    """Crop selection against the crop in the middle."""
    pixels, labels = bases.cifar("report", IMAGES)
    padded = (F.pad(pixels, (4, 4, 4, 4), mode="reflect"), labels)
    note = "The images are padded by 4 pixels of reflection."
    cases: list[tuple[str, str, str, Callable[[], nn.Module], Callable[[], Images]]] = [
        (f"{NARROW}, {NATURAL}", "response", note, lambda: bases.narrow(robust=False), lambda: padded),
        (f"{NARROW}, {NATURAL}", "confidence", note, lambda: bases.narrow(robust=False), lambda: padded),
        (f"{NARROW}, {ROBUST}", "response", note, lambda: bases.narrow(robust=True), lambda: padded),
        (LITE, "response", "", bases.efficientnet, lambda: _larger(bases)),
    ]
    found = []
    for number, (base, rule, note, model, images) in enumerate(cases):

        def measure(
            model: Callable[[], nn.Module] = model, images: Callable[[], Images] = images, rule: str = rule
        ) -> str:
            return evaluate_shifts(model(), _batches(images()), rule=rule).to_json()

        report = ShiftReport.from_json(_once(kept / f"shifts-{number}.json", measure))
        value, low, high = report.consistency_effect
        for told, before, after, effect in (
            ("accuracy", report.middle.accuracy, report.selected.accuracy, str(report.accuracy_effect)),
            (
                "one-pixel consistency",
                report.middle.consistency,
                report.selected.consistency,
                f"{100 * value:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})",
            ),
            (
                "worst case over moves by 1",
                report.middle.worst_case,
                report.selected.worst_case,
                str(report.worst_effect),
            ),
        ):
            method = f"crop selection by {rule}, search {report.search}"
            measured = f"{told}, {report.samples} images, %"
            found.append(Row(method, base, measured, "the middle crop", 100 * before, 100 * after, effect, note))
    return found


def _resolutions(bases: Bases, kept: Path) -> list[Row]:
    """Low resolution against full size, and the adversarially trained model against the naturally trained one."""
    images = bases.cifar("report", IMAGES)

    def narrow(robust: bool) -> ResolutionReport:
        def measure() -> str:
            return evaluate_resolutions(bases.narrow(robust=robust), _batches(images), (8, 16, 24)).to_json()

        return ResolutionReport.from_json(_once(kept / f"resolutions-{_name(robust)}.json", measure))

    def photos() -> str:
        pixels, labels = bases.photos()
        return evaluate_resolutions(bases.efficientnet(), _batches((pixels[:PHOTOS], labels[:PHOTOS]))).to_json()

    found = []
    lite = ResolutionReport.from_json(_once(kept / "resolutions-photos.json", photos))
    for size in lite.sizes:
        note = f"Relative robustness {_ratio(lite.relative(size))}, weighted {_ratio(lite.weighted(size))}."
        told, shares = f"accuracy, {lite.samples} images, %", (100 * lite.accuracy, 100 * lite.accuracy_at(size))
        found.append(Row(f"{size} pixels", LITE, told, "224 pixels", *shares, str(lite.effect(size)), note))
    natural, robust = narrow(False), narrow(True)
    for size in natural.sizes:
        shares = 100 * natural.accuracy_at(size), 100 * robust.accuracy_at(size)
        effect = Effect.of(robust.reduced[size], natural.reduced[size])
        note = (
            f"At full size {100 * natural.accuracy:.1f} and {100 * robust.accuracy:.1f}; weighted relative robustness "
            f"{_ratio(natural.weighted(size))} and {_ratio(robust.weighted(size))}."
        )
        told = f"accuracy at {size} pixels, {natural.samples} images, %"
        found.append(Row(ROBUST, NARROW, told, NATURAL, *shares, str(effect), note))
    return found


def _embeddings(bases: Bases, kept: Path) -> list[Row]:
    """How far the embedding moves, of the adversarially trained model against the naturally trained one."""
    images = bases.cifar("report", EMBEDDED)

    def measured(robust: bool) -> EmbeddingReport:
        def measure() -> str:
            return embedding_change(bases.narrow(robust=robust), _batches(images), THREAT).to_json()

        return EmbeddingReport.from_json(_once(kept / f"embedding-{_name(robust)}.json", measure))

    natural, robust = measured(False), measured(True)
    apart = [a - b for a, b in zip(robust.change, natural.change, strict=True)]
    by_chance = [f"{100 * report.mean_random:.1f} %" for report in (natural, robust)]
    note = f"A random change within the same bound moves it by {by_chance[0]} before and {by_chance[1]} after."
    change = Row(
        ROBUST,
        NARROW,
        f"largest change of the embedding found, {THREAT}, {natural.samples} images, % of its norm",
        NATURAL,
        100 * natural.mean_change,
        100 * robust.mean_change,
        str(Difference(fmean(apart), *of_mean(apart))),
        note,
    )
    agreement = Row(
        ROBUST,
        NARROW,
        f"same prediction at that change, {natural.samples} images, %",
        NATURAL,
        100 * natural.agreement,
        100 * robust.agreement,
        str(Effect.of(robust.agrees, natural.agrees)),
        "The attack has no labels and does not see the last layer.",
    )
    return [change, agreement]


def _once(path: Path, measure: Callable[[], str]) -> str:
    """A report as JSON: what the file holds, or what is measured now and kept there."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(measure() + "\n", encoding="utf-8")
        partial.replace(path)
    return path.read_text(encoding="utf-8")


def _batches(images: Images) -> list[tuple[Tensor, Tensor]]:
    return [(pixels, labels) for pixels, labels in DataLoader(TensorDataset(*images), batch_size=50)]


def _larger(bases: Bases) -> Images:
    """Photos of :data:`LARGER` pixels, as timm resizes them before it crops, every other one of the folder."""
    transform = create_transform(LARGER, mean=(0.0,) * 3, std=(1.0,) * 3, interpolation="bicubic", crop_pct=1.0)
    folder = ImageFolder(str(bases.shared / "data" / "photos"), transform)
    some = Subset(folder, range(0, len(folder), 2)[:PHOTOS])
    pixels, labels = next(iter(DataLoader(some, batch_size=len(some))))
    names = [int(folder.classes[label]) for label in labels.tolist()]
    return pixels.clamp(0, 1), labels.new_tensor(names)


def _ratio(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.2f}"


def _name(robust: bool) -> str:
    return "robust" if robust else "natural"
