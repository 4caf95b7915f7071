"""Result of a search for lambda: every setting, and the front of settings that no other beats; to and from JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace

from timm_nrpm.attacks.threats import Threat

KINDS = ("plain", "global", "layerwise")


@dataclass(frozen=True)
class Candidate:
    """A setting that was tried, and its measured loss and accuracies.

    Attributes:
        kind: `"plain"` (every lambda is 1), `"global"` (one lambda for all layers) or `"layerwise"`.
        lams: Lambda of every reprogrammed layer, by name.
        clean_loss: Mean cross-entropy of the clean images, in nats; infinite where it was not finite.
        clean_accuracy: Share of the images that are right without an attack, from 0 to 1.
        quick: Share of the images that survive the suite `quick`: FGSM, PGD, and PGD from the plain model. It is not a
            worst case, which only the adaptive suite finds.
        flags: Flags of the same evaluation: reasons not to believe the accuracies under the model's own gradient.
    """

    kind: str
    lams: dict[str, float]
    clean_loss: float
    clean_accuracy: float
    quick: float
    flags: tuple[str, ...] = ()

    def __str__(self) -> str:
        shares = f"clean {100 * self.clean_accuracy:.1f} %, quick attacks {100 * self.quick:.1f} %"
        return f"{shares}, clean loss {self.clean_loss:.3f} nats"


@dataclass(frozen=True)
class ParetoFront:
    """All settings that were tried, and which of them no other beats.

    Attributes:
        threat, steps, seed: Settings of the evaluations; the seed is also that of the search.
        samples: Number of images that every setting was evaluated on.
        bound: Amount by which the clean loss of :attr:`best` may exceed the plain model's, in nats.
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
        best = f"best within {self.bound:g} nats ({self.best.kind}): {self.best}"
        return f"{len(self.trials)} settings, {self.samples} images, {threat}; plain: {self.plain}; {best}"

    @property
    def plain(self) -> Candidate:
        """The plain model: every lambda 1."""
        return self.trials[0]

    @property
    def front(self) -> tuple[Candidate, ...]:
        """Settings that no other beats in clean loss or under quick attacks without losing in the other, in ascending
        order of clean loss.

        Settings that are equal in both are all part of it; settings whose clean loss is infinite are not.
        """
        front: list[Candidate] = []
        for trial in sorted(self.trials, key=lambda c: (c.clean_loss, -c.quick)):
            equal = front and (trial.clean_loss, trial.quick) == (front[-1].clean_loss, front[-1].quick)
            if math.isfinite(trial.clean_loss) and (not front or trial.quick > front[-1].quick or equal):
                front.append(trial)
        return tuple(front)

    @property
    def best(self) -> Candidate:
        """Setting with the largest share right under quick attacks within the bound on the clean loss. Of equal ones it
        is that with the lowest clean loss, and the plain model where no other setting is within the bound."""
        return best_of(self.trials, self.plain.clean_loss + self.bound)

    def to_json(self) -> str:
        data = {**asdict(self), "best": asdict(self.best)}
        for trial in data["trials"]:
            trial["clean_loss"] = trial["clean_loss"] if math.isfinite(trial["clean_loss"]) else None  # JSON has no inf
        return json.dumps(data)

    @classmethod
    def from_json(cls, text: str) -> ParetoFront:
        data = json.loads(text)
        del data["best"]
        trials = [Candidate(**{**trial, "flags": tuple(trial["flags"])}) for trial in data["trials"]]
        finite = tuple(replace(t, clean_loss=math.inf) if t.clean_loss is None else t for t in trials)
        return cls(**{**data, "threat": Threat(**data["threat"]), "trials": finite})


def best_of(trials: Iterable[Candidate], limit: float) -> Candidate:
    """Return the setting with the largest share right under quick attacks of those whose clean loss is at most `limit`,
    or the setting with the lowest clean loss if there are none."""
    trials = list(trials)
    within = [c for c in trials if c.clean_loss <= limit]
    return max(within, key=lambda c: (c.quick, -c.clean_loss)) if within else min(trials, key=lambda c: c.clean_loss)
