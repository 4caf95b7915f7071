"""What an evaluation found: a frozen record of every attack on every image, and the worst case over them all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from timm_nrpm.attacks.threats import Threat

CONFIDENCE = 0.95

SIGNIFICANT = 0.05
"""Largest p of McNemar's test at which a difference from the plain model is called one."""

REPROGRAMMED, GIVEN, TRAINED = "reprogrammed", "given", "trained"
"""Which plain model stands beside a reprogrammed one: the one that was reprogrammed; the one given as `base`, where
weights were trained since; or else the same weights at lambda 1."""

NAMES = {REPROGRAMMED: "the plain model", GIVEN: "the model it was made from", TRAINED: "the same weights at lambda 1"}
"""What a verdict calls them."""


@dataclass(frozen=True)
class AttackResult:
    """One attack.

    Attributes:
        name: Such as `"apgd_margin_plain"`.
        source: Whose gradient it followed, see :func:`timm_nrpm.sources.sources_of`; `"scores"` for none, `"best"` for
            none from the worst points that others found.
        survived: For each image whether it was still right, of an attack that took several turns after its last; None
            where it was wrong before and not attacked.
        forwards, backwards: Images that went through a model, and gradients that came back, for this attack.
        seconds: For all of it.
    """

    name: str
    source: str
    survived: tuple[bool | None, ...] = field(repr=False)
    forwards: int
    backwards: int
    seconds: float = field(compare=False)

    @property
    def tried(self) -> int:
        """How many images it attacked."""
        return sum(s is not None for s in self.survived)

    @property
    def broke(self) -> int:
        """How many of them it got wrong."""
        return sum(s is False for s in self.survived)


@dataclass(frozen=True)
class RobustnessReport:
    """Accuracies from 0 to 1, and the images behind them.

    Attributes:
        threat: What an attacker may change.
        suite: Which attacks.
        steps, queries: Gradients of an ascent, and forwards of a search; see :class:`timm_nrpm.attacks.efforts.Effort`.
        rounds, evolutions: How many of both the adaptive suite had.
        seed: Of everything random.
        correct: Whether each image was right when nobody attacked it.
        attacks: In the order in which they were tried. An image that was wrong is attacked no more, but by those that
            are there for comparison.
        flags: Reasons not to believe the accuracies under the model's own gradient; `docs/flags.md` explains each.
        evidence: The numbers behind the flags.
        control: The plain model under the same attacks.
        plain: Which plain model that is: `"reprogrammed"`, the one that was reprogrammed; `"given"`, the one given as
            `base`; or `"trained"`, the same weights at lambda 1.
        versions: Of what computed it.
        sha256: :func:`timm_nrpm.reprogramming.model_sha256` of the model: weights, statistics, lambdas, estimates.
        data: What the images are, in words, such as `"cifar10, test"`.
        warnings: Every warning raised meanwhile.
        seconds: For all of it.

    Example:
        >>> report = evaluate(model, loader, Threat("Linf", 8 / 255))
        >>> report.clean, report.worst_case, report.interval()
        (0.682, 0.364, (0.322, 0.408))
        >>> report.verdict
        'At Linf 0.03137 this variant keeps 36.4 % (32.2 to 40.8) of 500 images in the worst case, ...'
        >>> RobustnessReport.from_json(report.to_json()) == report
        True
    """

    threat: Threat
    suite: str
    steps: int
    queries: int
    seed: int
    correct: tuple[bool, ...] = field(repr=False)
    attacks: tuple[AttackResult, ...] = field(repr=False)
    flags: tuple[str, ...] = ()
    evidence: Mapping[str, float] = field(default_factory=dict, repr=False)
    control: RobustnessReport | None = field(default=None, repr=False)
    plain: str = field(default=REPROGRAMMED, repr=False)
    rounds: int = field(default=0, repr=False)
    evolutions: int = field(default=0, repr=False)
    versions: Mapping[str, str] = field(default_factory=dict, repr=False)
    sha256: str = field(default="", repr=False)
    data: str = ""
    warnings: tuple[str, ...] = field(default=(), repr=False)
    seconds: float = field(default=0.0, repr=False, compare=False)

    @property
    def samples(self) -> int:
        return len(self.correct)

    @property
    def clean(self) -> float:
        """Share of the images that are right when nobody attacks them."""
        return sum(self.correct) / self.samples

    @property
    def survivors(self) -> tuple[bool, ...]:
        """Whether each image was right under every attack."""
        found = list(self.correct)
        for attack in self.attacks:
            found = [s and h is not False for s, h in zip(found, attack.survived, strict=True)]
        return tuple(found)

    @property
    def worst_case(self) -> float:
        """Share of the images that no attack changed: what an attacker who may choose the attack leaves."""
        return sum(self.survivors) / self.samples

    def accuracy(self, attack: str = "clean") -> float:
        """Share of the images that are right under `attack`, those counting as wrong that it found wrong already."""
        if attack == "clean":
            return self.clean
        for result in self.attacks:
            if result.name == attack:
                return sum(s is True for s in result.survived) / self.samples
        raise ValueError(
            f"{attack!r} is not in this report: it has {', '.join(('clean', *(a.name for a in self.attacks)))}."
        )

    def interval(self, share: float | None = None) -> tuple[float, float]:
        """Where the worst case, or another share, of all images like these is in 95 of 100 such samples (Clopper and
        Pearson's exact interval)."""
        from scipy.stats import binomtest

        right = round((self.worst_case if share is None else share) * self.samples)
        low, high = binomtest(right, self.samples).proportion_ci(CONFIDENCE, method="exact")
        return float(low), float(high)

    @property
    def name(self) -> str:
        """What the share of the images that survived is called: the worst case only where the suite is adaptive."""
        return "worst case" if self.suite == "adaptive" else f"all attacks of {self.suite}"

    @property
    def apart(self) -> tuple[int, int] | None:
        """Images that survive in this model alone, and in the plain one alone; None without a control."""
        if self.control is None or self.control.samples != self.samples:
            return None
        pairs = list(zip(self.survivors, self.control.survivors, strict=True))
        return sum(a and not b for a, b in pairs), sum(b and not a for a, b in pairs)

    @property
    def p_value(self) -> float | None:
        """Of McNemar's exact test: how probable it is that the images that survive in one model alone fall so unevenly,
        or more so, where both models are equally robust. None without a control."""
        from scipy.stats import binomtest

        if self.apart is None:
            return None
        return float(binomtest(self.apart[0], sum(self.apart), 0.5).pvalue) if sum(self.apart) else 1.0

    @property
    def verdict(self) -> str:
        """What it all comes to, in one sentence."""
        low, high = (100 * share for share in self.interval())
        where = (
            "in the worst case" if self.suite == "adaptive" else f"under the suite {self.suite}, which is no worst case"
        )
        kept = f"{100 * self.worst_case:.1f} % ({low:.1f} to {high:.1f}) of {self.samples} images {where}"
        if self.apart is None or self.control is None:
            return f"At {self.threat} this model keeps {kept}; nothing stands beside it."
        (ours, theirs), p = self.apart, self.p_value
        beside = (
            f"At {self.threat} this variant keeps {kept}, {NAMES[self.plain]} {100 * self.control.worst_case:.1f} %"
        )
        test = f"McNemar's exact test, p = {p:.2g}"
        if p is not None and p <= SIGNIFICANT:
            more, fewer, word = (ours, theirs, "better") if ours > theirs else (theirs, ours, "worse")
            return f"{beside}: it is {word}, by {more} images against {fewer} ({test})."
        return f"{beside}: no difference can be told, {ours} images against {theirs} ({test})."

    def __str__(self) -> str:
        lines = [f"FLAGS: {', '.join(self.flags)}. See docs/flags.md."] if self.flags else []
        plain = "" if self.control is None else f"; {NAMES[self.plain]} {100 * self.control.clean:.1f} %"
        lines += [
            self.verdict,
            f"{self.samples} images, {self.threat}, {self.suite}: clean {100 * self.clean:.1f} %{plain}",
        ]
        width = max((len(a.name) for a in self.attacks), default=0)
        for a in self.attacks:
            told = f"of {a.tried} images {a.broke} broken"
            lines.append(f"  {a.name:{width}}  {100 * self.accuracy(a.name):5.1f} %  {told}, {a.seconds:.1f} s")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def to_json(self) -> str:
        """JSON, with the accuracies beside the images they come from."""
        shares = {name: self.accuracy(name) for name in ("clean", *(a.name for a in self.attacks))}
        summary = {
            "verdict": self.verdict,
            "flags": self.flags,
            "worst_case": self.worst_case,
            "interval": self.interval(),
            "accuracies": shares,
        }
        return json.dumps({"summary": summary, **self.to_dict()})

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> RobustnessReport:
        """What :meth:`to_dict` gave. A ValueError, LookupError or TypeError for anything else."""
        fields = {key: value for key, value in data.items() if key != "summary"}
        attacks = (AttackResult(**{**a, "survived": tuple(a["survived"])}) for a in data["attacks"])
        fields |= {"threat": Threat(**data["threat"]), "attacks": tuple(attacks), "correct": tuple(data["correct"])}
        fields |= {"flags": tuple(data["flags"]), "warnings": tuple(data["warnings"])}
        if data["control"] is not None:
            fields["control"] = cls.from_dict(data["control"])
        texts = (*fields["flags"], *fields["warnings"], fields.get("data", ""), fields["suite"])
        if fields.get("plain", REPROGRAMMED) not in NAMES:
            raise ValueError(f"This is no report: plain={fields.get('plain')!r} is none of {', '.join(NAMES)}.")
        outcomes = [fields["correct"], *(attack.survived for attack in fields["attacks"])]
        if not all(isinstance(text, str) for text in texts) or not fields["correct"]:
            raise ValueError("This is no report: it has no images, or flags, warnings or names that are no text.")
        if any(len(row) != len(fields["correct"]) or set(map(type, row)) - {bool, type(None)} for row in outcomes):
            raise ValueError("This is no report: its attacks were on other images than it counts.")
        return cls(**fields)

    @classmethod
    def from_json(cls, text: str) -> RobustnessReport:
        return cls.from_dict(json.loads(text))
