"""What happened while a model was tuned: rows of numbers, JSON both ways, and a picture."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from timm_nrpm import canvas
from timm_nrpm.config import TuneConfig


def finite(value: float) -> float | None:
    """The number, or None: JSON knows no infinity."""
    return value if math.isfinite(value) else None


@dataclass(frozen=True)
class Step:
    """One step of the optimizer, means over its images.

    Attributes:
        step: Counted from 1.
        loss: Value of the loss that was minimised; None where it was not finite.
        clean, attacked: Share of images right, clean and attacked; None where the objective never looks.
        norm: Norm of the gradient of lambda, and of everything else that trains, before clipping.
        skipped: Whether the gradient was not finite, so that nothing changed.
        lams: Lambda of every layer after the step, in the order of :attr:`History.layers`.
    """

    step: int
    epoch: int
    loss: float | None
    clean: float | None
    attacked: float | None
    norm: tuple[float | None, float | None]
    skipped: bool
    lams: tuple[float, ...]


@dataclass(frozen=True)
class Evaluation:
    """Accuracy on the validation images, from 0 to 1.

    Attributes:
        step: Steps taken before.
        quick: Accuracy under the worst of FGSM and PGD on the model's own gradient and PGD from the plain model,
            image by image.
        own: Accuracy under PGD on the model's own gradient, as in the paper.
        flags: Flags of :class:`timm_nrpm.RobustnessReport`.
    """

    step: int
    clean: float
    own: float
    quick: float
    flags: tuple[str, ...]


@dataclass
class History:
    """A run, step by step.

    Attributes:
        config: The settings.
        layers: Names of the reprogrammed layers.

    Example:
        >>> history = tune(model, loader, TuneConfig(output="run"))
        >>> history.steps[-1].lams, history.evaluations[-1].quick
        ((0.41, 0.52), 0.62)
        >>> History.from_json(Path("run/history.json").read_text()) == history
        True
    """

    config: TuneConfig
    layers: tuple[str, ...]
    steps: list[Step] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> History:
        return cls(
            config=TuneConfig(**data["config"]),
            layers=tuple(data["layers"]),
            steps=[Step(**{**row, "lams": tuple(row["lams"]), "norm": tuple(row["norm"])}) for row in data["steps"]],
            evaluations=[Evaluation(**{**row, "flags": tuple(row["flags"])}) for row in data["evaluations"]],
        )

    def to_json(self) -> str:
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls, text: str) -> History:
        return cls.from_dict(json.loads(text))

    def save(self, path: str | Path) -> Path:
        """Write JSON, all of it or, where that fails, none."""
        path = Path(path)
        draft = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            draft.write_text(self.to_json())
            os.replace(draft, path)
        finally:
            draft.unlink(missing_ok=True)
        return path

    def plot(self, path: str | Path) -> Path:
        """Draw lambda of every layer, the loss, and the accuracies over the steps; PNG or SVG, as `path` ends.

        Raises:
            ValueError: Another ending.
            ImportError: Matplotlib is not installed.
        """
        path, figure = canvas.target(path), canvas.figure(8, 7)
        from matplotlib import colormaps

        upper, lower = figure.subplots(2, 1, sharex=True)
        at = [row.step for row in self.steps]
        few = len(self.layers) <= 8
        for i, name in enumerate(self.layers):
            # From the first layer, dark, to the last, light, which tells them apart without colour as well.
            shade = colormaps["viridis"](0.9 * i / max(len(self.layers) - 1, 1))
            label = name if few or i in (0, len(self.layers) - 1) else None
            upper.plot(at, [row.lams[i] for row in self.steps], color=shade, label=label, linewidth=1.8)
        if not few and at:
            means = [sum(row.lams) / len(row.lams) for row in self.steps]
            upper.plot(at, means, color="black", linestyle="--", label="mean", linewidth=2)
        upper.set(ylabel="lambda (1 = the plain layer)", ylim=(-0.02, 1.02))
        above = {"loc": "lower left", "bbox_to_anchor": (0, 1), "fontsize": 8, "ncols": 4, "frameon": False}
        upper.legend(**above)
        right = [(row.step, 100 * row.attacked) for row in self.steps if row.attacked is not None]
        if right:
            lower.plot(*zip(*right, strict=True), color="#999999", linewidth=0.8, label="training, attacked")
        shown = {"clean": ("#0072B2", "o", "validation, clean"), "own": ("#E69F00", "^", "PGD, own gradient")}
        shown["quick"] = ("#D55E00", "s", "quick attacks")
        for key, (colour, marker, label) in shown.items():
            values = [100 * getattr(row, key) for row in self.evaluations]
            width = 3 if key == "quick" else 1.5
            steps = [row.step for row in self.evaluations]
            lower.plot(steps, values, color=colour, marker=marker, linewidth=width, label=label)
        lower.set(xlabel="step", ylabel="accuracy, %", ylim=(0, 101))
        lower.legend(**above)
        for panel in (upper, lower):
            panel.grid(alpha=0.3)
        c = self.config
        figure.suptitle(f"paradigm {c.paradigm}, {c.objective}, Linf {c.eps:.4g}, gradient: {c.gradient}")
        figure.savefig(path, dpi=120)
        return path
