"""A folder with the pictures of an evaluation, and the HTML page that shows them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from timm_nrpm.attacks.efforts import EFFORTS
from timm_nrpm.attacks.sources import sources_of
from timm_nrpm.attacks.suites import alone, attacks_of
from timm_nrpm.data.ordering import seed_of
from timm_nrpm.evaluation.report import RobustnessReport
from timm_nrpm.figures.attacked import draw_attacked
from timm_nrpm.figures.illustrations import Illustration, Numbers, attacks_in_words
from timm_nrpm.figures.page import write_page
from timm_nrpm.figures.robustness import draw_attacks, draw_curves
from timm_nrpm.models.modes import attackable
from timm_nrpm.models.reprogramming import reprogrammed_layers
from timm_nrpm.nn.pixel_model import PixelModel
from timm_nrpm.nn.wrappers import unwrapped

IMAGES = 8
"""Largest number of images in the picture of attacked images."""


def show(
    reports: Sequence[RobustnessReport],
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    folder: str | Path,
    *,
    title: str,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
) -> Path:
    """Write pictures of an evaluation into a folder, and one HTML page with all of them.

    The pictures are the accuracy that each attack leaves (`attacks.png`), accuracy over eps where there are several
    reports (`curves.png`), and attacked images with their differences (`attacked.png`).

    Args:
        reports: Reports on `model` under one norm, one for each eps.
        model, loader, mean, std: The same as in :func:`timm_nrpm.evaluate`.
        folder: The folder to write to, created if it does not exist.
        title: Title of the page.

    Returns:
        Path of the page, `folder/report.html`.

    Raises:
        ValueError: The reports do not belong on one curve. No picture is written.
        ImportError: Matplotlib is not installed.

    Example:
        >>> show([report], model, loader, "evaluated", title="resnet18 at lambda 0.8")
        PosixPath('evaluated/report.html')
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if len(reports) > 1:  # first, since reports that do not belong on one curve are refused; the page draws its own
        draw_curves(reports, folder / "curves.png")
    last = max(reports, key=lambda report: report.threat.eps)
    bars = Illustration(draw_attacks(last, folder / "attacks.png"), attacks_in_words(last))
    pictures = {f"Accuracy that each attack leaves, {last.threat}; the section Attacks has the numbers": bars}
    pixels, labels = next(iter(loader))
    if pixels.shape[1] in (1, 3):
        pixels, labels = pixels[:IMAGES], labels[:IMAGES]
        attacked, predictions = attack_one_batch(model, pixels, labels, last, mean=mean, std=std)
        along = "the plain model's gradient" if reprogrammed_layers(unwrapped(model)) else "its own gradient"
        caption = f"The first images, attacked by PGD along {along}, {last.threat}; differences amplified"
        path = draw_attacked(pixels, attacked, labels, predictions, folder / "attacked.png")
        pictures[caption] = _told(path, pixels, attacked, labels, predictions)
    return write_page(reports, folder / "report.html", title=title, pictures=pictures)


def _told(path: Path, pixels: Tensor, attacked: Tensor, labels: Tensor, predictions: Tensor) -> Illustration:
    """The picture of attacked images with its numbers: both classes and the largest change of each image."""
    changes = (attacked - pixels.cpu()).abs().flatten(1).amax(1).tolist()
    classes = list(zip(labels.tolist(), predictions.tolist(), strict=True))
    wrong = [f"image {i}, {label} taken for {seen}" for i, (label, seen) in enumerate(classes, 1) if label != seen]
    alt = (
        f"{len(classes)} images, each clean, attacked, and their difference, by at most {max(changes):.3g} in a pixel. "
        f"The model is wrong on {len(wrong)} attacked images{': ' if wrong else ''}{'; '.join(wrong)}."
    )
    rows = [
        [str(i), str(label), str(seen), f"{change:.3g}"]
        for i, ((label, seen), change) in enumerate(zip(classes, changes, strict=True), 1)
    ]
    return Illustration(path, alt, Numbers(["image", "its class", "class of the model", "largest change"], rows))


def attack_one_batch(
    model: nn.Module,
    pixels: Tensor,
    labels: Tensor,
    report: RobustnessReport,
    *,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
) -> tuple[Tensor, Tensor]:
    """Attack one batch by PGD along the plain model's gradient, or along the own gradient of a model that is not
    reprogrammed.

    Args:
        model, mean, std: The same as in :func:`timm_nrpm.evaluate`.
        pixels, labels: The batch, `[B, C, H, W]` in [0, 1] and `[B]`.
        report: A report, whose threat and seed are used.

    Returns:
        The attacked pixels `[B, C, H, W]` on the CPU, and the classes `[B]` that the model predicts for them.
    """
    with attackable(model):
        sources = sources_of(model, mean=mean, std=std)
        net = sources["own"].net
        x, y = pixels.to(net.mean.device), labels.to(net.mean.device).long()
        attacks = {a.name: a for a in attacks_of("quick", report.threat, EFFORTS["quick"], sources, classes_of(net, x))}
        attack = attacks.get("pgd_plain", attacks["pgd"])
        with sources[attack.source].followed() as followed:
            attacked = alone(attack, report.threat)(followed, x, y, [seed_of(report.seed, 0, i) for i in range(len(x))])
        with torch.no_grad():
            return attacked.cpu(), net(attacked).argmax(1).cpu()


@torch.no_grad()
def classes_of(net: PixelModel, pixels: Tensor) -> int:
    """Number of classes of the model."""
    return int(net(pixels[:1]).shape[1])
