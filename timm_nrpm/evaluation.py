"""What a reprogrammed model is worth: every attack on every image, the worst case over them all, and its control."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from timm_nrpm.attacks import PixelModel
from timm_nrpm.base import weights_sha256
from timm_nrpm.flags import PROBED, RANDOM, THRESHOLDS, evidence_of, flags_of, probe, unlike
from timm_nrpm.images import check_labels, check_pixels
from timm_nrpm.journal import Journal, digest_of
from timm_nrpm.ordering import seed_of
from timm_nrpm.report import AttackResult, RobustnessReport
from timm_nrpm.reprogramming import attackable, plain_copy, reprogrammed_layers
from timm_nrpm.sources import Source, alike, sources_of
from timm_nrpm.suites import EFFORTS, Effort, attacks_of
from timm_nrpm.threats import Threat
from timm_nrpm.version import __version__

if TYPE_CHECKING:
    from accelerate import Accelerator

CALIBRATED = 1000
"""Images with which surrogates are calibrated."""

PROBE_STEPS = 10


def evaluate(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    threat: Threat | None = None,
    suite: str = "adaptive",
    *,
    steps: int | None = None,
    queries: int | None = None,
    seed: int = 0,
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
    `"adaptive"`, the default, also follows the plain model, the linear maps and smoother surrogates, with two losses
    and several targets, and searches at random. `"paper"` and `"standard"` are what others report, `"quick"` is FGSM,
    PGD and PGD from the plain model, see :func:`timm_nrpm.suites.attacks_of`.

    Args:
        model: Takes normalised images. Afterwards it is as before, modes, gradients and statistics included.
        loader: Batches of pixels `[B, C, H, W]` in [0, 1] and labels `[B]`; in the same order each time it is run.
        threat: The default is Linf with eps 8/255.
        suite: One of `timm_nrpm.suites.SUITES`.
        steps, queries: Of each attack, in place of the suite's own numbers.
        seed: Of everything random. Each image's part of it depends on its batch's place alone.
        base: Another model to make examples on, such as the one this was made from.
        control: Whether to put the plain model under the same attacks.
        mean, std: The model's normalisation, one number a channel; by default timm's for this model, and none for a
            model that is not timm's.
        resume: A file that keeps every batch once it is done: a run that was killed goes on there. With several
            processes, each has its own, with its rank at the end.
        accelerator: Shares the batches among its processes. Give a loader that it did not prepare.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: Pixels outside [0, 1], labels that are no classes, a setting outside its range, an empty loader, or
            a file of another run.

    Example:
        >>> report = evaluate(model, loader, Threat("Linf", 8 / 255), progress=True)
        >>> report.worst_case, report.control.worst_case, report.flags
        (0.417, 0.407, ("gradient_masking",))
    """
    if isinstance(loader, Iterator):
        raise ValueError(
            f"The loader is a {type(loader).__name__}, which gives its images once: give a DataLoader, or list(loader)."
        )
    threat = threat or Threat()
    if not isinstance(threat, Threat):
        raise ValueError(f'threat={threat!r} is no Threat: write Threat("Linf", 8 / 255).')
    effort = _effort(suite, steps, queries)
    attacks_of(suite, threat, effort, ("own",), 2)  # whether there are any, before anything is computed
    start, ours = time.perf_counter(), bool(reprogrammed_layers(model))
    sha256 = weights_sha256(model.state_dict())
    identity = {"threat": [threat.norm, threat.eps], "suite": suite, "seed": seed, "control": control}
    identity |= {"steps": effort.steps, "queries": effort.queries}
    identity |= {"timm_nrpm": __version__, "sha256 of the model": sha256}
    identity |= {"sha256 of the base": None if base is None else weights_sha256(base.state_dict())}
    identity |= PixelModel(model, mean, std).identity()
    rank, processes = (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)
    shard = resume if resume is None or processes == 1 else Path(f"{resume}.{rank}")
    journal = Journal(shard, {**identity, "processes": processes})
    with ExitStack() as stack:
        raised = stack.enter_context(_heard())
        bar = stack.enter_context(_bar(progress and rank == 0))
        for net in (model, base):
            if net is not None:
                stack.enter_context(attackable(net))
        options: dict[str, Any] = {"mean": mean, "std": std}
        calibration = _first_images(loader) if ours and suite == "adaptive" else []
        judges = [_Judge(sources_of(model, calibration, base=base, **options), threat, suite, effort, seed)]
        if control and ours:
            plain = Source(alike(plain_copy(model), judges[0].net), predicts=True)
            judges.append(_Judge({"own": plain}, threat, suite, effort, seed))
        total = len(loader) if isinstance(loader, Sized) else None
        task = bar.add_task("Evaluating", total=total)
        offset = 0
        for number, (pixels, labels) in enumerate(loader):
            check_pixels(pixels)  # in every process, so that none is left waiting
            digest = digest_of(pixels, labels)
            if number % processes == rank and not journal.has(number, digest):

                def tell(share: float, doing: str, judge: int, number: int = number) -> None:
                    done = number + (judge + share) / len(judges)
                    bar.update(task, completed=done, description=f"Evaluating: {doing}")

                judged = [judge(pixels, labels, offset, partial(tell, judge=i)) for i, judge in enumerate(judges)]
                journal.add(number, {"images": digest, "judged": judged})
            offset += len(labels)
            bar.update(task, completed=number + 1)
        rows = list(journal.rows.items())
        if accelerator is not None and processes > 1:
            from accelerate.utils import gather_object

            rows = gather_object(rows)
        if not rows or not offset:
            raise ValueError("The loader gave no images: there is nothing to evaluate.")
        found = [row["judged"] for _, row in sorted(rows)]
    told = {"versions": _versions(), "threat": threat, "suite": suite, "seed": seed}
    told |= {"steps": effort.steps, "queries": effort.queries}
    reports = [_report([judged[i] for judged in found], told) for i in range(len(judges))]
    seconds = time.perf_counter() - start
    beside = reports[1] if len(reports) > 1 else None
    return replace(reports[0], control=beside, sha256=sha256, warnings=tuple(raised), seconds=seconds)


class _Judge:
    """A model, and the attacks it has to withstand."""

    def __init__(self, sources: dict[str, Source], threat: Threat, suite: str, effort: Effort, seed: int) -> None:
        self.sources, self.threat, self.suite, self.effort, self.seed = sources, threat, suite, effort, seed
        self.net = sources["own"].net

    def __call__(
        self, images: Tensor, labels: Tensor, offset: int, tell: Callable[[float, str], None]
    ) -> dict[str, Any]:
        """What became of a batch, as JSON: `"1"` for an image still right, `"0"` wrong, `"-"` not attacked."""
        device = self.net.mean.device
        pixels, labels = images.to(device), labels.to(device)
        logits, again = self.logits(pixels), self.logits(pixels)
        classes = logits.shape[1]
        if classes < 2:
            raise ValueError(
                f"The model has {classes} class, and there is no other to be taken for: give one with more."
            )
        check_labels(labels, classes)
        labels, random = labels.long(), unlike(logits, again) > THRESHOLDS[RANDOM]
        right = _right(logits, labels)
        attacks = attacks_of(self.suite, self.threat, self.effort, self.sources, classes, random=random)
        left, outcomes = right.clone(), {}
        for place, attack in enumerate(attacks):
            tell(place / len(attacks), f"{attack.name}, {int(left.sum())} of {len(left)} left")
            rows = (right if attack.always else left).nonzero().squeeze(1)
            source = self.sources["own" if attack.source == "scores" else attack.source]
            before, start = self.passes(source), time.perf_counter()
            code = ["-"] * len(labels)
            if len(rows):
                # Attacks that are compared start from the same place, the others each from its own.
                seeds = [seed_of(self.seed, 0 if attack.always else place, offset + row) for row in rows.tolist()]
                with source.followed() as net:
                    attacked = attack.run(net, pixels[rows], labels[rows], seeds)
                attacked = self.fair(pixels[rows], attacked)
                survived = _right(self.logits(attacked), labels[rows])
                left[rows] &= survived
                for row, survives in zip(rows.tolist(), survived.tolist(), strict=True):
                    code[row] = str(int(survives))
            passes = [now - then for now, then in zip(self.passes(source), before, strict=True)]
            seconds = time.perf_counter() - start
            outcomes[attack.name] = [attack.source, "".join(code), *passes, seconds]
        probes: dict[str, float] = {}
        probed = right.nonzero().squeeze(1)[: max(0, PROBED - offset)]
        if self.suite == "adaptive" and len(probed):
            seeds = [seed_of(self.seed, -1, offset + row) for row in probed.tolist()]
            source, some = self.sources["own"], (pixels[probed], labels[probed])
            probes = probe(source, *some, self.threat, seeds, steps=PROBE_STEPS)
        clean = "".join(str(int(r)) for r in right.tolist())
        non_finite = any(source.net.non_finite for source in self.sources.values())
        return {"clean": clean, "attacks": outcomes, "probes": probes, "non_finite": non_finite, "classes": classes}

    @torch.no_grad()
    def logits(self, pixels: Tensor) -> Tensor:
        return self.net(pixels)

    def passes(self, source: Source) -> tuple[int, int]:
        """Images that went forwards and backwards so far."""
        nets = {id(net): net for net in (self.net, source.net)}.values()
        return sum(net.forwards for net in nets), sum(net.backwards for net in nets)

    def fair(self, pixels: Tensor, attacked: Tensor) -> Tensor:
        """What an attack found, brought back within the bound where it cheated."""
        honest = self.threat.allows(pixels, attacked)
        if bool(honest.all()):
            return attacked
        return torch.where(honest.view(-1, 1, 1, 1), attacked, self.threat.project(pixels, attacked.nan_to_num(0.0)))


def _right(logits: Tensor, labels: Tensor) -> Tensor:
    """Which predictions are right, `[B]`; where logits are not numbers there is none."""
    return (logits.argmax(1) == labels) & logits.isfinite().all(1)


def _report(rows: Sequence[dict[str, Any]], told: dict[str, Any]) -> RobustnessReport:
    """All batches together."""
    clean = tuple(c == "1" for row in rows for c in row["clean"])
    names = list(dict.fromkeys(name for row in rows for name in row["attacks"]))
    codes = {"1": True, "0": False, "-": None}
    attacks = []
    for name in names:
        parts = [row["attacks"].get(name, ["", "-" * len(row["clean"]), 0, 0, 0.0]) for row in rows]
        survived = tuple(codes[c] for part in parts for c in part[1])
        source = next(part[0] for part in parts if part[0])
        attacks.append(AttackResult(name, source, survived, *(sum(part[i] for part in parts) for i in (2, 3, 4))))
    keys = {key for row in rows for key in row["probes"]}
    probes = {
        key: (max if key == "random" else sum)(row["probes"].get(key, 0.0) for row in rows) for key in sorted(keys)
    }
    evidence = evidence_of(
        {a.name: (a.source, a.survived) for a in attacks},
        clean,
        probes,
        non_finite=any(row["non_finite"] for row in rows),
        classes=rows[0]["classes"],
    )
    return RobustnessReport(
        **told, clean=clean, attacks=tuple(attacks), flags=flags_of(evidence, len(clean)), evidence=evidence
    )


def _effort(suite: str, steps: int | None, queries: int | None) -> Effort:
    if suite not in EFFORTS:
        raise ValueError(f"suite={suite!r} is not known: choose one of {', '.join(EFFORTS)}.")
    effort = EFFORTS[suite]
    effort = Effort(effort.steps if steps is None else steps, effort.queries if queries is None else queries)
    if effort.steps < 1 or effort.queries < 0:
        raise ValueError(
            f"steps={steps} and queries={queries} are not allowed: an ascent needs a step at least, and a search no "
            "fewer than 0 queries."
        )
    return effort


def _first_images(loader: Iterable[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """Batches of pixels for surrogates: an attacker has the images, and needs no labels."""
    batches: list[Tensor] = []
    for pixels, _ in loader:
        check_pixels(pixels)
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


def _bar(shown: bool) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    return Progress(*columns, disable=not shown)


def _versions() -> dict[str, str]:
    found = {"timm_nrpm": __version__, "torch": torch.__version__}
    for name in ("timm", "torchattacks"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    return found
