"""Outcomes of the attacks of a suite on one batch, as a journal keeps them, and on all batches together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

from timm_nrpm.attacks.flags import evidence_of, joined_probes
from timm_nrpm.evaluation.report import AttackResult

CODES = {"1": True, "0": False, "-": None}
"""Codes of an image, and their meaning: the model is still right, the model is wrong, the image was not attacked."""


@dataclass(frozen=True)
class Turn:
    """Result of an attack on a batch, in one turn or in several.

    Attributes:
        source: Name of the source whose gradient the attack followed.
        survived: Codes of the images, one character of `CODES` each.
        forwards, backwards: Number of images in all forwards, and in all backwards.
        seconds: Time of the attack, in seconds.
    """

    source: str
    survived: str
    forwards: int
    backwards: int
    seconds: float

    def then(self, later: Turn) -> Turn:
        """Join this turn with a later one of the same attack. Images that this turn broke stay broken."""
        survived = "".join("0" if a == "0" else b for a, b in zip(self.survived, later.survived, strict=True))
        forwards, backwards = self.forwards + later.forwards, self.backwards + later.backwards
        return Turn(self.source, survived, forwards, backwards, self.seconds + later.seconds)

    def split(self, sizes: Sequence[int]) -> list[Turn]:
        """Cut the turn of a group into those of its batches, whose passes and time all count for the first batch."""
        starts = accumulate(sizes, initial=0)
        codes = [self.survived[start : start + size] for start, size in zip(starts, sizes, strict=False)]
        first = replace(self, survived=codes[0])
        return [first, *(Turn(self.source, code, 0, 0, 0.0) for code in codes[1:])]

    def to_row(self) -> list[str | int | float]:
        """Return the turn as JSON."""
        return [self.source, self.survived, self.forwards, self.backwards, self.seconds]


@dataclass(frozen=True)
class Outcome:
    """Outcome of all attacks on a batch.

    Attributes:
        clean: Codes of the images without an attack, one character of `CODES` each.
        attacks: Joined turns of each attack by its name, in the order in which the attacks first ran.
        probes: Results of :func:`timm_nrpm.attacks.flags.probe`; empty where no image was probed.
        non_finite: Whether any gradient was not finite.
        classes: Number of classes of the model.
    """

    clean: str
    attacks: dict[str, Turn]
    probes: dict[str, float]
    non_finite: bool
    classes: int

    def split(self, sizes: Sequence[int]) -> list[Outcome]:
        """Cut the outcome of a group of batches into those of its batches, whose probes all count for the first."""
        starts = list(accumulate(sizes, initial=0))[:-1]
        turns = {name: turn.split(sizes) for name, turn in self.attacks.items()}
        return [
            Outcome(
                self.clean[start : start + size],
                {name: parts[i] for name, parts in turns.items()},
                {} if i else self.probes,
                self.non_finite,
                self.classes,
            )
            for i, (start, size) in enumerate(zip(starts, sizes, strict=True))
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return the outcome as JSON, for a journal."""
        attacks = {name: turn.to_row() for name, turn in self.attacks.items()}
        return {**vars(self), "attacks": attacks}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Outcome:
        """Make an outcome from the result of :meth:`to_dict`."""
        attacks = {name: Turn(*row) for name, row in data["attacks"].items()}
        return cls(data["clean"], attacks, data["probes"], data["non_finite"], data["classes"])


@dataclass(frozen=True)
class Joined:
    """Outcome of all attacks on all batches.

    Attributes:
        correct: Whether the model is right on each image without an attack.
        attacks: Result of each attack.
        evidence: Numbers that the flags are based on, by flag.
    """

    correct: tuple[bool, ...]
    attacks: tuple[AttackResult, ...]
    evidence: dict[str, float]


def join(outcomes: Sequence[Outcome]) -> Joined:
    """Join the outcomes of all batches, in their order.

    Raises:
        ValueError: The batches were not all attacked by the same attacks.
    """
    correct = tuple(code == "1" for outcome in outcomes for code in outcome.clean)
    names = list(outcomes[0].attacks)
    if any(list(outcome.attacks) != names for outcome in outcomes):
        raise ValueError(
            "The batches were not all attacked by the same attacks: they are of different versions. Give another file."
        )
    attacks = tuple(_result(name, [outcome.attacks[name] for outcome in outcomes]) for name in names)
    evidence = evidence_of(
        {attack.name: (attack.source, attack.survived) for attack in attacks},
        correct,
        joined_probes([outcome.probes for outcome in outcomes]),
        non_finite=any(outcome.non_finite for outcome in outcomes),
        classes=outcomes[0].classes,
    )
    return Joined(correct, attacks, evidence)


def _result(name: str, turns: Sequence[Turn]) -> AttackResult:
    """Return the result of one attack on all batches."""
    return AttackResult(
        name,
        turns[0].source,
        tuple(CODES[code] for turn in turns for code in turn.survived),
        sum(turn.forwards for turn in turns),
        sum(turn.backwards for turn in turns),
        sum(turn.seconds for turn in turns),
    )
