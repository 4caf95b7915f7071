"""What a reprogrammed model is worth: every attack on every image, the worst case over them all, and its control."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from rich.progress import Progress
from torch import Tensor, nn

from timm_nrpm.attacks.efforts import EFFORTS, LEVELS, Effort
from timm_nrpm.attacks.flags import PLAIN_CHANGED, evidence_of, flags_of
from timm_nrpm.attacks.sources import Source, sources_of
from timm_nrpm.attacks.suites import attacks_of
from timm_nrpm.attacks.threats import Threat
from timm_nrpm.checks import check_choice
from timm_nrpm.config import SUITES
from timm_nrpm.data.images import check_batch, check_labels, count_of, pixels_of
from timm_nrpm.evaluation.judge import Judge
from timm_nrpm.evaluation.report import GIVEN, REPROGRAMMED, TRAINED, AttackResult, RobustnessReport
from timm_nrpm.jobs.journal import Journal, digest_of
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

Part = TypeVar("Part")

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
        suite: One of `timm_nrpm.attacks.suites.SUITES`.
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
    if isinstance(loader, Iterator):
        raise ValueError(
            f"The loader is a {type(loader).__name__}, which gives its images once: give a DataLoader, or list(loader)."
        )
    threat = threat or Threat()
    if not isinstance(threat, Threat):
        raise ValueError(f'threat={threat!r} is no Threat: write Threat("Linf", 8 / 255).')
    settings = _effort(suite, effort, steps, queries)
    attacks_of(suite, threat, settings, ("own",), 2)  # whether there are any, before anything is computed
    subject = subject_of(model, mean, std)
    model, net = subject.model, subject.on_pixels()
    base = None if base is None else unwrapped(base)
    start, ours = time.perf_counter(), bool(reprogrammed_layers(model))
    plain = _standing_beside(model, base) if ours and control else ""
    sha256 = model_sha256(model)
    rank, processes = (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)
    with ExitStack() as stack:
        raised = stack.enter_context(_heard())
        bar = stack.enter_context(progress_bar(progress and rank == 0))
        for one in (model, base):
            if one is not None:
                stack.enter_context(attackable(one))

        def work() -> dict[str, Any]:
            identity: dict[str, Any] = {}
            if resume is not None:
                identity = {"threat": [threat.norm, threat.eps], "suite": suite, "seed": seed, "control": control}
                identity |= {**asdict(settings), "timm_nrpm": __version__, "processes": processes}
                nets = {"model": model, "plain model": plain_copy(model) if ours else None, "base": base}
                identity |= {f"the {name}": None if n is None else _told(alike(n, net)) for name, n in nets.items()}
            journal = Journal(_shard(resume, rank, processes), identity)
            calibration = _first_images(loader) if ours and (suite == "adaptive" or plain == TRAINED) else []
            sources = sources_of(model, calibration, base=base, **net.normalisation())
            judges = [Judge(sources, threat, suite, settings, seed)]
            if plain:
                beside = (
                    sources["base" if plain == GIVEN else "plain"].net
                    if len(sources) > 1
                    else alike(plain_copy(model), net)
                )
                judges.append(Judge({"own": Source(beside, predicts=True)}, threat, suite, settings, seed))
            return _rows(judges, loader, journal, bar, rank, processes)

        parts = together(accelerator, work)
    rows = _joined(parts)
    heard = dict.fromkeys([*raised, *(told for row in rows for told in row["warnings"])])
    told = {"versions": _versions(), "threat": threat, "suite": suite, "seed": seed}
    told |= {name: getattr(settings, name) for name in ("steps", "queries", "rounds", "evolutions")}
    reports = [
        _report([row["judged"][i] for row in rows], told, plain if i == 0 else "")
        for i in range(len(rows[0]["judged"]))
    ]
    seconds = time.perf_counter() - start
    beside = reports[1] if len(reports) > 1 else None
    found = replace(reports[0], control=beside, plain=plain or REPROGRAMMED, warnings=tuple(heard), seconds=seconds)
    return replace(found, sha256=sha256, data=data)


def _standing_beside(model: nn.Module, base: nn.Module | None) -> str:
    """Which plain model stands beside a reprogrammed one."""
    if is_as_reprogrammed(model):
        return REPROGRAMMED
    return GIVEN if base is not None and base.state_dict().keys() == plain_copy(model).state_dict().keys() else TRAINED


def _told(net: PixelModel) -> dict[str, Any]:
    """What tells a model from others."""
    return {"sha256": weights_sha256(net.model.state_dict()), **identity_of(net)}


def _shard(resume: str | Path | None, rank: int, processes: int) -> Path | None:
    """The file of a process."""
    if resume is None:
        return None
    alone, first = Path(resume), Path(f"{resume}.0")
    if (first if processes == 1 else alone).exists() and not (alone if processes == 1 else first).exists():
        before = "several processes" if processes == 1 else "one process"
        raise ValueError(f"The run in {resume} was of {before}: go on with as many, or give another file.")
    return alone if processes == 1 else Path(f"{resume}.{rank}")


def _rows(
    judges: Sequence[Judge],
    loader: Iterable[tuple[Tensor, Tensor]],
    journal: Journal,
    bar: Progress,
    rank: int,
    processes: int,
) -> dict[str, Any]:
    """What became of the batches of this process, and which batches all of them were."""
    task = bar.add_task("Evaluating", total=count_of(loader))
    offset, digests = 0, []
    for number, batch in enumerate(loader):
        pixels, labels = check_batch(batch)
        labels = check_labels(labels, count=len(pixels))
        pixels = pixels.float()  # half precision could not keep within the bound
        digests.append(digest_of(pixels, labels))
        if number % processes == rank and not journal.has(number, digests[-1]):

            def tell(share: float, doing: str, judge: int, number: int = number) -> None:
                done = number + (judge + share) / len(judges)
                bar.update(task, completed=done, description=f"Evaluating: {doing}")

            with _heard() as raised:
                judged = [judge(pixels, labels, offset, partial(tell, judge=i)) for i, judge in enumerate(judges)]
            journal.add(number, {"images": digests[-1], "judged": judged, "warnings": raised})
        offset += len(labels)
        bar.update(task, completed=number + 1)
    if not offset:
        raise ValueError("The loader gave no images: there is nothing to evaluate.")
    if surplus := [number for number in journal.rows if number >= len(digests)]:
        raise ValueError(
            f"{journal.path} holds {len(surplus)} batches more than the {len(digests)} that the loader gave: give the "
            "loader it was written with, or another file."
        )
    return {"digests": digests, "rows": journal.rows}


def _joined(parts: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of all processes, in order."""
    if any(part["digests"] != parts[0]["digests"] for part in parts):
        raise ValueError(
            "The processes were given different images: give each the same loader, not shuffled, and not prepared by "
            "accelerate, since the batches are shared here."
        )
    rows = {number: row for part in parts for number, row in part["rows"].items()}
    return [rows[number] for number in sorted(rows)]


def _report(rows: Sequence[dict[str, Any]], told: dict[str, Any], plain: str) -> RobustnessReport:
    """All batches together."""
    correct = tuple(c == "1" for row in rows for c in row["clean"])
    names = list(rows[0]["attacks"])
    if any(list(row["attacks"]) != names for row in rows):
        raise ValueError("Not all batches were attacked alike: they are of different versions. Give another file.")
    codes = {"1": True, "0": False, "-": None}
    attacks = []
    for name in names:
        parts = [row["attacks"][name] for row in rows]
        survived = tuple(codes[c] for part in parts for c in part[1])
        attacks.append(AttackResult(name, parts[0][0], survived, *(sum(part[i] for part in parts) for i in (2, 3, 4))))
    keys = {key for row in rows for key in row["probes"]}
    probes = {
        key: (max if key == "random" else sum)(row["probes"].get(key, 0.0) for row in rows) for key in sorted(keys)
    }
    evidence = evidence_of(
        {a.name: (a.source, a.survived) for a in attacks},
        correct,
        probes,
        non_finite=any(row["non_finite"] for row in rows),
        classes=rows[0]["classes"],
    )
    if plain:
        evidence[PLAIN_CHANGED] = float(plain == TRAINED)
    return RobustnessReport(
        **told, correct=correct, attacks=tuple(attacks), flags=flags_of(evidence, len(correct)), evidence=evidence
    )


def together(accelerator: Accelerator | None, work: Callable[[], Part]) -> list[Part]:
    """What `work` gives in every process. Where it fails in one it fails in all, so that none waits for it."""
    if accelerator is None or accelerator.num_processes == 1:
        return [work()]
    from accelerate.utils import gather_object

    failure: Exception | None = None
    mine: Part | None = None
    try:
        mine = work()
    except Exception as error:
        failure = error
    said = None if failure is None else f"{type(failure).__name__}: {failure}"
    everyone = gather_object([(mine, said)])
    if failure is not None:
        raise failure
    for rank, (_, told) in enumerate(everyone):
        if told is not None:
            raise RuntimeError(f"Process {rank} failed, and the evaluation with it: {told}")
    return [part for part, _ in everyone]


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


@contextmanager
def _heard() -> Iterator[list[str]]:
    """Every warning that is raised meanwhile; afterwards they are raised again."""
    told: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        yield told
        told += dict.fromkeys(str(warning.message) for warning in caught)
    for warning in caught:
        warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


def _versions() -> dict[str, str]:
    found = {"timm_nrpm": __version__, "torch": torch.__version__}
    for name in ("timm", "torchattacks"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    return found
