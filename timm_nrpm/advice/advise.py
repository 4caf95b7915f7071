"""`advise`: what to do with a model, by trying what the package has, from cheap to dear, and judging on other images."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.progress import Progress
from torch import nn
from torch.utils.data import DataLoader

from timm_nrpm.advice.adaptation import ADAPTATION
from timm_nrpm.advice.lambdas import BY_LAYER, ESTIMATE, ONE_LAMBDA
from timm_nrpm.advice.strategy import Candidate, Strategy
from timm_nrpm.advice.study import Danger, Part, Study
from timm_nrpm.advice.tuning import TUNED_ALL, TUNED_LAMBDA, TUNED_LAYERS
from timm_nrpm.attacks.efforts import LEVELS
from timm_nrpm.attacks.threats import Threat
from timm_nrpm.checks import check_choice, check_integer, check_number
from timm_nrpm.config import NRPMConfig
from timm_nrpm.data.images import check_labels
from timm_nrpm.evaluation.report import GIVEN, REPROGRAMMED
from timm_nrpm.evaluation.shifts import Shift
from timm_nrpm.evaluation.trials import NOTHING, Advice, Bounds, Trial
from timm_nrpm.hub.cards import EVALUATION, evaluation_json
from timm_nrpm.jobs.journal import Journal, digest_of
from timm_nrpm.jobs.progress import progress_bar
from timm_nrpm.models.reprogramming import identity_of, model_sha256, plain_copy, reprogram_
from timm_nrpm.models.saving import save_loadable
from timm_nrpm.nn.wrappers import copied, subject_of
from timm_nrpm.version import __version__

STRATEGIES: tuple[Strategy, ...] = (
    ADAPTATION, ONE_LAMBDA, ESTIMATE, BY_LAYER, TUNED_LAMBDA, TUNED_LAYERS, TUNED_ALL,
)  # fmt: skip
"""All strategies, from cheap to dear."""

AS_IT_IS = Candidate("as it is", lambda: nn.Identity())


def advise(
    model: nn.Module,
    loader: Iterable[Any],
    threats: Danger | Sequence[Danger] = (Shift(), Threat()),
    *,
    selection: Iterable[Any] | None = None,
    training: DataLoader[Any] | None = None,
    clean_loss: float = 2.0,
    slowdown: float = 10.0,
    effect: float = 5.0,
    seconds: float = 600.0,
    effort: str = "fast",
    seed: int = 0,
    folder: str | Path | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    progress: bool = False,
) -> list[Advice]:
    """Find what to do with a model against threats: try every strategy, choose on some images, and judge on others.

    Strategies are tried from cheap to dear until the time is over: nothing, adaptation, one lambda, the estimate's eps,
    K and penalty, a lambda for each layer, and tuning of lambda, of a few layers and of all, each beside a control that
    costs as much. A candidate that is too slow, or loses too much clean accuracy, is not attacked. The best on the
    selection images, and the best of each other strategy that gains there, are then measured on the report images; the
    former is advised if its gain there can be told from chance. "Leave it as it is" is an answer as well.

    Args:
        model: A plain timm model, or a reprogrammed one, whose plain model is then advised on. It is not changed.
        loader: Batches of pixels `[B, C, H, W]` in [0, 1] and labels `[B]`, on which the advice is judged. All images
            are held in memory.
        threats: What the model is to withstand: a :class:`timm_nrpm.Threat`, a :class:`timm_nrpm.shifts.Shift`, or
            several. The default is the images as they are, and Linf 8/255.
        selection: Other images of the same kind, on which candidates are chosen. By default every second image of
            `loader`, in a random order, is taken for that.
        training: A DataLoader of training images and labels for calibration and tuning. Without it the images of the
            selection calibrate, and nothing is tuned.
        clean_loss: Largest loss of clean accuracy, in points.
        slowdown: Largest latency, in times the model's.
        effect: Smallest effect worth telling, in points: there have to be images enough for it.
        seconds: Time for each threat. What does not fit in is not begun, by an estimate.
        effort: How long the adaptive suite tries, as for :func:`timm_nrpm.evaluate`.
        seed: Seed of everything random.
        folder: Folder of the result: `advice.json` with all advice, and for each threat a folder with `trials.jsonl`,
            from which the same call goes on after an interruption, and, if something helps, `variant`, with its report,
            which can be pushed as it is. None writes nothing.
        mean, std: The model's normalisation, as for :func:`timm_nrpm.evaluate`.
        progress: Whether to show a progress bar.

    Returns:
        An :class:`timm_nrpm.evaluation.trials.Advice` for each threat.

    Raises:
        ValueError: There are too few images for the effect, images of one purpose are also among those of another,
            images have no labels, a setting is outside its range, or `folder` holds another run.

    Example:
        >>> for advice in timm_nrpm.advise(model, loader, Threat("Linf", 0.1), training=training_loader, seconds=1):
        ...     print(advice.sentence)
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
    net = subject.on_pixels()
    plain = reprogram_(copied(plain_copy(subject.model)), NRPMConfig(lam=1.0))
    parts = _divided(loader, selection, seed)
    with torch.no_grad():
        classes = net.eval()(parts[0].pixels[:1].to(net.mean.device)).shape[1]
    for part in parts:
        check_labels(part.labels, classes)
    _check_enough(parts[1], bounds)
    _check_apart(*parts, training)
    with TemporaryDirectory() as temporary, progress_bar(progress) as bar:
        place = Path(temporary) if folder is None else Path(folder)
        place.mkdir(parents=True, exist_ok=True)
        found = []
        for danger in dangers:
            where = place / str(danger).replace(" ", "-")
            where.mkdir(exist_ok=True)
            study = Study(
                plain, danger, parts[0], parts[1], training, bounds, effort, seed, where, subject.mean, subject.std
            )
            found.append(_Inquiry(study, bar).advice())
        if folder is not None:
            text = "[" + ",\n".join(advice.to_json() for advice in found) + "]\n"
            (place / "advice.json").write_text(text, encoding="utf-8")
    return found


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


class _Inquiry:
    """The trials of one study."""

    def __init__(self, study: Study, bar: Progress) -> None:
        self.study, self.bar = study, bar
        identity = {
            "model": model_sha256(study.model), **identity_of(study.on_pixels(study.model)),
            "threat": str(study.danger), "clean_loss": study.bounds.clean_loss, "slowdown": study.bounds.slowdown,
            "effort": study.effort, "seed": study.seed,
            **{name: digest_of(part.pixels, part.labels) for name, part in study.parts.items()},
            "calibration": digest_of(torch.cat(study.calibration), torch.zeros(0)), "version": __version__,
        }  # fmt: skip
        self.journal = Journal(study.folder / "trials.jsonl", identity)
        self.known = {(row["strategy"], row["setting"], row["part"]): row for row in self.journal.rows.values()}
        self.trials: list[Trial] = []
        self.candidates: list[Candidate] = []
        self.untried: dict[str, str] = {}
        self.factor = 4.0  # time of attacks on a reprogrammed model over that of as many passes of the plain one
        self.task = bar.add_task(f"{study.danger}: {NOTHING}", total=study.bounds.time)

    @property
    def spent(self) -> float:
        """Seconds that all trials took, in this run or an earlier one."""
        return sum(trial.seconds for trial in self.trials)

    def advice(self) -> Advice:
        """Try all strategies, and judge the best."""
        self._add(NOTHING, AS_IT_IS, math.inf)
        for place, strategy in enumerate(STRATEGIES):
            if why := strategy.obstacle(self.study):
                self.untried[strategy.name] = why
                continue
            left = self.study.bounds.time - self.spent - self._reserve()
            self._try(strategy, left / (len(STRATEGIES) - place))
        advice = self._judged()
        self.bar.update(self.task, completed=self.study.bounds.time, description=f"{self.study.danger}")
        self._save(advice)
        return advice

    def _try(self, strategy: Strategy, seconds: float) -> None:
        """Try the candidates of a strategy, until its share of the time is over."""
        until = self.spent + seconds
        candidates = strategy.candidates(self.study)
        candidate = next(candidates, None)
        while candidate is not None:
            self.bar.update(
                self.task,
                completed=self.spent,
                description=f"{self.study.danger}: {strategy.name}, {candidate.setting}",
            )
            trial = self._add(strategy.name, candidate, until)
            if trial is None:
                return
            try:
                candidate = candidates.send(trial)
            except StopIteration:
                return

    def _add(self, strategy: str, candidate: Candidate, until: float) -> Trial | None:
        """Try a candidate; None if there was no time for it."""
        row = self.known.get((strategy, candidate.setting, "selection"))
        trial = self._measured(strategy, candidate, until) if row is None else Trial.from_dict(row["trial"])
        if trial is None:
            if strategy not in {each.strategy for each in self.trials}:
                self.untried[strategy] = "there was no time"
            return None
        self.trials.append(trial)
        self.candidates.append(candidate)
        if row is None:
            self._write(trial, "selection")
        return trial

    def _measured(self, strategy: str, candidate: Candidate, until: float) -> Trial | None:
        """Measure a candidate on the selection images; None if its share of the time would not do."""
        study, start, number = self.study, time.perf_counter(), len(self.trials)
        if self.spent + candidate.seconds > until:
            return None
        model = study.model if candidate is AS_IT_IS else candidate.make()
        slowdown = study.slowdown(model)
        trial = Trial(strategy, candidate.setting, slowdown, 0.0, control=candidate.control)
        if slowdown > study.bounds.slowdown:
            why = f"{slowdown:.1f} times the latency"
            return replace(trial, rejected=why, seconds=time.perf_counter() - start)
        on_clean = model if candidate.on_clean is None else candidate.on_clean()
        clean = study.right(on_clean, study.parts["selection"].pixels, "selection")
        if self.trials and self.trials[0].selection is not None:
            loss = (self.trials[0].selection.clean.count("1") - clean.count("1")) / len(clean) * 100
            if loss > study.bounds.clean_loss:
                why = f"loses {loss:.1f} points clean"
                return replace(trial, rejected=why, seconds=time.perf_counter() - start)
        if isinstance(study.danger, Threat) and self.trials:
            passes = 1.0 if slowdown == 1 else slowdown * self.factor
            expected = self.trials[0].seconds * passes
            if self.spent + (time.perf_counter() - start) + expected > until:
                return None
        attacked = time.perf_counter()
        plain = study.model if candidate.is_trained else None
        kept = study.kept(model, clean, "selection", number, plain)
        if slowdown > 1 and self.trials:
            self.factor = (time.perf_counter() - attacked) / (self.trials[0].seconds * slowdown)
        return replace(trial, selection=kept, seconds=time.perf_counter() - start)

    def _reserve(self) -> float:
        """Seconds that the report images will take: the model as it is, and the best so far."""
        share = len(self.study.parts["report"].labels) / len(self.study.parts["selection"].labels)
        best = self._advice().chosen
        passes = 1.0 if best.slowdown == 1 else best.slowdown * self.factor
        return self.trials[0].seconds * share * (1 + passes)

    def _judged(self) -> Advice:
        """The advice, after the best trials were measured on the report images."""
        advice = self._advice()
        gaining = [trial for trial in advice.best if trial in advice.allowed and self._gains(advice, trial)]
        ordered = sorted(gaining, key=lambda trial: -trial.selection.accuracy if trial.selection else 0.0)
        first = [advice.nothing, advice.chosen, advice.control(advice.chosen)]
        for trial in [*first, *(trial for trial in ordered if trial not in first)]:
            number = next(place for place, each in enumerate(self.trials) if each.setting == trial.setting)
            if self.trials[number].report is None and (trial in first or self.spent < self.study.bounds.time):
                self._report(number)
        return self._advice()

    def _gains(self, advice: Advice, trial: Trial) -> bool:
        effect = advice.effect(trial, "selection")
        return effect is not None and effect.points > 0

    def _report(self, number: int) -> None:
        """Measure a trial on the report images."""
        trial, candidate, study = self.trials[number], self.candidates[number], self.study
        row = self.known.get((trial.strategy, trial.setting, "report"))
        if row is not None:
            self.trials[number] = Trial.from_dict(row["trial"])
            return
        self.bar.update(self.task, description=f"{study.danger}: judging {trial.strategy}, {trial.setting}")
        start = time.perf_counter()
        model = study.model if candidate is AS_IT_IS else candidate.make()
        on_clean = model if candidate.on_clean is None else candidate.on_clean()
        clean = study.right(on_clean, study.parts["report"].pixels, "report")
        kept = study.kept(model, clean, "report", number, study.model if candidate.is_trained else None)
        seconds = trial.seconds + time.perf_counter() - start
        self.trials[number] = replace(trial, report=kept, seconds=seconds)
        self._write(self.trials[number], "report")

    def _write(self, trial: Trial, part: str) -> None:
        row = {"strategy": trial.strategy, "setting": trial.setting, "part": part, "trial": asdict(trial)}
        self.journal.add(len(self.journal.rows), row)

    def _advice(self) -> Advice:
        study = self.study
        return Advice(str(study.danger), study.bounds, tuple(self.trials), dict(self.untried), study.seed)

    def _save(self, advice: Advice) -> None:
        """Write what is advised as a variant, with the report behind it."""
        if not advice.helps:
            return
        number = self.trials.index(advice.advised)
        candidate, folder = self.candidates[number], self.study.folder / "variant"
        save_loadable(candidate.make(), folder)
        report, control = self.study.report_of(number), self.study.report_of(0)
        if report is not None and control is not None:
            plain = GIVEN if candidate.is_trained else REPROGRAMMED
            text = evaluation_json([replace(report, control=control, plain=plain)])
            (folder / EVALUATION).write_text(text, encoding="utf-8")
