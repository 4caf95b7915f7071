"""Search for lambda, for all layers together and for each, by accuracy under quick attacks; no weight is trained."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from timm_nrpm.attacks.threats import Threat, check_threat
from timm_nrpm.checks import check_integer, check_number
from timm_nrpm.data.images import check_batch, check_labels, pixels_of
from timm_nrpm.evaluation.evaluate import evaluate
from timm_nrpm.evaluation.pareto import Candidate, ParetoFront, best_of
from timm_nrpm.evaluation.proposals import optuna_module, settings
from timm_nrpm.jobs.journal import Journal, digest_of
from timm_nrpm.jobs.progress import progress_bar
from timm_nrpm.models.base import weights_sha256
from timm_nrpm.models.calibration import calibrate_, plain_of
from timm_nrpm.models.reprogramming import plain_copy, record_of, reprogrammed_layers, uncalibrate_
from timm_nrpm.nn.wrappers import Subject, copied, subject_of

Model = TypeVar("Model", bound=nn.Module)

MOST_GLOBAL = 16
"""Largest number of settings with one lambda for all layers, if a lambda for each layer is searched as well."""


def search_lambda(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    threat: Threat | None = None,
    *,
    budget: int = 50,
    layerwise: bool = True,
    bound: float = 2.0,
    calibration: Iterable[Any] | None = None,
    steps: int = 20,
    seed: int = 0,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    resume: str | Path | None = None,
    progress: bool = False,
) -> ParetoFront:
    """Search for the lambdas that leave the most images right under quick attacks, with a bounded loss when clean.

    The plain model comes first, as the control. Then a third of the budget, but at most 16 settings, goes to one lambda
    for all layers: half of these settings lie on an even grid, and half between the best so far and its neighbours. The
    rest goes to a lambda for each layer: first the best global lambda on only the first or only the second half of the
    layers, and then the proposals of Optuna's tree-structured Parzen estimator (arXiv 2304.11127), which maximises the
    share of right images and the clean accuracy, within the bound. All lambdas are multiples of 0.01.

    The model itself is not changed. To apply the result, and then calibrate anew:

        reprogram_(model, dataclasses.replace(model.nrpm.config, lam=front.best.lams))
        calibrate_(model, calibration)

    The best of many settings owes part of its result to luck, on these images and with this random start of PGD. To
    measure what it is worth, `evaluate` it beside the plain model on other images and with another seed.

    Args:
        model: A reprogrammed model; its lambdas and its calibration do not matter.
        loader: Batches of pixels `[B, C, H, W]` in [0, 1] and labels `[B]`, the same in each pass.
        threat: What an attacker may change; the default is Linf with eps 8/255.
        budget: Number of settings to try, the plain model included. A setting costs one `evaluate` and, with
            `calibration`, one `calibrate_`. Fewer are tried if there are no more: one lambda has 101 values.
        layerwise: Whether to search a lambda for each layer too, which needs Optuna.
        bound: Largest loss of clean accuracy, in points of the plain model's on the same images.
        calibration: Batches of pixels `[B, C, H, W]` in [0, 1], or tuples that start with such a batch, as those of a
            training loader. Every setting is calibrated on them before it is evaluated, since other lambdas make
            statistics stale. By default no setting is calibrated, which `standardize=True` does not allow.
        steps: Number of steps of PGD.
        seed: Seed of PGD's random start and of the search; the same seed gives the same trials.
        mean, std: The model's normalisation, the same as in :func:`timm_nrpm.evaluate`.
        resume: File that holds a row for each setting that was tried, from which an interrupted search goes on; None
            writes none.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: The model is not reprogrammed, it needs a calibration and has none, a setting is outside its range,
            `resume` holds another search, the loader is empty, gives its images only once or gives other images in each
            pass, pixels are outside [0, 1], or labels are not classes of the model.
        ImportError: Optuna is not installed.

    Example:
        >>> front = search_lambda(model, loader, Threat("Linf", 0.2), calibration=training_loader, budget=8)
        >>> front.best.quick, front.plain.quick, len(front.trials)
        (0.2, 0.1, 8)
        >>> timm_nrpm.plot(front, "front.png")
        PosixPath('front.png')
    """
    threat = check_threat(threat)
    budget = check_integer("budget", budget, least=2, why=" (the plain model is the first)")
    bound = check_number("bound", bound, least=0, most=100, why=" of points")
    steps, seed = check_integer("steps", steps, least=1), check_integer("seed", seed, least=0)
    if record_of(model).config.standardize and calibration is None:
        raise ValueError("The model has standardize=True, whose units are taken from images: give calibration=.")
    subject = subject_of(model, mean, std)
    work = _working_copy(subject.model)
    layers = reprogrammed_layers(work)
    layerwise = layerwise and len(layers) > 1
    optuna = optuna_module() if layerwise else None
    net = Subject(work, subject.mean, subject.std).on_pixels().eval()
    images = _Images(loader)
    statistics = None if calibration is None else _Calibration(calibration)
    plain = plain_of(net, images if statistics is None else statistics).eval()
    share = min(MOST_GLOBAL, max(1, (budget - 1) // 3)) if layerwise else budget - 1
    trials: list[Candidate] = []
    journal = _journal(resume, work, images, statistics, threat, bound, layerwise, steps, seed)
    with progress_bar(progress, counted=True) as bar:
        task = bar.add_task("Searching lambda", total=budget)
        for kind, lams in settings(list(layers), trials, share, bound, seed, optuna):
            if len(trials) not in journal.rows:
                with torch.no_grad():
                    for name, layer in layers.items():
                        layer.lam.fill_(lams[name])
                if statistics is not None and kind != "plain":  # calibration does not change the plain model
                    calibrate_(work, statistics, **net.normalisation())
                evaluated = plain if kind == "plain" else net
                report = evaluate(evaluated, images, threat, "quick", steps=steps, seed=seed, control=False)
                found = Candidate(kind, lams, report.clean, report.worst_case, report.flags)
                journal.add(len(trials), asdict(found))
            trials.append(Candidate.from_dict(journal.rows[len(trials)]))
            best = best_of(trials, trials[0], bound)
            accuracies = f"quick attacks {100 * best.quick:.1f} %, plain {100 * trials[0].quick:.1f} %"
            bar.update(task, advance=1, description=f"Searching lambda: {accuracies}")
            if len(trials) == budget:
                break
    return ParetoFront(threat, steps, seed, images.count, bound, tuple(trials))


def _journal(
    path: str | Path | None,
    model: nn.Module,
    images: _Images,
    calibration: _Calibration | None,
    threat: Threat,
    bound: float,
    layerwise: bool,
    steps: int,
    seed: int,
) -> Journal:
    """The journal of a search, with everything that its settings and their results depend on."""
    if path is None:
        return Journal(None, {})
    digest = hashlib.sha256()
    for part in (images, calibration or ()):
        for batch in part:
            pixels, labels = batch if isinstance(batch, tuple) else (batch, torch.zeros(0))
            digest.update(digest_of(pixels, labels).encode())
    config = {k: v for k, v in record_of(model).config.settings.items() if k != "learnable"}
    plain = weights_sha256(plain_copy(model).state_dict())
    layers = list(reprogrammed_layers(model))
    asked = {"threat": repr(threat), "bound": bound, "layerwise": layerwise, "steps": steps, "seed": seed}
    return Journal(path, {"model": plain, "layers": layers, **config, "images": digest.hexdigest(), **asked})


def _working_copy(model: Model) -> Model:
    """Return a copy to try lambdas on, which shares the memory of the weights, without calibration and in evaluation
    mode.

    Its Parameters are new objects, so that changes of them never show on those of `model`, even after an interruption.
    """
    lams = {id(layer.lam) for layer in reprogrammed_layers(model).values()}
    memo: dict[int, Any] = {
        id(p): nn.Parameter(
            p.detach().to(torch.float32, copy=True) if id(p) in lams else p.detach(), requires_grad=False
        )
        for p in model.parameters()
    }
    work = copied(model, memo).eval()
    uncalibrate_(work)
    return work


CHANGED_IMAGES = (
    "The loader gave other images, or the same in another order, when it was run again: settings can only be compared "
    "on the same images. Give shuffle=False and no random augmentation, or a list of its batches."
)


class _Images:
    """Checked batches of a loader, which must be the same in every pass."""

    def __init__(self, loader: Iterable[Any]) -> None:
        self.loader = _reiterable(loader, "loader")
        self.fingerprints: list[tuple[float, list[int]]] = []  # of the batches in the first pass
        self.complete, self.count = False, 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        seen = 0
        for batch in self.loader:
            pixels, labels = check_batch(batch)
            labels = check_labels(labels, count=len(pixels))
            fingerprint = (float(pixels.double().sum()), labels.tolist())
            if not self.complete:
                self.fingerprints.append(fingerprint)
                self.count += len(labels)
            elif seen >= len(self.fingerprints) or self.fingerprints[seen] != fingerprint:
                raise ValueError(CHANGED_IMAGES)
            seen += 1
            yield pixels, labels
        if seen < len(self.fingerprints):
            raise ValueError(CHANGED_IMAGES)
        self.complete = True


class _Calibration:
    """Batches of pixels, which can be iterated over repeatedly."""

    def __init__(self, loader: Iterable[Any]) -> None:
        self.loader = _reiterable(loader, "calibration")
        if next(iter(self), None) is None:  # fail now, not after the plain model was attacked
            raise ValueError("calibration gave no images: give batches of pixels, or None to calibrate nothing.")

    def __iter__(self) -> Iterator[Tensor]:
        return pixels_of(self.loader, "calibration")


def _reiterable(loader: Iterable[Any], name: str) -> Iterable[Any]:
    """Return the loader, or raise a ValueError for an iterator, which gives its images only once."""
    if isinstance(loader, Iterator):
        raise ValueError(
            f"{name} is a {type(loader).__name__}, which gives its images once, and every setting needs them again: "
            f"give a DataLoader, or a list of the batches, {name}=list({name})."
        )
    return loader
