"""Measured effects of ensembles: adaptive smoothing, with a fixed share and with a gate, and CrossMax."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bases import Bases
from kept import along_its_gradient, batches, judged
from row import Row
from torch import nn

from timm_nrpm import Threat
from timm_nrpm.ensembles.adaptive_smoothing import AdaptiveSmoothing
from timm_nrpm.ensembles.crossmax import CrossMax
from timm_nrpm.ensembles.mixture import MixtureSearch, fit_gate, search_mixture
from timm_nrpm.ensembles.probes import fit_probes
from timm_nrpm.evaluation.trials import Effect

THREAT = Threat("Linf", 8 / 255)
CHOSEN_ON, JUDGED_ON, TRAINING = 200, 300, 2000
LOSSES = (5.0, 10.0, 15.0)
"""Losses of clean accuracy, in points of the accurate model's, within which mixtures are searched."""
BASE = "narrow ResNet-18, naturally and adversarially trained, CIFAR-10"


@dataclass(frozen=True)
class Point:
    """A model on the plane of clean accuracy and worst case.

    Attributes:
        name: Name of the model.
        clean, kept: A digit for each report image, 1 where it is right, clean and in the worst case.
    """

    name: str
    clean: str
    kept: str

    @property
    def at(self) -> tuple[float, float]:
        """Clean accuracy and worst case in %."""
        return share(self.clean), share(self.kept)


def share(digits: str) -> float:
    """Share of the images in %."""
    return 100 * digits.count("1") / len(digits)


def above_the_line(point: Point, accurate: Point, robust: Point) -> float:
    """Points by which a worst case lies above the straight line between the two models, at equal clean accuracy."""
    (x, y), (x0, y0), (x1, y1) = point.at, accurate.at, robust.at
    way = min(max((x - x0) / (x1 - x0), 0.0), 1.0) if x1 != x0 else 1.0
    return y - (y0 + way * (y1 - y0))


def front(bases: Bases, kept: Path) -> list[Point]:
    """The accurate model, the robust one, and mixtures of them, judged by the adaptive suite."""
    accurate, robust = bases.narrow(robust=False), bases.narrow(robust=True)
    selection = batches(*bases.cifar("selection", CHOSEN_ON))
    models: dict[str, nn.Module] = {"accurate": accurate, "robust": robust}
    for loss in LOSSES:
        file = kept / f"search-{loss:g}.json"
        if not file.exists():
            found = search_mixture(accurate, robust, selection, THREAT, bound=loss, attacked=3, progress=True)
            file.write_text(found.to_json())
        best = MixtureSearch.from_json(file.read_text()).best
        if best is not None:
            models[f"mixture, {loss:g} points"] = best.model(accurate, robust)
    even = AdaptiveSmoothing(accurate, robust)
    models["mixture with a gate"] = AdaptiveSmoothing(accurate, robust, gate=fit_gate(even, selection, THREAT, low=0.5))
    report = batches(*bases.cifar("report", JUDGED_ON))
    return [Point(name, *judged(kept / f"{name}.json", model, report, THREAT)) for name, model in models.items()]


def smoothing_rows(bases: Bases, kept: Path) -> list[Row]:
    accurate, robust, *mixtures = front(bases, kept)
    rows = []
    for point in mixtures:
        gap = above_the_line(point, accurate, robust)
        rows.append(
            Row(
                f"adaptive smoothing ({point.name})", BASE, f"worst case, {THREAT}, in %", "the robust model alone",
                robust.at[1], point.at[1], str(Effect.of(point.kept, robust.kept)),
                f"Clean {point.at[0]:.1f} % (accurate model {accurate.at[0]:.1f}, robust one {robust.at[0]:.1f}); its "
                f"worst case lies {gap:+.1f} points from the straight line between the two models.",
            )
        )  # fmt: skip
    return rows


def crossmax_rows(bases: Bases, kept: Path) -> list[Row]:
    """CrossMax of the naturally trained network: along its own gradient, and in the worst case."""
    model = bases.narrow(robust=False)
    probes = fit_probes(model, batches(*bases.cifar("train", TRAINING)), ["layer2", "layer3"])
    report = batches(*bases.cifar("report", JUDGED_ON))
    small = Threat("Linf", 2 / 255)
    alone = judged(kept / "crossmax-alone.json", model, report, small)
    rows = []
    for name, ensemble in {
        "three resolutions": CrossMax(model, sizes=(32, 24, 16)),
        "three resolutions and three depths": CrossMax(model, sizes=(32, 24, 16), probes=probes),
    }.items():
        file = kept / f"crossmax-{name}.json"
        clean, worst = judged(file, ensemble, report, small)
        own = along_its_gradient(file)
        rows.append(
            Row(
                f"CrossMax ({name})", "narrow ResNet-18, naturally trained, CIFAR-10", f"worst case, {small}, in %",
                "the model alone", share(alone[1]), share(worst), str(Effect.of(worst, alone[1])),
                f"Clean {share(clean):.1f} % against {share(alone[0]):.1f}. PGD along its own gradient leaves "
                f"{share(own):.1f} %.",
            )
        )  # fmt: skip
    return rows


def rows(bases: Bases, kept: Path) -> list[Row]:
    """All rows of this part."""
    kept.mkdir(parents=True, exist_ok=True)
    return [*smoothing_rows(bases, kept), *crossmax_rows(bases, kept)]
