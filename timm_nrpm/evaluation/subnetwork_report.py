"""Result of Algorithm 1 of the second paper: what a robust early part is worth to the rest (arXiv 2307.03803)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from statistics import mean
from typing import Any

from timm_nrpm.evaluation.trials import Effect

NATURAL, ROBUST, COMPOSED, TUNED = "natural", "robust", "composed", "tuned"
"""Names of the four networks: F, F*, the robust early part with the natural late one, and that late part tuned."""

SYMBOLS = {NATURAL: "A(F)", ROBUST: "A(F*)", COMPOSED: "A(f_a*, f_b)", TUNED: "A(f_a*, f_b*)"}
"""The paper's names of their accuracies."""


@dataclass(frozen=True)
class SubnetworkTrial:
    """One late part that was tuned behind the robust early part.

    Attributes:
        number: Number of the trial, counted from 0; each has images in an order of its own.
        own: Share of the selection images that it is right on under PGD, before the first epoch and after each.
        connectivity: Dependence of each of its layers on the layer before it, in nats (the paper's rho), before the
            first epoch and after each.
        converged: Whether it came within the tolerance of the robust network.
    """

    number: int
    own: tuple[float, ...]
    connectivity: tuple[tuple[float, ...], ...]
    converged: bool

    @property
    def epochs(self) -> int:
        """Number of epochs that it was tuned for."""
        return len(self.own) - 1


@dataclass(frozen=True)
class SubnetworkReport:
    """What a robust early part is worth to the late part.

    Attributes:
        early, late: Names of the layers of either part, in the order of a forward.
        threat: The threat, in words.
        tolerance: Largest share of the selection images that a tuned network may be worse by, and count as converged.
        target: Share of the selection images that the robust network is right on under PGD.
        trials: All trials, those that did not converge among them.
        measured: Number of training images of each class that connectivity is measured on; from more it sees more.
        right: For each measure (clean, fgsm, pgd, autoattack, worst case), the report images that each network is right
            on: a digit for each image, by the name of the network.
        attacked: Connectivity on training images that an attack along the network's own gradient has changed, of as
            many of each class, by the attack (fgsm, pgd) and the network (composed, tuned).
    """

    early: tuple[str, ...]
    late: tuple[str, ...]
    threat: str
    tolerance: float
    target: float
    trials: tuple[SubnetworkTrial, ...]
    measured: int
    right: Mapping[str, Mapping[str, str]]
    attacked: Mapping[str, Mapping[str, tuple[float, ...]]]

    @property
    def converged(self) -> tuple[SubnetworkTrial, ...]:
        """The trials that converged."""
        return tuple(trial for trial in self.trials if trial.converged)

    @property
    def best(self) -> SubnetworkTrial:
        """The trial with the largest share of the selection images under PGD, after its last epoch."""
        return max(self.trials, key=lambda trial: trial.own[-1])

    @property
    def thresholds(self) -> tuple[float, ...]:
        """Connectivity of each layer that is enough, as the paper reads it: the smallest of the trials that converged,
        after their last epoch; or the largest of all trials, if none did."""
        rows = [trial.connectivity[-1] for trial in self.converged or self.trials]
        choose = min if self.converged else max
        return tuple(map(choose, zip(*rows, strict=True)))

    @property
    def epochs(self) -> float | None:
        """Mean number of epochs of the trials that converged; None if none did."""
        return mean(trial.epochs for trial in self.converged) if self.converged else None

    def accuracy(self, measure: str, network: str) -> float:
        """Share of the report images that a network is right on."""
        digits = self.right[measure][network]
        return digits.count("1") / len(digits)

    def difference(self, measure: str) -> Effect:
        """What the tuned network has over the robust one, on the same images."""
        return Effect.of(self.right[measure][TUNED], self.right[measure][ROBUST])

    @property
    def verdict(self) -> str:
        """The result, in a sentence or two."""
        count, layers = len(self.trials), len(self.early) + len(self.late)
        points = f"{100 * self.tolerance:g} point{'s' * (self.tolerance != 0.01)}"
        early = f"With the first {len(self.early)} of {layers} layers robust and kept"
        if not self.converged:
            best = 100 * (self.best.own[-1] - self.target)
            return (
                f"{early}, none of {count} trials came within {points} of the robust network "
                f"under PGD; the best was {best:+.1f} points from it."
            )
        return (
            f"{early}, {len(self.converged)} of {count} trials came within {points} of the "
            f"robust network under PGD, after {self.epochs:.1f} epochs on average."
        )

    def __str__(self) -> str:
        measures = [f"{name:>14}" for name in SYMBOLS.values()]
        lines = [self.verdict, f"{self.threat}, {len(next(iter(self.right['clean'].values())))} images, in %:"]
        lines.append(f"{'':12}{''.join(measures)}  difference of the last from A(F*)")
        for measure in self.right:
            values = "".join(f"{100 * self.accuracy(measure, network):14.1f}" for network in SYMBOLS)
            lines.append(f"{measure:12}{values}  {self.difference(measure)}")
        kind = "smallest of those that converged" if self.converged else "largest of all trials"
        lines.append(f"Connectivity, {kind}, in nats, on {self.measured} images of each class:")
        width = max(map(len, self.late))
        lines += [f"  {name:{width}}  {rho:6.2f}" for name, rho in zip(self.late, self.thresholds, strict=True)]
        if self.attacked:
            lines.append("The same of the best trial, on attacked images, before and after tuning:")
            lines.append(f"  {'':{width}}{''.join(f'{attack:>16}' for attack in self.attacked)}")
            for place, name in enumerate(self.late):
                pairs = [f"{rows[COMPOSED][place]:9.2f} {rows[TUNED][place]:6.2f}" for rows in self.attacked.values()]
                lines.append(f"  {name:{width}}{''.join(pairs)}")
        return "\n".join(lines)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> SubnetworkReport:
        data: dict[str, Any] = json.loads(text)
        trials = tuple(
            SubnetworkTrial(
                each["number"], tuple(each["own"]), tuple(map(tuple, each["connectivity"])), each["converged"]
            )
            for each in data["trials"]
        )
        attacked = {
            attack: {network: tuple(rho) for network, rho in rows.items()} for attack, rows in data["attacked"].items()
        }
        parts = {"early": tuple(data["early"]), "late": tuple(data["late"])}
        return cls(**{**data, **parts, "trials": trials, "attacked": attacked})
