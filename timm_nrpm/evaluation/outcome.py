"""What became of a batch under every attack of a suite, as it is kept in a journal, and of all batches together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from timm_nrpm.attacks.flags import evidence_of
from timm_nrpm.evaluation.report import AttackResult

CODES = {"1": True, "0": False, "-": None}
"""Of an image: still right, wrong, not attacked."""


@dataclass(frozen=True)
class Turn:
    """What an attack did to a batch.

    Attributes:
        source: The model whose gradient it followed.
        survived: A code of `CODES` for each image.
        forwards, backwards: Number of images that went through a model, and of gradients that came back.
        seconds: Time that it took.
    """

    source: str
    survived: str
    forwards: int
    backwards: int
    seconds: float

    def then(self, later: Turn) -> Turn:
        """This turn and a later one of the same attack: what this one broke stays broken by it."""
        survived = "".join("0" if a == "0" else b for a, b in zip(self.survived, later.survived, strict=True))
        forwards, backwards = self.forwards + later.forwards, self.backwards + later.backwards
        return Turn(self.source, survived, forwards, backwards, self.seconds + later.seconds)

    def to_row(self) -> list[str | int | float]:
        """The turn as JSON."""
        return [self.source, self.survived, self.forwards, self.backwards, self.seconds]


@dataclass(frozen=True)
class Outcome:
    """What became of a batch.

    Attributes:
        clean: A code of `CODES` for each image when nobody attacks.
        attacks: Turns by the name of the attack, in the order in which they were first tried.
        probes: Sums of :func:`timm_nrpm.attacks.flags.probe`; empty where no image was probed.
        non_finite: Whether any gradient was.
        classes: Number of classes of the model.
    """

    clean: str
    attacks: dict[str, Turn]
    probes: dict[str, float]
    non_finite: bool
    classes: int

    def to_dict(self) -> dict[str, Any]:
        """The outcome as JSON, for a journal."""
        attacks = {name: turn.to_row() for name, turn in self.attacks.items()}
        return {**vars(self), "attacks": attacks}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Outcome:
        """What :meth:`to_dict` gave."""
        attacks = {name: Turn(*row) for name, row in data["attacks"].items()}
        return cls(data["clean"], attacks, data["probes"], data["non_finite"], data["classes"])


@dataclass(frozen=True)
class Joined:
    """What became of all batches.

    Attributes:
        correct: Whether each image is right when nobody attacks.
        attacks: Results by attack.
        evidence: Numbers behind the flags.
    """

    correct: tuple[bool, ...]
    attacks: tuple[AttackResult, ...]
    evidence: dict[str, float]


def join(outcomes: Sequence[Outcome]) -> Joined:
    """Put the outcomes of all batches, in their order, together.

    Raises:
        ValueError: Not all were attacked alike.
    """
    correct = tuple(code == "1" for outcome in outcomes for code in outcome.clean)
    names = list(outcomes[0].attacks)
    if any(list(outcome.attacks) != names for outcome in outcomes):
        raise ValueError("Not all batches were attacked alike: they are of different versions. Give another file.")
    attacks = tuple(_result(name, [outcome.attacks[name] for outcome in outcomes]) for name in names)
    probes: dict[str, float] = {}
    for key in sorted({key for outcome in outcomes for key in outcome.probes}):
        values = (outcome.probes.get(key, 0.0) for outcome in outcomes)
        probes[key] = max(values) if key == "random" else sum(values)
    evidence = evidence_of(
        {attack.name: (attack.source, attack.survived) for attack in attacks},
        correct,
        probes,
        non_finite=any(outcome.non_finite for outcome in outcomes),
        classes=outcomes[0].classes,
    )
    return Joined(correct, attacks, evidence)


def _result(name: str, turns: Sequence[Turn]) -> AttackResult:
    """One attack on all batches."""
    return AttackResult(
        name,
        turns[0].source,
        tuple(CODES[code] for turn in turns for code in turn.survived),
        sum(turn.forwards for turn in turns),
        sum(turn.backwards for turn in turns),
        sum(turn.seconds for turn in turns),
    )
