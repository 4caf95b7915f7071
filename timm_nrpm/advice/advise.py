"""`advise`: what to do with a model, by trying what the package has on some images, and judging it on others."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from timm_nrpm.advice.inquiry import Inquiry
from timm_nrpm.advice.study import Danger, Part, Study, file_name
from timm_nrpm.attacks.efforts import LEVELS
from timm_nrpm.attacks.threats import Threat
from timm_nrpm.checks import check_choice, check_integer, check_number
from timm_nrpm.config import NRPMConfig
from timm_nrpm.data.images import check_labels
from timm_nrpm.evaluation.shifts import Shift
from timm_nrpm.evaluation.trials import Advice, Bounds
from timm_nrpm.jobs.progress import progress_bar
from timm_nrpm.models.reprogramming import plain_copy, reprogram_
from timm_nrpm.nn.wrappers import Subject, copied, subject_of

DEFAULT_THREATS: tuple[Danger, ...] = (Shift(), Threat())


def advise(
    model: nn.Module,
    loader: Iterable[Any],
    threats: Danger | Sequence[Danger] = DEFAULT_THREATS,
    *,
    selection: Iterable[Any] | None = None,
    training: DataLoader[Any] | None = None,
    clean_loss: float = 2.0,
    slowdown: float = 10.0,
    effect: float = 5.0,
    seconds: float = 480.0,
    effort: str = "fast",
    seed: int = 0,
    folder: str | Path | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    progress: bool = False,
) -> list[Advice]:
    """Find what to do with a model against threats: try every strategy, choose on some images, and judge on others.

    Strategies are tried until the time is over: adaptation, tuning of a few layers and of all, also part of the way
    from the old weights to the tuned ones, mixing with a tuned model, the estimate in standard units, one lambda, other
    eps, K and penalties, a lambda for each layer, tuning of lambda, and smoothing. A reprogrammed model that is tuned
    stands beside the plain one that was tuned alike. Candidates that are too slow, that lose too much clean accuracy,
    or that quick attacks leave no better than the best so far, are given up at once. The best on the selection images,
    or one with nine tenths of its gain that loses less clean accuracy, and the best of each other strategy that gains
    there, are then measured on the report images; the former is advised if its gain there can be told from chance.
    "Leave it as it is" is an answer as well.

    Args:
        model: A plain timm model, or a reprogrammed one, whose plain model is then advised on. It is not changed.
        loader: Batches of pixels `[B, C, H, W]` in [0, 1] and labels `[B]`, on which the advice is judged. All images
            are held in memory.
        threats: What the model is to withstand: a :class:`timm_nrpm.Threat`, a :class:`timm_nrpm.shifts.Shift`, or
            several. The default is the images as they are, and Linf 8/255.
        selection: Other images of the same kind, on which candidates are chosen. By default half of the images of
            `loader`, drawn at random, serve for that.
        training: A DataLoader of training images and labels for calibration and tuning. Without it the images of the
            selection calibrate, and nothing is tuned.
        clean_loss: Largest loss of clean accuracy, in points.
        slowdown: Largest latency, in times the model's.
        effect: Smallest effect worth telling, in points: there have to be images enough for it.
        seconds: Time for each threat. What does not fit in is not begun, by an estimate.
        effort: How long the adaptive suite tries, as for :func:`timm_nrpm.evaluate`.
        seed: Seed of everything random.
        folder: Folder of the results, with a folder for each threat: `advice.json`; `trials.jsonl`, from which the same
            call goes on after an interruption; and, if something helps, `variant`, with its report, which can be pushed
            as it is; trained weights of a model that is not timm's are `weights.safetensors`. None writes nothing.
        mean, std: The model's normalisation, as for :func:`timm_nrpm.evaluate`.
        progress: Whether to show a progress bar.

    Returns:
        An :class:`timm_nrpm.evaluation.trials.Advice` for each threat.

    Raises:
        ValueError: There are too few images for the effect, images of one purpose are also among those of another,
            images have no labels, a setting is outside its range, or `folder` holds another run.

    Example:
        >>> found = timm_nrpm.advise(model, loader, Threat("Linf", 0.1), training=training_loader, effect=50, seconds=1)
        >>> print(found[0].sentence)
        Against Linf 0.1, ...
    """
    bounds = Bounds(
        check_number("clean_loss", clean_loss, least=0, most=100, why=" of points"),
        check_number("slowdown", slowdown, least=1),
        check_number("effect", effect, above=0, most=100, why=" of points"),
        check_number("seconds", seconds, above=0),
    )
    check_choice("effort", effort, LEVELS)
    seed = check_integer("seed", seed, least=0)
    dangers = (threats,) if isinstance(threats, (Threat, Shift)) else tuple(threats)
    if not dangers or not all(isinstance(danger, (Threat, Shift)) for danger in dangers):
        raise ValueError(f"threats={threats!r}: give a Threat, a Shift, or several of them.")
    subject = subject_of(model, mean, std)
    plain = reprogram_(copied(plain_copy(subject.model)), NRPMConfig(lam=1.0))
    net = Subject(plain, subject.mean, subject.std).on_pixels().eval()
    parts = _divided(loader, selection, seed)
    with torch.no_grad():
        classes = net(parts[0].pixels[:1].to(net.mean.device)).shape[1]
    for part in parts:
        check_labels(part.labels, classes)
    _check_enough(parts[1], bounds)
    _check_apart(*parts, training)
    with TemporaryDirectory() as temporary, progress_bar(progress) as bar:
        place = Path(temporary) if folder is None else Path(folder)
        place.mkdir(parents=True, exist_ok=True)
        found = []
        for danger in dangers:
            where = folder_of(place, str(danger))
            where.mkdir(exist_ok=True)
            study = Study(
                plain, danger, parts[0], parts[1], training, bounds, effort, seed, where, subject.mean, subject.std
            )
            found.append(Inquiry(study, bar).advice())
            (where / "advice.json").write_text(found[-1].to_json() + "\n", encoding="utf-8")
    return found


def folder_of(folder: Path, threat: str) -> Path:
    """The folder of a threat, inside that of all."""
    return folder / file_name(threat)


def _divided(loader: Iterable[Any], selection: Iterable[Any] | None, seed: int) -> tuple[Part, Part]:
    """The images of the selection and those of the report."""
    images = Part.of(loader)
    if selection is not None:
        return Part.of(selection), images
    order = torch.randperm(len(images.labels), generator=torch.Generator().manual_seed(seed))
    if len(order) < 2:
        raise ValueError("The loader gave one image: advice takes some to choose on and others to judge on.")
    half = len(order) // 2
    return images.chosen(order[:half].sort().values), images.chosen(order[half:].sort().values)


def _check_enough(report: Part, bounds: Bounds) -> None:
    """Raise a ValueError if there are too few report images for the effect that is asked for."""
    count = len(report.labels)
    if count < bounds.images:
        raise ValueError(
            f"{count} images to judge on are too few to tell an effect of {bounds.effect:g} points from chance: it "
            f"takes {bounds.images} at least, and as many to choose on. Give more, or effect={600 / count:.3g} points."
        )


def _check_apart(selection: Part, report: Part, training: Iterable[Any] | None) -> None:
    """Raise a ValueError if an image serves two purposes."""
    held = set(report.digests())
    pairs = [("to choose on", selection.digests())]
    if training is not None:
        chosen = set(pairs[0][1])
        images = [digest for batch in training for digest in Part.of([batch]).digests()]
        pairs.append(("to train on", images))
        if shared := sum(digest in chosen for digest in images):
            raise ValueError(_shared(shared, "to train on", "to choose on"))
    for purpose, digests in pairs:
        if shared := sum(digest in held for digest in digests):
            raise ValueError(_shared(shared, purpose, "to judge on"))


def _shared(count: int, one: str, other: str) -> str:
    return (
        f"{count} of the images {one} are also among those {other}, which would make the advice better than it is: "
        "give other images for each purpose."
    )
