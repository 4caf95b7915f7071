"""Result of a search for lambda: every setting, and the front of settings that no other beats; to and from JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from timm_nrpm.attacks.threats import Threat

KINDS = ("plain", "global", "layerwise")

ROUNDING = 1e-9
"""Points by which a difference of two shares may exceed a bound that it equals."""


@dataclass(frozen=True)
class Candidate:
    """A setting that was tried, and its measured loss and accuracies.

    Attributes:
        kind: `"plain"` (every lambda is 1), `"global"` (one lambda for all layers) or `"layerwise"`.
        lams: Lambda of every reprogrammed layer, by name.
        clean_accuracy: Share of the images that are right without an attack, from 0 to 1.
        quick: Share of the images that survive the suite `quick`: FGSM, PGD, and PGD from the plain model. It is not a
            worst case, which only the adaptive suite finds.
        flags: Flags of the same evaluation: reasons not to believe the accuracies under the model's own gradient.
    """

    kind: str
    lams: dict[str, float]
    clean_accuracy: float
    quick: float
    flags: tuple[str, ...] = ()

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Candidate:
        """The candidate that `asdict` wrote."""
        return cls(**{**data, "flags": tuple(data["flags"])})

    def __str__(self) -> str:
        return f"clean {100 * self.clean_accuracy:.1f} %, quick attacks {100 * self.quick:.1f} %"


@dataclass(frozen=True)
class ParetoFront:
    """All settings that were tried, and which of them no other beats.

    Attributes:
        threat, steps, seed: Settings of the evaluations; the seed is also that of the search.
        samples: Number of images that every setting was evaluated on.
        bound: Largest loss of clean accuracy that :attr:`best` may have, in points.
        trials: Settings in the order in which they were tried, the plain model first.

    Raises:
        ValueError: The first trial is not the plain model.

    Example:
        >>> front = search_lambda(model, loader, Threat("Linf", 0.2), calibration=training_loader, budget=8)
        >>> round(front.best.quick - front.plain.quick, 3)
        0.0
        >>> model = reprogram_(model, dataclasses.replace(model.nrpm.config, lam=front.best.lams))
    """

    threat: Threat
    steps: int
    seed: int
    samples: int
    bound: float
    trials: tuple[Candidate, ...]

    def __post_init__(self) -> None:
        if not self.trials or self.trials[0].kind != "plain":
            raise ValueError("trials must begin with the plain model, which all others are compared with.")

    def __str__(self) -> str:
        threat = f"{self.threat.norm} {self.threat.eps:.4g}"
        best = f"best within {self.bound:g} points of clean accuracy ({self.best.kind}): {self.best}"
        return f"{len(self.trials)} settings, {self.samples} images, {threat}; plain: {self.plain}; {best}"

    @property
    def plain(self) -> Candidate:
        """The plain model: every lambda 1."""
        return self.trials[0]

    @property
    def front(self) -> tuple[Candidate, ...]:
        """Settings that no other beats in clean accuracy or under quick attacks without losing in the other, in
        descending order of clean accuracy. Settings that are equal in both are all part of it."""
        front: list[Candidate] = []
        for trial in sorted(self.trials, key=lambda c: (-c.clean_accuracy, -c.quick)):
            equal = front and (trial.clean_accuracy, trial.quick) == (front[-1].clean_accuracy, front[-1].quick)
            if not front or trial.quick > front[-1].quick or equal:
                front.append(trial)
        return tuple(front)

    @property
    def best(self) -> Candidate:
        """Setting with the largest share right under quick attacks within the bound. Of equal ones it is that with the
        highest clean accuracy, and the plain model where no other setting is within the bound."""
        return best_of(self.trials, self.plain, self.bound)

    def lost(self, candidate: Candidate) -> float:
        """Clean accuracy that a setting loses against the plain model, in points."""
        return lost(candidate, self.plain)

    def to_json(self) -> str:
        return json.dumps({**asdict(self), "best": asdict(self.best)})

    @classmethod
    def from_json(cls, text: str) -> ParetoFront:
        data = json.loads(text)
        del data["best"]
        trials = tuple(map(Candidate.from_dict, data["trials"]))
        return cls(**{**data, "threat": Threat(**data["threat"]), "trials": trials})


def lost(candidate: Candidate, plain: Candidate) -> float:
    """Clean accuracy that a setting loses against the plain model, in points."""
    return 100 * (plain.clean_accuracy - candidate.clean_accuracy)


def best_of(trials: Iterable[Candidate], plain: Candidate, bound: float) -> Candidate:
    """Return the setting with the largest share right under quick attacks of those that lose at most `bound` points of
    clean accuracy, or the setting with the highest clean accuracy if there are none."""

    def worth(candidate: Candidate) -> tuple[bool, float, float]:
        within = lost(candidate, plain) <= bound + ROUNDING
        return within, candidate.quick if within else 0.0, candidate.clean_accuracy

    return max(trials, key=worth)
