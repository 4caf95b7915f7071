"""Report of an evaluation: a frozen record of every attack on every image, and the worst case over all attacks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from timm_nrpm.attacks.threats import Threat
from timm_nrpm.evaluation.disparity import Disparity, by_class
from timm_nrpm.evaluation.intervals import exact

SIGNIFICANT = 0.05
"""Largest p-value of McNemar's test at which a difference from the plain model counts as significant."""

REPROGRAMMED, GIVEN, TRAINED, MEMBER = "reprogrammed", "given", "trained", "member"
"""Plain models that a reprogrammed one may be compared with: the one that was reprogrammed; if weights were trained
since, the one given as `base`; or else the same weights at lambda 1. An ensemble is compared with a member of it."""

NAMES = {
    REPROGRAMMED: "the plain model",
    GIVEN: "the model it was made from",
    TRAINED: "the same weights at lambda 1",
    MEMBER: "the member that it is compared with",
}
"""Names of these plain models in a verdict."""


def mcnemar(more: int, fewer: int) -> float:
    """P-value of McNemar's exact test; `more` images only one model is right on, and `fewer` only the other."""
    from scipy.stats import binomtest

    return float(binomtest(more, more + fewer, 0.5).pvalue) if more + fewer else 1.0


@dataclass(frozen=True)
class AttackResult:
    """Result of one attack.

    Attributes:
        name: Name of the attack, such as `"ascent_plain"`.
        source: Source whose gradient it followed, see :func:`timm_nrpm.sources.sources_of`; `"scores"` for an attack
            without gradients, and `"best"` for one that starts from the worst points that other attacks found.
        survived: Whether the model was still right on each image after the last turn of the attack; None where it was
            wrong before, and the image was not attacked.
        forwards, backwards: Number of images in all forwards, and in all backwards, of this attack.
        seconds: Time of the attack, in seconds.
    """

    name: str
    source: str
    survived: tuple[bool | None, ...] = field(repr=False)
    forwards: int
    backwards: int
    seconds: float = field(compare=False)

    @property
    def tried(self) -> int:
        """Number of images that it attacked."""
        return sum(s is not None for s in self.survived)

    @property
    def broke(self) -> int:
        """Number of images that it broke, so that the model is wrong on them."""
        return sum(s is False for s in self.survived)


@dataclass(frozen=True)
class RobustnessReport:
    """Accuracies from 0 to 1, and the images behind them.

    Attributes:
        threat: What an attacker may change.
        suite: Name of the suite of attacks, one of `timm_nrpm.choices.SUITES`.
        steps, queries: Number of gradients of an ascent, and number of forwards of a random search; see
            :class:`timm_nrpm.attacks.efforts.Effort`.
        rounds, evolutions: Numbers of rounds and of evolutions in the adaptive suite; 0 in other suites.
        seed: Seed of everything random in the attacks.
        correct: Whether the model was right on each image without an attack.
        attacks: Results of the attacks, in the order in which they first ran. Images that are already wrong are
            attacked only by the attacks that serve for comparison.
        flags: Reasons not to believe the accuracies under the model's own gradient; `docs/flags.md` explains each.
        evidence: Numbers that the flags are based on, by flag.
        control: Report of the plain model under the same attacks; None if there was no such model.
        plain: Kind of this plain model: `"reprogrammed"`, the one that was reprogrammed; `"given"`, the one given as
            `base`; `"trained"`, the same weights at lambda 1; or `"member"`, a member of an ensemble.
        versions: Versions of the libraries, by name.
        sha256: Hash of the model's weights, statistics, lambdas and estimates, by
            :func:`timm_nrpm.reprogramming.model_sha256`.
        data: Description of the images, such as `"cifar10, test"`.
        warnings: Texts of the warnings raised during the evaluation.
        seconds: Time of the whole evaluation, in seconds.
        labels: Class of each image; empty in a report of an earlier version, which has no classes to compare.

    Example:
        >>> report = evaluate(model, loader, Threat("Linf", 0.12), effort="fast")
        >>> report.clean, report.worst_case, report.interval()
        (1.0, 0.6, (0.4, 0.8))
        >>> report.verdict
        "At Linf 0.12 this variant keeps ... % (... to ...) of 32 images in the worst case, the plain model ... %: ..."
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
    labels: tuple[int, ...] = field(default=(), repr=False)

    @property
    def samples(self) -> int:
        return len(self.correct)

    @property
    def clean(self) -> float:
        """Share of the images that are right without an attack."""
        return sum(self.correct) / self.samples

    @property
    def own_gradient(self) -> float | None:
        """Accuracy under PGD along the model's own gradient, which is the paper's protocol; None if it was not run."""
        return self.accuracy("pgd") if any(attack.name == "pgd" for attack in self.attacks) else None

    @property
    def survivors(self) -> tuple[bool, ...]:
        """Whether the model was right on each image under every attack."""
        survivors = list(self.correct)
        for attack in self.attacks:
            survivors = [s and a is not False for s, a in zip(survivors, attack.survived, strict=True)]
        return tuple(survivors)

    @property
    def worst_case(self) -> float:
        """Share of the images that are right under every attack, whichever of them an attacker chooses."""
        return sum(self.survivors) / self.samples

    def accuracy(self, attack: str = "clean") -> float:
        """Return the share of the images that are right under `attack`; images wrong before it count as wrong."""
        if attack == "clean":
            return self.clean
        for result in self.attacks:
            if result.name == attack:
                return sum(s is True for s in result.survived) / self.samples
        raise ValueError(
            f"{attack!r} is not in this report: it has {', '.join(('clean', *(a.name for a in self.attacks)))}."
        )

    def interval(self, share: float | None = None) -> tuple[float, float]:
        """Return the 95 % confidence interval of the worst case, or of another share of the images (the exact interval
        of Clopper and Pearson)."""
        return exact(round((self.worst_case if share is None else share) * self.samples), self.samples)

    @property
    def name(self) -> str:
        """Name of the share of the images that survived; it is the worst case only if the suite is adaptive."""
        return "worst case" if self.suite == "adaptive" else f"all attacks of {self.suite}"

    @property
    def apart(self) -> tuple[int, int] | None:
        """Number of images that survive only in this model, and only in the plain one; None without a control."""
        if self.control is None or self.control.samples != self.samples:
            return None
        pairs = list(zip(self.survivors, self.control.survivors, strict=True))
        return sum(a and not b for a, b in pairs), sum(b and not a for a, b in pairs)

    @property
    def p_value(self) -> float | None:
        """P-value of McNemar's exact test: the probability that the images which survive in only one of the two models
        are divided as unevenly or more, if both models are equally robust. None without a control."""
        return None if self.apart is None else mcnemar(*self.apart)

    @property
    def comparison(self) -> str | None:
        """`"better"` or `"worse"` where McNemar's test tells this model from the plain one, else empty; None without a
        control."""
        if self.apart is None or self.p_value is None:
            return None
        ours, theirs = self.apart
        return "" if self.p_value > SIGNIFICANT else "better" if ours > theirs else "worse"

    @property
    def where(self) -> str:
        """Under what attacks the share of the images survived, in words."""
        return (
            "in the worst case" if self.suite == "adaptive" else f"under the suite {self.suite}, which is no worst case"
        )

    @property
    def verdict(self) -> str:
        """Result of the evaluation, in one sentence."""
        low, high = (100 * share for share in self.interval())
        kept = f"{100 * self.worst_case:.1f} % ({low:.1f} to {high:.1f}) of {self.samples} images {self.where}"
        if self.apart is None or self.control is None:
            return f"At {self.threat} this model keeps {kept}; nothing stands beside it."
        (ours, theirs), p = self.apart, self.p_value
        more, fewer = max(ours, theirs), min(ours, theirs)
        beside = (
            f"At {self.threat} this variant keeps {kept}, {NAMES[self.plain]} {100 * self.control.worst_case:.1f} %"
        )
        test = f"McNemar's exact test, p = {p:.2g}"
        if self.comparison:
            return f"{beside}: it is {self.comparison}, by {more} images against {fewer} ({test})."
        return f"{beside}: no difference can be told, {ours} images against {theirs} ({test})."

    @property
    def by_class(self) -> Disparity | None:
        """Comparison of the classes, see :func:`timm_nrpm.disparity.by_class`; None if their images are too few."""
        return by_class(self)

    @property
    def class_verdict(self) -> str:
        """The worst class and the gap between classes, in a sentence or two; empty if :attr:`by_class` is None."""
        where = "in the worst case" if self.suite == "adaptive" else f"under {self.name}"
        return "" if (found := self.by_class) is None else found.sentences(where, NAMES[self.plain])

    def __str__(self) -> str:
        lines = [f"FLAGS: {', '.join(self.flags)}. See docs/flags.md."] if self.flags else []
        plain = "" if self.control is None else f"; {NAMES[self.plain]} {100 * self.control.clean:.1f} %"
        lines += [
            self.verdict,
            *filter(None, [self.class_verdict]),
            f"{self.samples} images, {self.threat}, {self.suite}: clean {100 * self.clean:.1f} %{plain}",
        ]
        width = max((len(a.name) for a in self.attacks), default=0)
        for a in self.attacks:
            counts = f"of {a.tried} images {a.broke} broken"
            lines.append(f"  {a.name:{width}}  {100 * self.accuracy(a.name):5.1f} %  {counts}, {a.seconds:.1f} s")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def to_json(self) -> str:
        """Return the report as JSON, with a summary of its accuracies."""
        shares = {name: self.accuracy(name) for name in ("clean", *(a.name for a in self.attacks))}
        summary = {
            "verdict": self.verdict,
            "class_verdict": self.class_verdict,
            "flags": self.flags,
            "worst_case": self.worst_case,
            "interval": self.interval(),
            "accuracies": shares,
        }
        return json.dumps({"summary": summary, **self.to_dict()})

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> RobustnessReport:
        """Make a report from the result of :meth:`to_dict`.

        Raises:
            ValueError, LookupError, TypeError: `data` is not such a result.
        """
        fields = {key: value for key, value in data.items() if key != "summary"}
        attacks = (AttackResult(**{**a, "survived": tuple(a["survived"])}) for a in data["attacks"])
        fields |= {"threat": Threat(**data["threat"]), "attacks": tuple(attacks), "correct": tuple(data["correct"])}
        fields |= {"flags": tuple(data["flags"]), "warnings": tuple(data["warnings"])}
        fields["labels"] = tuple(data.get("labels", ()))
        if data["control"] is not None:
            fields["control"] = cls.from_dict(data["control"])
        texts = (*fields["flags"], *fields["warnings"], fields.get("data", ""), fields["suite"])
        if fields.get("plain", REPROGRAMMED) not in NAMES:
            raise ValueError(f"This is no report: plain={fields.get('plain')!r} is none of {', '.join(NAMES)}.")
        outcomes = [fields["correct"], *(attack.survived for attack in fields["attacks"])]
        if not all(isinstance(text, str) for text in texts) or not fields["correct"]:
            raise ValueError("This is no report: it has no images, or its flags, warnings or names are not text.")
        if any(len(row) != len(fields["correct"]) or set(map(type, row)) - {bool, type(None)} for row in outcomes):
            raise ValueError("This is no report: it does not say of each image whether it was right under each attack.")
        if len(fields["labels"]) not in (0, len(fields["correct"])) or set(map(type, fields["labels"])) - {int}:
            raise ValueError("This is no report: its labels are not one integer for each image.")
        return cls(**fields)

    @classmethod
    def from_json(cls, text: str) -> RobustnessReport:
        return cls.from_dict(json.loads(text))
