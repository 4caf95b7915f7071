"""History of a tuning run: its steps and evaluations, to and from JSON."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from timm_nrpm.config import TuneConfig


def finite(value: float) -> float | None:
    """Return the number, or None if it is not finite, since JSON has no infinity."""
    return value if math.isfinite(value) else None


@dataclass(frozen=True)
class Step:
    """One step of the optimizer; its loss and shares are means over the images of the step.

    Attributes:
        step: Number of the step, counted from 1.
        epoch: Number of the epoch, counted from 0.
        loss: Value of the loss that was minimised; None where it was not finite.
        clean, attacked: Share of the images that are right when clean, and when attacked; None where the objective does
            not compute it.
        norm: Norm of the gradient before clipping: that of lambda, and that of everything else that trains.
        skipped: Whether the gradient was not finite, so that the step changed nothing.
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
        step: Number of steps taken before.
        clean: Accuracy on the clean images.
        own: Accuracy under PGD along the model's own gradient, as in the paper.
        quick: Accuracy under the suite `quick`: an image counts as right if it is right under FGSM and PGD along the
            model's own gradient and under PGD from the plain model.
        flags: Flags of the :class:`timm_nrpm.RobustnessReport`.
    """

    step: int
    clean: float
    own: float
    quick: float
    flags: tuple[str, ...]


@dataclass
class History:
    """A tuning run, step by step.

    Attributes:
        config: Settings of the run.
        layers: Names of the reprogrammed layers.
        steps: Steps of the optimizer that were logged.
        evaluations: Evaluations on the validation images.

    Example:
        >>> history = tune(model, training_loader, TuneConfig(epochs=1, output="run"), validation=loader)
        >>> len(history.steps), history.steps[-1].lams[0], history.evaluations[-1].quick
        (2, 0.50, 0.9)
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
        """Write the history as JSON to a file. If that fails, the file is left unchanged."""
        path = Path(path)
        draft = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            draft.write_text(self.to_json())
            os.replace(draft, path)
        finally:
            draft.unlink(missing_ok=True)
        return path
