"""What a reprogrammed model is worth: every attack on every image, the worst case over them all, and its control."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from timm_nrpm.attacks.efforts import EFFORTS, LEVELS, Effort
from timm_nrpm.attacks.flags import PLAIN_CHANGED, flags_of
from timm_nrpm.attacks.sources import Source, sources_of
from timm_nrpm.attacks.suites import attacks_of
from timm_nrpm.attacks.threats import Threat, check_threat
from timm_nrpm.checks import check_choice
from timm_nrpm.config import SUITES
from timm_nrpm.data.images import pixels_of
from timm_nrpm.evaluation.judge import Judge
from timm_nrpm.evaluation.outcome import Joined, join
from timm_nrpm.evaluation.report import GIVEN, REPROGRAMMED, TRAINED, RobustnessReport
from timm_nrpm.evaluation.sharing import Share, in_order, judge_all, recorded_warnings, shard_of, together
from timm_nrpm.jobs.journal import Journal
from timm_nrpm.jobs.progress import progress_bar
from timm_nrpm.models.base import weights_sha256
from timm_nrpm.models.modes import attackable
from timm_nrpm.models.reprogramming import (
    identity_of,
    is_as_reprogrammed,
    model_sha256,
    plain_copy,
    reprogrammed_layers,
)
from timm_nrpm.nn.pixel_model import PixelModel, alike
from timm_nrpm.nn.wrappers import subject_of, unwrapped
from timm_nrpm.version import __version__

if TYPE_CHECKING:
    from accelerate import Accelerator


CALIBRATED = 1000
"""Images with which surrogates are calibrated."""


def evaluate(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    threat: Threat | None = None,
    suite: str = "adaptive",
    *,
    effort: str = "default",
    steps: int | None = None,
    queries: int | None = None,
    seed: int = 0,
    data: str = "",
    base: nn.Module | None = None,
    control: bool = True,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    resume: str | Path | None = None,
    accelerator: Accelerator | None = None,
    progress: bool = False,
) -> RobustnessReport:
    """Accuracy when clean and under attack, image by image; the headline is the worst case over all attacks.

    The gradient of the estimate is steep and erratic, which stops an attacker who follows it and nobody else. So
    `"adaptive"`, the default, keeps the worst point found of each image and goes on from there, by turns along the
    plain model, smoother surrogates and a random search; what it leaves is called the worst case. `"paper"` and
    `"standard"` are what others report, `"quick"` is FGSM, PGD and PGD from the plain model, see
    :func:`timm_nrpm.attacks.suites.attacks_of`.

    Beside it stands the plain model, the one that was reprogrammed, whatever moved the statistics since. Where weights
    were trained since, that one is no more to be had: give it as `base`, or the same weights at lambda 1 stand in its
    place, and the flag `plain_model_changed` is raised.

    Args:
        model: A classifier of normalised images, attacked on the device it is on; wrappers are seen through. Afterwards
            it is as before, modes, gradients and statistics included.
        loader: Batches of pixels `[B, C, H, W]` in [0, 1] and labels `[B]`; in the same order each time it is run. A
            stream without a length will do.
        threat: What an attacker may change; the default is Linf with eps 8/255.
        suite: One of `timm_nrpm.config.SUITES`.
        effort: Of the adaptive suite, one of `timm_nrpm.efforts.LEVELS`: `"fast"` is the first 12 of the default's 24
            rounds and no evolution, `"exhaustive"` 240 rounds and 20 evolutions on all that stands.
        steps, queries: Gradients of each ascent and forwards of each random search, in place of the suite's numbers.
        seed: Of everything random. Each image's part of it depends on its batch's place alone.
        data: What the images are, in words, such as `"cifar10, test"`; the report and its card say it.
        base: Another model to make examples on, such as the one this was made from; where weights were trained since,
            the one that this is compared with.
        control: Whether to put the plain model under the same attacks.
        mean, std: The model's normalisation, one number a channel; by default timm's for this model, and none for a
            model that is not timm's.
        resume: A file that keeps every batch once it is done: a run that was killed goes on there. With several
            processes, each has its own, with its rank at the end.
        accelerator: Shares the batches among its processes. Give each the same loader, which it did not prepare.
            Processes wait for the slowest at the end: set its timeout (`InitProcessGroupKwargs`) to longer than that.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: Pixels outside [0, 1], labels that are no classes, a setting outside its range, an empty loader, or
            a file of another run.

    Example:
        >>> report = evaluate(model, loader, Threat("Linf", 8 / 255), progress=True)
        >>> report.worst_case, report.control.worst_case, report.flags
        (0.364, 0.354, ("gradient_masking", "attack_not_finished"))
    """
    _check_lasting(loader)
    threat = check_threat(threat)
    settings = _effort(suite, effort, steps, queries)
    attacks_of(suite, threat, settings, ("own",), 2)  # whether there are any, before anything is computed
    subject = subject_of(model, mean, std)
    model, net = subject.model, subject.on_pixels()
    base = None if base is None else unwrapped(base)
    start = time.perf_counter()
    plain = _standing_beside(model, base) if control and reprogrammed_layers(model) else ""
    sha256 = model_sha256(model)
    rank, processes = (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)
    with ExitStack() as stack:
        raised = stack.enter_context(recorded_warnings())
        bar = stack.enter_context(progress_bar(progress and rank == 0))
        for one in (model,) if base is None else (model, base):
            stack.enter_context(attackable(one))

        def work() -> Share:
            identity = {"threat": [threat.norm, threat.eps], "suite": suite, "seed": seed, "control": control}
            identity |= {**asdict(settings), "timm_nrpm": __version__, "processes": processes}
            if resume is not None:  # hashes of whole models take a while
                identity |= _identities(net, base)
            journal = Journal(shard_of(resume, rank, processes), identity)
            judges = _judges(loader, net, base, plain, threat, suite, settings, seed)
            return judge_all(judges, loader, journal, bar, rank, processes)

        rows = in_order(together(accelerator, work))
    joined = [join(outcomes) for outcomes in zip(*(row.outcomes for row in rows), strict=True)]
    if plain:
        joined[0].evidence[PLAIN_CHANGED] = float(plain == TRAINED)
    reports = [_report(one, threat, suite, settings, seed) for one in joined]
    return replace(
        reports[0],
        control=reports[1] if len(reports) > 1 else None,
        plain=plain or REPROGRAMMED,
        warnings=tuple(dict.fromkeys([*raised, *(text for row in rows for text in row.warnings)])),
        seconds=time.perf_counter() - start,
        sha256=sha256,
        data=data,
    )


def _report(joined: Joined, threat: Threat, suite: str, effort: Effort, seed: int) -> RobustnessReport:
    """The report of one model, without its control."""
    return RobustnessReport(
        threat,
        suite,
        effort.steps,
        effort.queries,
        seed,
        joined.correct,
        joined.attacks,
        flags=flags_of(joined.evidence, len(joined.correct)),
        evidence=joined.evidence,
        rounds=effort.rounds,
        evolutions=effort.evolutions,
        versions=_versions(),
    )


def _judges(
    loader: Iterable[tuple[Tensor, Tensor]],
    net: PixelModel,
    base: nn.Module | None,
    plain: str,
    threat: Threat,
    suite: str,
    effort: Effort,
    seed: int,
) -> list[Judge]:
    """The judge of a model, and that of the plain model beside it, if there is one."""
    ours = bool(reprogrammed_layers(net.model))
    calibration = _first_images(loader) if ours and (suite == "adaptive" or plain == TRAINED) else []
    sources = sources_of(net.model, calibration, base=base, **net.normalisation())
    judges = [Judge(sources, threat, suite, effort, seed)]
    if plain:
        name = "base" if plain == GIVEN else "plain"
        beside = sources[name].net if len(sources) > 1 else alike(plain_copy(net.model), net)
        judges.append(Judge({"own": Source(beside, predicts=True)}, threat, suite, effort, seed))
    return judges


def _check_lasting(loader: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Raise a ValueError for a loader that gives its images once."""
    if isinstance(loader, Iterator):
        raise ValueError(
            f"The loader is a {type(loader).__name__}, which gives its images once: give a DataLoader, or list(loader)."
        )


def _standing_beside(model: nn.Module, base: nn.Module | None) -> str:
    """Which plain model stands beside a reprogrammed one."""
    if is_as_reprogrammed(model):
        return REPROGRAMMED
    return GIVEN if base is not None and base.state_dict().keys() == plain_copy(model).state_dict().keys() else TRAINED


def _identities(net: PixelModel, base: nn.Module | None) -> Mapping[str, object]:
    """What tells the models of an evaluation from others, as JSON."""
    plain = plain_copy(net.model) if reprogrammed_layers(net.model) else None
    models = {"the model": net.model, "the plain model": plain, "the base": base}
    return {
        name: None if one is None else {"sha256": weights_sha256(one.state_dict()), **identity_of(alike(one, net))}
        for name, one in models.items()
    }


def _effort(suite: str, effort: str, steps: int | None, queries: int | None) -> Effort:
    check_choice("effort", effort, LEVELS)
    settings = EFFORTS[check_choice("suite", suite, SUITES)]
    if suite == "adaptive":
        settings = LEVELS[effort]
    elif effort != "default":
        raise ValueError(f'effort={effort!r} is for the suite "adaptive": suite={suite!r} has its authors\' numbers.')
    if steps is not None:
        settings = replace(settings, steps=steps, pgd=steps, auto=steps)
    if queries is not None:
        settings = replace(settings, queries=queries)
    if settings.steps < 1 or settings.queries < 0:
        raise ValueError(
            f"steps={steps} and queries={queries} are not allowed: an ascent needs a step at least, and a search no "
            "fewer than 0 queries."
        )
    return settings


def _first_images(loader: Iterable[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """Batches of pixels for surrogates: an attacker has the images, and needs no labels."""
    batches: list[Tensor] = []
    for images in pixels_of(loader):
        pixels = images.float()
        batches.append(pixels[: CALIBRATED - sum(map(len, batches))])
        if sum(map(len, batches)) >= CALIBRATED:
            break
    return batches


def _versions() -> dict[str, str]:
    found = {"timm_nrpm": __version__, "torch": torch.__version__}
    for name in ("timm", "torchattacks"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    return found
