"""The atlas: what is worth doing to which model against which threat, in one table.

    python scripts/atlas.py --shared SHARED --kept FOLDER                  # about three hours on two cores
    python scripts/atlas.py --shared SHARED --kept FOLDER --bases digits   # some of the models
    python scripts/atlas.py --shared SHARED --kept FOLDER --full           # ten times as many images, and time

Each cell is a run of `advise`: candidates are chosen on some images, and the best of them is judged on others, against
the model as it is. Trials are kept in FOLDER, and a run that was stopped goes on; several processes may share it, each
with other models. Writes results/atlas.json, results/atlas.md and docs/atlas.png, from all cells that FOLDER holds; the
others stay as results/atlas.json has them.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from atlas_bases import ATTACKED, BASES, CORRUPTED, TRAINING, Base, Cell, batches
from atlas_page import CLEAN_LOSS, markdown, picture
from lab import Lab
from rich.progress import track
from torch.utils.data import DataLoader, TensorDataset

from timm_nrpm import advise
from timm_nrpm.advice.advise import folder_of
from timm_nrpm.evaluation.trials import Advice, Trial

ROOT = Path(__file__).parents[1]
SLOWDOWN = 30.0
"""Bound of all cells on the latency, a wide one: the atlas asks for what helps first."""


@dataclass(frozen=True)
class Limits:
    """How much is measured.

    Attributes:
        images: Number of images for each purpose; None for those of the bases.
        times: Time for a cell, in times that of the bases.
        effort: Effort of the adaptive suite.
    """

    images: int | None
    times: float
    effort: str


QUICK, FULL = Limits(None, 1, "fast"), Limits(1000, 20, "default")


def measure(cell: Cell, limits: Limits, folder: Path) -> None:
    """Ask for advice on one cell; what is known already is not measured again."""
    training = None
    if cell.training is not None:
        generator = torch.Generator().manual_seed(0)
        training = DataLoader(TensorDataset(*cell.training), 64, shuffle=True, generator=generator)
    advise(
        cell.model, batches(cell.report), cell.danger, selection=batches(cell.selection), training=training,
        clean_loss=CLEAN_LOSS, slowdown=SLOWDOWN, effect=600 / len(cell.report[1]), effort=limits.effort, folder=folder,
        seconds=cell.seconds * limits.times,
    )  # fmt: skip


def row_of(base: Base, cell: Cell, advice: Advice) -> dict[str, Any]:
    """One cell as JSON can hold it: what is advised, and all trials."""
    advised = advice.advised if advice.helps else advice.nothing
    return {
        "base": base.title, "threat": cell.threat, "said": advice.threat, "images": len(cell.report[1]),
        "clean": _percent(advice.nothing, "clean_accuracy"), "kept": _percent(advice.nothing, "accuracy"),
        **_costs(advice, advised), "sentence": advice.sentence, "untried": advice.untried,
        "trials": [
            {"strategy": each.strategy, "setting": each.setting, "rejected": each.rejected, **_costs(advice, each)}
            for each in advice.trials
        ],
    }  # fmt: skip


def _percent(trial: Trial, what: str) -> float | None:
    return None if trial.report is None else round(100 * getattr(trial.report, what), 1)


def _costs(advice: Advice, trial: Trial) -> dict[str, Any]:
    """The effect of a trial, and its costs."""
    selection, report = (advice.effect(trial, part) for part in ("selection", "report"))
    judged = "report" if report is not None else "selection"
    return {
        "by": f"{trial.strategy}, {trial.setting}",
        "chosen on": None if selection is None else round(selection.points, 1),
        "gain": None if report is None else round(report.points, 1),
        "interval": None if report is None else [round(report.low, 1), round(report.high, 1)],
        "p": None if report is None else report.p_value,
        "clean lost": None if getattr(trial, judged) is None else round(advice.loss(trial, judged), 1),
        "slowdown": round(trial.slowdown, 1), "seconds": round(trial.seconds),
    }  # fmt: skip


def written(out: Path, docs: Path, rows: list[dict[str, Any]], how: str) -> None:
    """Write the atlas and its pages."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "atlas.json").write_text(json.dumps(rows, indent=1) + "\n")
    (out / "atlas.md").write_text(markdown(rows, how))
    picture(rows, docs / "atlas.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shared", type=Path, required=True, help="folder with checkpoints/ and data/")
    parser.add_argument("--kept", type=Path, required=True, help="folder of trained models and of trials")
    parser.add_argument("--bases", nargs="+", default=list(BASES), choices=BASES, help="models (default: all)")
    parser.add_argument("--threats", nargs="+", help="names of threats, such as Linf or fog (default: all)")
    parser.add_argument("--full", action="store_true", help="more images and more time, for a GPU")
    parser.add_argument("--page", action="store_true", help="measure nothing, and write the pages from what is kept")
    parser.add_argument("--out", type=Path, default=ROOT / "results", help="folder of the results")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="folder of the picture")
    args = parser.parse_args()
    limits, rows = FULL if args.full else QUICK, []
    file = args.out / "atlas.json"
    known = {(row["base"], row["threat"]): row for row in json.loads(file.read_text())} if file.exists() else {}
    lab = Lab("quick", args.shared / "data", args.shared / "checkpoints", args.kept / "models")
    for name in args.bases:
        base = BASES[name](lab)
        for cell in track(base.cells(limits.images), f"{name:8}"):
            folder = args.kept / ("full" if args.full else "quick") / name / cell.threat.replace(" ", "-")
            if not args.page and (not args.threats or cell.threat in args.threats):
                folder.mkdir(parents=True, exist_ok=True)
                measure(cell, limits, folder)
            found = folder_of(folder, str(cell.danger)) / "advice.json"
            if found.exists():
                rows.append(row_of(base, cell, Advice.from_json(found.read_text())))
            elif (base.title, cell.threat) in known:
                rows.append(known[base.title, cell.threat])
    how = (
        f"{limits.images or ATTACKED} images to choose on and as many to judge on under attack, "
        f"up to {limits.images or CORRUPTED} after a shift, and up to {TRAINING} to train on"
    )
    written(args.out, args.docs, rows, how)
    print(markdown(rows, how))


if __name__ == "__main__":
    main()
