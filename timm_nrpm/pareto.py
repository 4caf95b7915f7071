"""What a search for lambda found: every setting, the front of those that none beats, JSON both ways, and a picture."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from timm_nrpm import canvas
from timm_nrpm.threats import Threat

KINDS = ("plain", "global", "layerwise")


@dataclass(frozen=True)
class Candidate:
    """A setting that was tried, and what it was worth.

    Attributes:
        kind: `"plain"` (every lambda 1), `"global"` (one for all layers) or `"layerwise"`.
        lams: Lambda of every reprogrammed layer.
        clean_loss: Mean cross-entropy of the clean images in nats; infinite where it was no number.
        clean_accuracy: Share of the images that are right when nobody attacks, from 0 to 1.
        quick: Share of the images that survive the suite `quick`: FGSM, PGD, and PGD from the plain model. It is no
            worst case, which only the adaptive suite finds.
        flags: Of the same report: reasons not to believe the accuracies under the model's own gradient.
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
        threat, steps, seed: Settings of the evaluations; the seed is that of the search as well.
        samples: Number of images that every setting was evaluated on.
        bound: Amount by which the clean loss of :attr:`best` may exceed the plain model's, in nats.
        trials: Settings in the order tried, the plain model first.

    Raises:
        ValueError: The first trial is not the plain model.

    Example:
        >>> front = search_lambda(model, loader, Threat("Linf", 8 / 255), calibration=training_loader)
        >>> front.best.quick - front.plain.quick
        0.022
        >>> reprogram_(model, dataclasses.replace(model.nrpm.config, lam=front.best.lams))
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
        """Those that no other beats in clean loss or under quick attacks without losing in the other; the lowest clean
        loss first.

        Settings that are equal in both stand side by side; those whose loss is infinite do not count.
        """
        front: list[Candidate] = []
        for one in sorted(self.trials, key=lambda c: (c.clean_loss, -c.quick)):
            equal = front and (one.clean_loss, one.quick) == (front[-1].clean_loss, front[-1].quick)
            if math.isfinite(one.clean_loss) and (not front or one.quick > front[-1].quick or equal):
                front.append(one)
        return tuple(front)

    @property
    def best(self) -> Candidate:
        """The largest share right under quick attacks within the bound, of equals the lowest clean loss; at worst the
        plain model."""
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

    def plot(self, path: str | Path) -> Path:
        """Draw every setting, what quick attacks leave, over the clean loss, with the front and the bound; PNG or SVG,
        as `path` ends.

        Raises:
            ValueError: Another ending.
            ImportError: Matplotlib is not installed.
        """
        path, figure = canvas.target(path), canvas.figure(12, 4.8)
        panels = figure.subplots(1, 2)
        for panel, heading in zip(panels, ("all settings", "near the bound"), strict=True):
            self._scatter(panel)
            panel.set(title=heading, xlabel="clean loss, nats", ylabel="right under quick attacks, %")
            panel.grid(alpha=0.3)
        # A setting that broke the model lies far away, and beside it those one has to choose from are one spot.
        front, best, plain = self.front, self.best, self.plain
        least, span = front[0].clean_loss, max(2 * self.bound, plain.clean_loss - front[0].clean_loss, 0.02)
        near = [c.quick for c in self.trials if c.clean_loss <= plain.clean_loss + span]
        low = max(min(near), min(front[0].quick, plain.quick) - 0.1)
        pad = 0.06 * max(best.quick - low, 0.05)
        panels[1].set(xlim=(least - 0.06 * span, plain.clean_loss + span))
        panels[1].set(ylim=(100 * (low - pad), 100 * (max(near) + 2 * pad)))
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=9)
        p = plain.quick
        spread = 196 * math.sqrt(p * (1 - p) / self.samples)
        threat = f"{self.threat.norm} {self.threat.eps:.4g}, PGD-{self.steps}"
        images = f"{self.samples} images (sampling error {spread:.1f} points at 95 %)"
        figure.suptitle(f"{len(self.trials)} settings of lambda, {images}, {threat}")
        figure.savefig(path, dpi=120)
        return path

    def _scatter(self, panel: Any) -> None:
        bound = f"bound: plain + {self.bound:g} nats"
        panel.axvline(self.plain.clean_loss + self.bound, color="#555555", linestyle="--", linewidth=1.2, label=bound)
        at = [(c.clean_loss, 100 * c.quick) for c in self.front]
        panel.step(*zip(*at, strict=True), where="post", color="#009E73", linewidth=2, label="front", zorder=1)
        styles = {"global": ("#0072B2", "o", "one lambda"), "layerwise": ("#E69F00", "^", "a lambda for each layer")}
        for kind, (colour, marker, label) in styles.items():
            tried = [c for c in self.trials if c.kind == kind and math.isfinite(c.clean_loss)]
            if tried:
                x, y = [c.clean_loss for c in tried], [100 * c.quick for c in tried]
                look = {"color": colour, "marker": marker, "edgecolor": "white", "linewidth": 0.5}
                panel.scatter(x, y, s=46, label=label, zorder=2, **look)
        star, ring = ((c.clean_loss, 100 * c.quick) for c in (self.plain, self.best))
        panel.scatter(*star, s=190, color="black", marker="*", edgecolor="white", label="plain model", zorder=4)
        panel.scatter(*ring, s=200, facecolor="none", edgecolor="#D55E00", linewidth=2, label="best", zorder=3)


def best_of(trials: Iterable[Candidate], limit: float) -> Candidate:
    """The largest share right under quick attacks of those whose clean loss is within `limit`, or the lowest clean loss
    if none is."""
    trials = list(trials)
    within = [c for c in trials if c.clean_loss <= limit]
    return max(within, key=lambda c: (c.quick, -c.clean_loss)) if within else min(trials, key=lambda c: c.clean_loss)
