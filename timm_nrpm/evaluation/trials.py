"""Result of advice: everything that was tried on a model against one threat, its worth, and what follows from it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from timm_nrpm.evaluation.intervals import paired
from timm_nrpm.evaluation.report import SIGNIFICANT, mcnemar

NOTHING = "nothing"
"""Name of the strategy that leaves the model as it is, the first trial of all."""

NEAR = 0.9
"""Share of the largest gain on the selection images that a trial needs to be chosen for losing less clean accuracy."""


def digits_of(right: Iterable[bool]) -> str:
    """A digit for each image, 1 where a model is right."""
    return "".join(str(int(each)) for each in right)


@dataclass(frozen=True)
class Kept:
    """The images that a model is right on.

    Attributes:
        clean: A digit for each image, 1 where the model is right without the threat.
        threat: A digit for each image, 1 where it is right under the threat.
    """

    clean: str
    threat: str

    @property
    def clean_accuracy(self) -> float:
        """Share of the images that are right without the threat, from 0 to 1."""
        return self.clean.count("1") / len(self.clean)

    @property
    def accuracy(self) -> float:
        """Share of the images that are right under the threat, from 0 to 1."""
        return self.threat.count("1") / len(self.threat)


@dataclass(frozen=True)
class Effect:
    """The paired difference between two models on the same images.

    Attributes:
        points: Difference of their accuracies, in points.
        low, high: The 95 % interval, see :func:`timm_nrpm.intervals.paired`.
        p_value: That of McNemar's exact test.
    """

    points: float
    low: float
    high: float
    p_value: float

    @classmethod
    def of(cls, ours: str, theirs: str) -> Effect:
        """The effect of a model over another, from the images that each is right on, as in :class:`Kept`."""
        pairs = list(zip(ours, theirs, strict=True))
        more, fewer = (sum(pair == each for pair in pairs) for each in (("1", "0"), ("0", "1")))
        low, high = (100 * end for end in paired(more, fewer, len(pairs)))
        return cls(100 * (more - fewer) / len(pairs), low, high, mcnemar(more, fewer))

    @property
    def is_gain(self) -> bool:
        """Whether the effect is a gain that can be told from chance."""
        return self.points > 0 and self.p_value <= SIGNIFICANT

    def __str__(self) -> str:
        return f"{self.points:+.1f} ({self.low:+.1f} to {self.high:+.1f})"


@dataclass(frozen=True)
class Trial:
    """A model that was tried against a threat.

    Attributes:
        strategy: Name of the strategy that made it.
        setting: Its settings, in words.
        slowdown: Latency over that of the model as it is.
        seconds: Time that making and measuring it took, in seconds.
        rejected: Reason why it was not measured under the threat; empty if it was.
        control: Setting of the trial with the same cost that has no estimate, such as the plain model tuned alike;
            empty if the model as it is, is the control.
        selection: Images of the selection that it is right on; None if it was rejected.
        report: Images of the report that it is right on; None if it was not measured there.
    """

    strategy: str
    setting: str
    slowdown: float
    seconds: float
    rejected: str = ""
    control: str = ""
    selection: Kept | None = None
    report: Kept | None = None

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Trial:
        parts = {name: data[name] and Kept(**data[name]) for name in ("selection", "report")}
        return cls(**{**data, **parts})


@dataclass(frozen=True)
class Bounds:
    """What an advised model may cost, and what it has to bring.

    Attributes:
        clean_loss: Largest loss of clean accuracy, in points.
        slowdown: Largest latency, in times that of the model as it is.
        effect: Smallest effect that has to be told from chance, in points.
        seconds: Time that may be spent on trials.
    """

    clean_loss: float = 2.0
    slowdown: float = 10.0
    effect: float = 5.0
    seconds: float = 480.0

    @property
    def images(self) -> int:
        """Number of report images on which the effect can just be told, if nothing speaks against it.

        McNemar's exact test asks for six images at least that only the better model is right on: 2 / 2^6 < 0.05.
        """
        return math.ceil(600 / self.effect)


@dataclass(frozen=True)
class Advice:
    """What to do with a model against one threat.

    The best trial is chosen on the selection images alone, and is advised only if the report images, which nothing was
    chosen on, show a gain that can be told from chance, within the bounds.

    Attributes:
        threat: The threat, in words.
        bounds: What an advised model may cost.
        trials: All trials in their order, whose settings differ; the first is the model as it is.
        untried: Reason why a strategy was not tried, by its name.
        seed: Seed of everything random.

    Example:
        >>> advice = advise(model, loader, Shift("salt_and_pepper"), effect=50, seconds=1)[0]
        >>> advice.trials[0].strategy, advice.chosen.strategy, advice.helps
        ('nothing', ..., ...)
        >>> Advice.from_json(advice.to_json()) == advice
        True
    """

    threat: str
    bounds: Bounds
    trials: tuple[Trial, ...]
    untried: dict[str, str]
    seed: int = 0

    @property
    def nothing(self) -> Trial:
        """The model as it is."""
        return self.trials[0]

    def loss(self, trial: Trial, part: str = "selection") -> float:
        """Clean accuracy that a trial loses on the images of the selection or the report, in points."""
        ours, theirs = getattr(trial, part), getattr(self.nothing, part)
        return 100 * (theirs.clean.count("1") - ours.clean.count("1")) / len(ours.clean)

    @property
    def allowed(self) -> tuple[Trial, ...]:
        """Trials within the bounds on the selection images, the model as it is first."""
        return tuple(t for t in self.trials if t.selection is not None and self.loss(t) <= self.bounds.clean_loss)

    @property
    def best(self) -> tuple[Trial, ...]:
        """The best trial of each strategy on the selection images, or one that was rejected where all were."""
        best: dict[str, Trial] = {}
        for trial in self.trials:
            if trial.strategy not in best or _score(self, trial) > _score(self, best[trial.strategy]):
                best[trial.strategy] = trial
        return tuple(best.values())

    @property
    def most(self) -> float:
        """Largest share of the selection images that a trial within the bounds keeps."""
        return max(_accuracy(trial) for trial in self.allowed)

    @property
    def chosen(self) -> Trial:
        """The trial on the selection images within the bounds that loses the least clean accuracy, of those with nearly
        the largest gain; of equal ones the fastest, of these the one with the larger gain, and then the first."""
        nothing = _accuracy(self.nothing)
        if self.most <= nothing:
            return self.nothing
        enough = nothing + NEAR * (self.most - nothing)
        near = [trial for trial in self.allowed if _accuracy(trial) >= enough - 1e-9]
        return min(near, key=lambda trial: (self.loss(trial), trial.slowdown, -_accuracy(trial)))

    @property
    def advised(self) -> Trial:
        """The chosen trial; or its control, if the report images cannot tell it from that by a gain."""
        chosen = self.chosen
        if not chosen.control:
            return chosen
        control = self.control(chosen)
        if control is self.nothing or chosen.report is None or control.report is None:
            return chosen
        return chosen if Effect.of(chosen.report.threat, control.report.threat).is_gain else control

    def control(self, trial: Trial) -> Trial:
        """The trial that costs as much and has no estimate; the model as it is, if none was allowed."""
        controls = [each for each in self.trials if each.setting == trial.control and each.selection is not None]
        return controls[0] if controls else self.nothing

    def effect(self, trial: Trial, part: str = "report") -> Effect | None:
        """The effect of a trial over the model as it is; None if it was not measured on those images."""
        ours, theirs = getattr(trial, part), getattr(self.nothing, part)
        return None if ours is None or theirs is None else Effect.of(ours.threat, theirs.threat)

    @property
    def helps(self) -> bool:
        """Whether the advised trial is worth its costs, by the report images."""
        effect = self.effect(self.advised)
        if self.advised is self.nothing or effect is None or not effect.is_gain:
            return False
        return self.loss(self.advised, "report") <= self.bounds.clean_loss

    @property
    def sentence(self) -> str:
        """The advice, in one sentence."""
        chosen, effect = self.advised, self.effect(self.advised)
        if len(self.trials) == 1:
            return f"Against {self.threat}, nothing can be advised: nothing was tried, and the table says why."
        if chosen is self.nothing:
            return f"Against {self.threat}, leave the model as it is: nothing that was tried gains on the selection."
        where = f"{chosen.strategy} ({chosen.setting})"
        if effect is None:
            return (
                f"Against {self.threat}, nothing can be advised yet: {where} gains on the selection, but the time "
                "was over before it was measured on the report images."
            )
        images = f"{len(self.nothing.report.threat)} images" if self.nothing.report else ""
        shown = f"{effect} points on {images} that nothing was chosen on, p = {effect.p_value:.2g}"
        loss = self.loss(chosen, "report")
        if self.helps:
            cost = f"{loss:+.1f} points of clean accuracy lost and {chosen.slowdown:.1f} times the latency"
            return f"Against {self.threat}, {where}: {shown}, at {cost}."
        why = self._too_much() if effect.is_gain else "which cannot be told from chance"
        return f"Against {self.threat}, leave the model as it is: the best, {where}, has {shown}, {why}."

    def _too_much(self) -> str:
        """What the advised trial loses on the clean images of the report, and whether these can tell."""
        ours, theirs, bound = self.advised.report, self.nothing.report, self.bounds.clean_loss
        assert ours is not None
        assert theirs is not None
        lost = Effect.of(theirs.clean, ours.clean)
        tell = "" if lost.low > bound else "; with more images it might turn out to be less"
        interval = f"({lost.low:.1f} to {lost.high:.1f})"
        return f"but it loses {lost.points:.1f} points clean {interval}, more than {bound:g}{tell}"

    def __str__(self) -> str:
        head = ("strategy", "its best setting", "selection", "report", "p", "clean lost", "slowdown", "seconds")
        rows = [head, *(_row(self, trial) for trial in self.best)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        left = [f"not tried: {name}, since {why}" for name, why in self.untried.items()]
        return "\n".join([*lines, *left, self.sentence])

    def to_json(self) -> str:
        """The advice as JSON, with its sentence."""
        return json.dumps({**asdict(self), "helps": self.helps, "sentence": self.sentence})

    @classmethod
    def from_json(cls, text: str) -> Advice:
        data = json.loads(text)
        trials = tuple(map(Trial.from_dict, data["trials"]))
        return cls(data["threat"], Bounds(**data["bounds"]), trials, data["untried"], data["seed"])


def _accuracy(trial: Trial) -> float:
    """Share of the selection images that a trial keeps."""
    return trial.selection.accuracy if trial.selection else 0.0


def _score(advice: Advice, trial: Trial) -> tuple[bool, float]:
    """The order of trials of one strategy: those within the bounds first, then by accuracy under the threat."""
    if trial.selection is None:
        return False, -1.0
    return advice.loss(trial) <= advice.bounds.clean_loss, trial.selection.accuracy


def _row(advice: Advice, trial: Trial) -> tuple[str, ...]:
    """The cells of a trial in the table."""
    seconds = sum(each.seconds for each in advice.trials if each.strategy == trial.strategy)
    costs = f"{trial.slowdown:.1f}", f"{seconds:.0f}"
    if trial.selection is None:
        return trial.strategy, trial.setting, trial.rejected, "", "", "", *costs
    if trial is advice.nothing:
        shown = [f"{100 * each.accuracy:.1f} %" if each else "" for each in (trial.selection, trial.report)]
        return trial.strategy, trial.setting, *shown, "", "", *costs
    selection, report = advice.effect(trial, "selection"), advice.effect(trial)
    loss = f"{advice.loss(trial, 'report' if report else 'selection'):+.1f}"
    cells = (str(selection), "" if report is None else str(report), "" if report is None else f"{report.p_value:.2g}")
    return trial.strategy, trial.setting, *cells, loss, *costs
