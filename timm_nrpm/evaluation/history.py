"""What happened while a model was tuned: rows of numbers, and JSON both ways."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

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
