"""Evaluation of a model's robustness: every attack on every image, the worst case over all attacks, and a control."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
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
from timm_nrpm.choices import SUITES
from timm_nrpm.data.images import pixels_of
from timm_nrpm.evaluation.controls import KeptJudge
from timm_nrpm.evaluation.judge import Judge, Protocol
from timm_nrpm.evaluation.outcome import Joined, join
from timm_nrpm.evaluation.report import GIVEN, MEMBER, REPROGRAMMED, TRAINED, RobustnessReport
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
from timm_nrpm.nn.ensemble import Ensemble
from timm_nrpm.nn.pixel_model import PixelModel, alike
from timm_nrpm.nn.wrappers import subject_of, unwrapped
from timm_nrpm.version import __version__

if TYPE_CHECKING:
    from accelerate import Accelerator


CALIBRATED = 1000
"""Largest number of images that surrogates, and candidates of advice, are calibrated on."""


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
    controls: str | Path | None = None,
    resume: str | Path | None = None,
    accelerator: Accelerator | None = None,
    progress: bool = False,
) -> RobustnessReport:
    """Measure accuracy when clean and under attack, image by image; the main result is the worst case over all attacks.

    The gradient of the estimate is steep and erratic, which stops only attackers who follow it. So the default suite,
    `"adaptive"`, keeps the worst point found for each image and continues from there, in turn along the plain model,
    along smoother surrogates and by a random search. Only its result is called the worst case. `"paper"` and
    `"standard"` are the suites that others report; `"quick"` is FGSM, PGD, and PGD from the plain model, see
    :func:`timm_nrpm.attacks.suites.attacks_of`.

    As a control, the same attacks run on the plain model that was reprogrammed, with the statistics it had then. If
    weights were trained since, that model is no longer available. Give it as `base` in this case; otherwise the same
    weights at lambda 1 take its place, and the flag `plain_model_changed` is raised. An ensemble is compared with one
    of its members, and attacks follow its own gradient and that of each member.

    Args:
        model: Classifier of normalised images, or a wrapper of one, attacked on the device it is on. Its modes,
            gradients and statistics are restored afterwards.
        loader: Batches of pixels `[B, C, H, W]` in [0, 1] and labels `[B]`, in the same order in every pass. It need
            not have a length.
        threat: What an attacker may change; the default is Linf with eps 8/255.
        suite: Name of the suite of attacks, one of `timm_nrpm.choices.SUITES`.
        effort: Effort of the adaptive suite, one of `timm_nrpm.efforts.LEVELS`: `"fast"` has the first 12 of the
            default's 24 rounds and no evolution, `"exhaustive"` 240 rounds and 20 evolutions on all unbroken images.
        steps, queries: Number of gradients of each ascent and number of forwards of each random search; by default
            those of the suite.
        seed: Seed of everything random in the attacks. The draws for an image depend only on this seed and on the place
            of its batch in the loader.
        data: Description of the images for the report and its card, such as `"cifar10, test"`.
        base: Another model whose gradients attacks may follow, such as the one this was made from. If weights were
            trained since, it is also the model that this one is compared with.
        control: Whether to attack the plain model, too.
        mean, std: The model's normalisation, one number for each channel; by default timm's for this model, and none
            for a model that is not timm's.
        controls: Folder that keeps what the attacks leave of plain models, by a hash of the model, the images, the
            attacks and this package's code, so that an evaluation of another lambda does not attack the same plain
            model again. The hash has the types of the model's modules, but not the code of your own modules.
        resume: File that keeps the result of every finished batch, from which a run that was killed continues. With
            several processes, each has a file of its own, with its rank at the end of the name.
        accelerator: Accelerator that shares the batches among its processes. Give each process the same loader, not
            prepared by the accelerator. Processes wait for the slowest one at the end, so the accelerator's timeout
            (`InitProcessGroupKwargs`) must be long enough for that.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: Pixels are outside [0, 1], labels are not classes of the model, a setting is outside its range, the
            loader is empty, or the file `resume` belongs to another run.
        OSError: The folder `controls` cannot be made.

    Example:
        >>> report = evaluate(model, loader, Threat("Linf", 0.12), effort="fast")
        >>> report.worst_case, report.control.worst_case, report.flags
        (0.6, 0.8, ('gradient_masking',))
    """
    _check_reiterable(loader)
    protocol = Protocol(check_threat(threat), suite, _effort(suite, effort, steps, queries), seed)
    attacks_of(suite, protocol.threat, protocol.effort, ("own",), 2)  # raises an error before anything is computed
    subject = subject_of(model, mean, std)
    model, net = subject.model, subject.on_pixels()
    base = base if base is None or isinstance(model, Ensemble) else unwrapped(base)
    start = time.perf_counter()
    plain = _plain_kind(model, base) if control else ""
    sha256 = model_sha256(model)
    rank, processes = (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)
    with ExitStack() as stack:
        warning_texts = stack.enter_context(recorded_warnings())
        bar = stack.enter_context(progress_bar(progress and rank == 0))
        for module in (model,) if base is None else (model, base):
            stack.enter_context(attackable(module))

        def work() -> Share:
            identity = protocol.to_dict() | {"control": control, "timm_nrpm": __version__, "processes": processes}
            if resume is not None:  # hashing whole models takes a while
                identity |= _identities(net, base)
            journal = Journal(shard_of(resume, rank, processes), identity)
            judges = _judges(loader, net, base, plain, protocol, None if controls is None else Path(controls))
            return judge_all(judges, loader, journal, bar, rank, processes)

        shares = together(accelerator, work)
        rows = in_order(shares)
    joined = [join(outcomes) for outcomes in zip(*(row.outcomes for row in rows), strict=True)]
    if plain and plain != MEMBER:
        joined[0].evidence[PLAIN_CHANGED] = float(plain == TRAINED)
    report, *others = [_report(results, protocol, tuple(shares[0].labels)) for results in joined]
    texts = dict.fromkeys([*warning_texts, *(text for row in rows for text in row.warnings)])
    return replace(
        report,
        control=others[0] if others else None,
        plain=plain or REPROGRAMMED,
        warnings=tuple(texts),
        seconds=time.perf_counter() - start,
        sha256=sha256,
        data=data,
    )


def _report(joined: Joined, protocol: Protocol, labels: tuple[int, ...]) -> RobustnessReport:
    """Return the report of one model, without its control."""
    effort = protocol.effort
    return RobustnessReport(
        protocol.threat,
        protocol.suite,
        effort.steps,
        effort.queries,
        protocol.seed,
        joined.correct,
        joined.attacks,
        flags=flags_of(joined.evidence, len(joined.correct)),
        evidence=joined.evidence,
        rounds=effort.rounds,
        evolutions=effort.evolutions,
        versions=_versions(),
        labels=labels,
    )


def _judges(
    loader: Iterable[tuple[Tensor, Tensor]],
    net: PixelModel,
    base: nn.Module | None,
    plain: str,
    protocol: Protocol,
    controls: Path | None,
) -> list[Judge | KeptJudge]:
    """Return the judge of a model, and that of the plain model it is compared with, if there is one."""
    ours = bool(reprogrammed_layers(net.model)) and not isinstance(net.model, Ensemble)
    calibration = first_images(loader) if ours and (protocol.suite == "adaptive" or plain == TRAINED) else []
    sources = sources_of(net.model, calibration, base=base, **net.normalisation())
    own = Judge(sources, protocol)
    if not plain:
        return [own]
    name = "base" if plain == GIVEN else "plain"
    if isinstance(net.model, Ensemble):
        beside = alike(net.model.member(net.model.reference), net)
    else:
        beside = sources[name].net if len(sources) > 1 else alike(plain_copy(net.model), net)
    control = Judge({"own": Source(beside, predicts=True)}, protocol)
    return [own, control if controls is None else _kept(control, controls)]


def _kept(judge: Judge, folder: Path) -> KeptJudge:
    """Return the judge of a plain model whose outcomes are kept in a folder."""
    net = judge.net
    model = {"model": weights_sha256(net.model.state_dict()), **identity_of(net), "device": net.mean.device.type}
    return KeptJudge(judge, folder, {**judge.protocol.to_dict(), **model, **_versions()})


def _check_reiterable(loader: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Raise a ValueError for an iterator, which gives its images only once."""
    if isinstance(loader, Iterator):
        raise ValueError(
            f"The loader is a {type(loader).__name__}, which gives its images once: give a DataLoader, or list(loader)."
        )


def _plain_kind(model: nn.Module, base: nn.Module | None) -> str:
    """Return which plain model a model is compared with: `REPROGRAMMED`, `GIVEN`, `TRAINED` or `MEMBER`, or none."""
    if isinstance(model, Ensemble):
        return MEMBER
    if not reprogrammed_layers(model):
        return ""
    if is_as_reprogrammed(model):
        return REPROGRAMMED
    return GIVEN if base is not None and base.state_dict().keys() == plain_copy(model).state_dict().keys() else TRAINED


def _identities(net: PixelModel, base: nn.Module | None) -> Mapping[str, object]:
    """Return, as JSON, what identifies the models of an evaluation in a journal."""
    plain = plain_copy(net.model) if reprogrammed_layers(net.model) else None
    models = {"the model": net.model, "the plain model": plain, "the base": base}
    return {
        name: None if each is None else {"sha256": weights_sha256(each.state_dict()), **identity_of(alike(each, net))}
        for name, each in models.items()
    }


def _effort(suite: str, effort: str, steps: int | None, queries: int | None) -> Effort:
    check_choice("effort", effort, LEVELS)
    settings = EFFORTS[check_choice("suite", suite, SUITES)]
    if suite == "adaptive":
        settings = LEVELS[effort]
    elif effort != "default":
        raise ValueError(
            f'effort={effort!r} is for the suite "adaptive": leave it out for suite={suite!r}, which has fixed numbers.'
        )
    if steps is not None:
        settings = replace(settings, steps=steps, pgd=steps, auto=steps)
    if queries is not None:
        settings = replace(settings, queries=queries)
    if settings.steps < 1 or settings.queries < 0:
        raise ValueError(
            f"steps={steps} and queries={queries} are not allowed: give at least 1 step for an ascent, and at least 0 "
            "queries for a search."
        )
    return settings


def first_images(loader: Iterable[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """Return batches of pixels to calibrate on, of `CALIBRATED` images at most, which needs no labels: an attacker has
    the images as well."""
    batches: list[Tensor] = []
    for images in pixels_of(loader):
        pixels = images.float()
        batches.append(pixels[: CALIBRATED - sum(map(len, batches))])
        if sum(map(len, batches)) >= CALIBRATED:
            break
    return batches


def _versions() -> dict[str, str]:
    versions = {"timm_nrpm": __version__, "torch": torch.__version__}
    for name in ("timm", "torchattacks"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "unknown"
    return versions
