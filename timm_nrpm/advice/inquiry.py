"""The trials of one study: every strategy in its turn, the time that is left, and the verdict."""

from __future__ import annotations

import math
import shutil
import time
from dataclasses import asdict, replace

import torch
from rich.progress import Progress
from torch import nn

from timm_nrpm.advice.adaptation import ADAPTATION
from timm_nrpm.advice.lambdas import BY_LAYER, ESTIMATE, ONE_LAMBDA, STANDARD_UNITS
from timm_nrpm.advice.mixing import MIXING
from timm_nrpm.advice.smoothing import SMOOTHING
from timm_nrpm.advice.strategy import Candidate, Strategy
from timm_nrpm.advice.study import Study
from timm_nrpm.advice.tuning import TUNED_ALL, TUNED_LAMBDA, TUNED_LAYERS
from timm_nrpm.attacks.threats import Threat
from timm_nrpm.ensembles.folders import save_pretrained
from timm_nrpm.evaluation.report import GIVEN, REPROGRAMMED
from timm_nrpm.evaluation.trials import NOTHING, Advice, Trial
from timm_nrpm.hub.templates import EVALUATION, evaluation_json
from timm_nrpm.jobs.journal import Journal, digest_of
from timm_nrpm.models.reprogramming import identity_of, model_sha256, plain_copy
from timm_nrpm.models.saving import is_timm, save_loadable
from timm_nrpm.models.tensors import write_tensors
from timm_nrpm.nn.ensemble import Ensemble
from timm_nrpm.version import __version__

STRATEGIES: tuple[Strategy, ...] = (
    ADAPTATION, TUNED_LAYERS, TUNED_ALL, MIXING, STANDARD_UNITS, ONE_LAMBDA, ESTIMATE, BY_LAYER, TUNED_LAMBDA,
    SMOOTHING,
)  # fmt: skip
"""All strategies; first those that leave the model about as fast as it is, since they are the quickest to try."""

MORE_TRIED = 4.0
"""Expected number of passes of attacks on a reprogrammed model, in times those on the plain model."""

SHARE = 0.5
"""Largest share of the time left that a strategy may take."""

AS_IT_IS = Candidate("as it is", lambda: nn.Identity())


class _NoTime(Exception):
    """A candidate takes more than its share of the time, by an estimate of its seconds."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds


class Inquiry:
    """The trials of one study."""

    def __init__(self, study: Study, bar: Progress) -> None:
        self.study, self.bar = study, bar
        identity = {
            "model": model_sha256(study.model), **identity_of(study.on_pixels(study.model)),
            "threat": repr(study.danger), "clean_loss": study.bounds.clean_loss, "slowdown": study.bounds.slowdown,
            "effort": study.effort, "seed": study.seed,
            **{name: digest_of(part.pixels, part.labels) for name, part in study.parts.items()},
            "calibration": digest_of(torch.cat(study.calibration), torch.zeros(0)), "version": __version__,
        }  # fmt: skip
        self.journal = Journal(study.folder / "trials.jsonl", identity)
        self.known = {(row["strategy"], row["setting"], row["part"]): row for row in self.journal.rows.values()}
        self.trials: list[Trial] = []
        self.candidates: list[Candidate] = []
        self.untried: dict[str, str] = {}
        self.task = bar.add_task(f"{study.danger}: {NOTHING}", total=study.bounds.seconds)

    @property
    def spent(self) -> float:
        """Seconds that all trials took, in this run or an earlier one."""
        return sum(trial.seconds for trial in self.trials)

    def advice(self) -> Advice:
        """Try all strategies, and judge the best."""
        self._add(NOTHING, AS_IT_IS, math.inf)
        for strategy in STRATEGIES:
            if why := strategy.obstacle(self.study):
                self.untried[strategy.name] = why
                continue
            left = self.study.bounds.seconds - self.spent - self._reserve()
            self._try(strategy, left * SHARE)
        advice = self._judged()
        self.bar.update(self.task, completed=self.study.bounds.seconds, description=f"{self.study.danger}")
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
        try:
            trial = self._measured(strategy, candidate, until) if row is None else Trial.from_dict(row["trial"])
        except _NoTime as error:
            if strategy not in {each.strategy for each in self.trials}:
                self.untried[strategy] = self._no_time(until - self.spent, error.seconds)
            return None
        self.trials.append(trial)
        self.candidates.append(candidate)
        if row is None:
            self._write(trial, "selection")
        return trial

    def _no_time(self, share: float, needed: float) -> str:
        """Why a strategy was not tried that had some seconds and needed more."""
        every = f"{self.study.bounds.seconds:g} seconds"
        if share > 0:
            why = f"its first candidate takes about {needed:.0f} seconds, and its share of the {every} was {share:.0f}"
        else:
            why = f"to measure the model as it is took {self.trials[0].seconds:.0f} of {every}"
        return f"there was no time: {why}. Give more of them, or fewer images"

    def _measured(self, strategy: str, candidate: Candidate, until: float) -> Trial:
        """Measure a candidate on the selection images, or raise :class:`_NoTime`."""
        study, start = self.study, time.perf_counter()
        if self.spent + candidate.seconds > until:
            raise _NoTime(candidate.seconds)
        model = study.model if candidate is AS_IT_IS else candidate.make()
        slowdown = study.slowdown(model) * candidate.forwards
        trial = Trial(strategy, candidate.setting, slowdown, 0.0, control=candidate.control)
        if slowdown > study.bounds.slowdown:
            why = f"{slowdown:.1f} times the latency"
            return replace(trial, rejected=why, seconds=time.perf_counter() - start)
        kept = candidate.judged(model, "selection") if candidate.judged else None
        clean = kept.clean if kept else self._clean(candidate, model, "selection")
        if self.trials and self.trials[0].selection is not None:
            loss = (self.trials[0].selection.clean.count("1") - clean.count("1")) / len(clean) * 100
            if loss > study.bounds.clean_loss:
                why = f"loses {loss:.1f} points clean"
                return replace(trial, rejected=why, seconds=time.perf_counter() - start)
        if kept is not None:
            return replace(trial, selection=kept, seconds=time.perf_counter() - start)
        if self.trials and (why := self._beaten(model)):
            return replace(trial, rejected=why, seconds=time.perf_counter() - start)
        if isinstance(study.danger, Threat) and self.trials:
            expected = self.trials[0].seconds * self._passes(slowdown)
            needed = time.perf_counter() - start + expected
            if self.spent + needed > until:
                raise _NoTime(needed)
        plain = study.model if candidate.is_trained else None
        kept = study.kept(model, clean, "selection", candidate.setting, plain)
        return replace(trial, selection=kept, seconds=time.perf_counter() - start)

    def _clean(self, candidate: Candidate, model: nn.Module, part: str) -> str:
        """The images that a candidate is right on without the danger."""
        on_clean = model if candidate.on_clean is None else candidate.on_clean()
        return self.study.right(on_clean, self.study.parts[part].pixels, part)

    def _beaten(self, model: nn.Module) -> str:
        """Why a candidate cannot be the best: quick attacks bound what the adaptive suite can leave from above."""
        most = self.study.most(model)
        if most is None or most > self._advice().most:
            return ""
        return f"at most {100 * most:.1f} %, by quick attacks"

    def _reserve(self) -> float:
        """Seconds that the report images will take: the model as it is, and the best so far."""
        share = len(self.study.parts["report"].labels) / len(self.study.parts["selection"].labels)
        return self.trials[0].seconds * share * (1 + self._passes(self._advice().chosen.slowdown))

    def _passes(self, slowdown: float) -> float:
        """Expected time of measuring a candidate, in times that of the model as it is: more is tried against those that
        are reprogrammed, by as much as the last one of them showed."""
        if slowdown == 1:
            return 1.0
        slower = [each for each in self.trials if each.slowdown > 1 and each.selection is not None]
        if not slower:
            return slowdown * MORE_TRIED
        return slowdown * slower[-1].seconds / (slower[-1].slowdown * self.trials[0].seconds)

    def _judged(self) -> Advice:
        """The advice, after the best trials were measured on the report images."""
        advice = self._advice()
        gaining = [trial for trial in advice.best if trial in advice.allowed and self._gains(advice, trial)]
        ordered = sorted(gaining, key=lambda trial: -trial.selection.accuracy if trial.selection else 0.0)
        first = [advice.nothing, advice.chosen, advice.control(advice.chosen)]
        for trial in [*first, *(trial for trial in ordered if trial not in first)]:
            number = next(place for place, each in enumerate(self.trials) if each.setting == trial.setting)
            if self.trials[number].report is None and (trial in first or self.spent < self.study.bounds.seconds):
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
        if candidate.judged:
            kept = candidate.judged(model, "report")
        else:
            clean, plain = self._clean(candidate, model, "report"), study.model if candidate.is_trained else None
            kept = study.kept(model, clean, "report", candidate.setting, plain)
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
        """Write what is advised as a variant, with the report behind it; or the weights of a model that timm cannot
        build."""
        folder = self.study.folder / "variant"
        if not advice.helps:
            shutil.rmtree(folder, ignore_errors=True)  # of an earlier run, that had less time
            return
        candidate = self.candidates[self.trials.index(advice.advised)]
        if candidate.judged:
            return  # a vote is no variant: what it takes is in its setting, for certify and smoothed_predict
        model = candidate.make()
        if candidate.is_trained and not is_timm(model):
            write_tensors(plain_copy(model).state_dict(), self.study.folder / "weights.safetensors")
            return
        shutil.rmtree(folder, ignore_errors=True)  # an earlier run may have advised another kind
        if isinstance(model, Ensemble):
            save_pretrained(model, folder)
        else:
            save_loadable(model, folder)
        report, control = self.study.report_of(candidate.setting), self.study.report_of(AS_IT_IS.setting)
        if report is not None and control is not None:
            plain = GIVEN if candidate.is_trained else REPROGRAMMED
            text = evaluation_json([replace(report, control=control, plain=plain)])
            (folder / EVALUATION).write_text(text, encoding="utf-8")
