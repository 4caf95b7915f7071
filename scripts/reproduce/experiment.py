"""One table or figure of the paper (arXiv 2410.04577): rows, measured once and kept, claims, and a JSON file."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from lab import DATA, Lab, Missing
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from timm_nrpm.errors import Diverged

RESULTS = Path(__file__).parents[2] / "results"
PACKAGES = ("timm_nrpm", "torch", "timm", "torchattacks", "accelerate")

Measured = dict[str, Any]
"""What a row gives: under "ours" a number for each column, in % or in the unit of the table; perhaps the same under
"worst case"; and whatever else is worth keeping."""


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Attributes:
        name: As the paper calls it, or what we add to it.
        measure: Its numbers; raises `Missing` where they cannot be had.
        paper: The paper's numbers, one a column, None where it has none.
        full: Why full mode alone measures it; empty where quick mode does, too.
        why: Why it is not the paper's, as far as is known; shown where it is not.
    """

    name: str
    measure: Callable[[], Measured]
    paper: Sequence[float | None] = ()
    full: str = ""
    why: str = ""


@dataclass(frozen=True)
class Claim:
    """What the paper says of its numbers.

    Attributes:
        holds: From the numbers by row, whether it does.
    """

    text: str
    holds: Callable[[Mapping[str, Sequence[float]]], bool]

    def judged(self, rows: Mapping[str, Measured], kind: str) -> bool | None:
        """Under one kind of numbers, "ours" or "worst case"; None where they are missing."""
        try:
            return self.holds({name: row[kind] for name, row in rows.items() if row.get(kind) is not None})
        except (KeyError, ValueError, TypeError):  # a row that is not there, the largest of none, an empty cell
            return None


@dataclass(frozen=True)
class Experiment:
    """A table or a figure.

    Attributes:
        key: Such as `"table-4"`, the name of its file.
        title: What it is about.
        families: Of the backbones, see :data:`lab.FAMILIES`.
        columns: Headings of the numbers.
        unit: Of the numbers.
        settings: All that decides them, beside the mode.
        about: How it was measured, in words.
        draw: Makes a picture of the finished result, if there is one.
        draws: The table whose numbers these are, if that is all it does.
    """

    key: str
    title: str
    families: Sequence[str]
    columns: Sequence[str]
    rows: Sequence[Row]
    claims: Sequence[Claim] = ()
    unit: str = "%"
    settings: Mapping[str, Any] = field(default_factory=dict)
    about: str = ""
    draw: Callable[[dict[str, Any], Path], None] | None = None
    draws: str = ""

    def run(self, lab: Lab, out: Path, *, resume: bool = False) -> dict[str, Any]:
        """Measure whatever is missing, and write it down row by row.

        Args:
            resume: Whether to keep the rows that an earlier run with the same settings has measured; without it, all
                are measured anew.

        Raises:
            ValueError: The earlier run had other settings. Its file is untouched.
        """
        file = out / f"{self.key}.json"
        out.mkdir(parents=True, exist_ok=True)
        settings = json.loads(json.dumps({**lab.settings(self.families), **self.settings}))
        same = {"settings": settings, "mode": lab.mode, "versions": {name: version(name) for name in PACKAGES}}
        kept: dict[str, Measured] = {}
        if resume and file.exists():
            before = json.loads(file.read_text())
            if any(before[key] != value for key, value in same.items()):
                raise ValueError(
                    f"{file} is of a run with other settings or versions: leave out --resume to measure anew, or give "
                    "another --out."
                )
            kept = {name: row for name, row in before["rows"].items() if "not run" not in row}
        result: dict[str, Any] = {
            "experiment": self.key, "title": self.title, "about": self.about, "draws": self.draws, "unit": self.unit,
            **same, "seed": lab.seed, "hardware": hardware(lab), "columns": list(self.columns), "rows": kept,
            "claims": [],
        }  # fmt: skip
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task, done = bar.add_task(self.key, total=len(self.rows)), dict[str, Measured]()
            for row in self.rows:
                bar.update(task, description=f"{self.key}: {row.name}")
                found = kept.get(row.name) or self._measured(row, lab)
                stated = {"paper": list(row.paper) or None, "why": row.why}
                done[row.name] = {**stated, **{k: v for k, v in found.items() if k not in stated}}
                result["rows"] = {**done, **{name: row for name, row in kept.items() if name not in done}}
                _write(file, result)
                bar.advance(task)
        result["rows"] = done
        result["claims"] = [
            {"text": claim.text, **{kind: claim.judged(result["rows"], kind) for kind in ("ours", "worst case")}}
            for claim in self.claims
        ]
        _write(file, result)
        if self.draw is not None and any("ours" in row for row in result["rows"].values()):
            picture = out / f"{self.key}.png"
            picture.unlink(missing_ok=True)
            self.draw(result, picture)
            if picture.exists():  # of nothing there is none
                result["picture"] = picture.name
        _write(file, result)
        return result

    def _measured(self, row: Row, lab: Lab) -> Measured:
        if row.full and lab.mode != "full":
            return {"not run": row.full}
        start = time.perf_counter()
        try:
            found = row.measure()
        except Missing as error:
            return {"not run": str(error)}
        except Diverged as error:
            return {"not run": f"tuning diverged: {error}"}
        short = len(found["ours"]) != len(self.columns) or len(row.paper) not in (0, len(self.columns))
        if short:
            raise ValueError(f"{self.key}, {row.name}: {len(self.columns)} columns, and not as many numbers.")
        return {**found, "seconds": round(time.perf_counter() - start, 1)}


def hardware(lab: Lab) -> dict[str, Any]:
    """What it ran on."""
    gpu = torch.cuda.get_device_name() if lab.device == "cuda" else None
    return {"machine": platform.machine(), "cores": os.cpu_count(), "threads": torch.get_num_threads(), "gpu": gpu}


def _write(file: Path, result: Mapping[str, Any]) -> None:
    draft = file.with_suffix(f".{os.getpid()}")
    draft.write_text(json.dumps(result, indent=1) + "\n")
    draft.replace(file)


def arguments(description: str) -> argparse.ArgumentParser:
    """What every experiment takes."""
    parser = argparse.ArgumentParser(description=description)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--quick", action="store_true", help="minutes on two cores, on a part of the images (default)")
    mode.add_argument("--full", action="store_true", help="the paper's images and epochs, for a GPU")
    parser.add_argument("--resume", action="store_true", help="keep the rows that an earlier run has measured")
    parser.add_argument("--data", type=Path, default=Path("data"), help=f"folder of datasets: {DATA} (default: data)")
    parser.add_argument("--checkpoints", type=Path, default=Path("checkpoints"), help="folder of published weights")
    parser.add_argument("--authors", type=Path, help="checkout of the authors' repository, for parity.py alone")
    parser.add_argument("--download", action="store_true", help="download the datasets that torchvision knows")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of results")
    return parser


def lab_of(args: argparse.Namespace) -> Lab:
    """Where the experiments are made."""
    mode = "full" if args.full else "quick"
    folders = (args.data, args.checkpoints, args.out / ".kept")
    return Lab(mode, *folders, authors=args.authors, resume=args.resume, download=args.download)


def main(make: Callable[[Lab], Experiment]) -> None:
    """Run one experiment from the command line."""
    module = sys.modules["__main__"].__doc__ or ""
    args = arguments(module.split("\n")[0]).parse_args()
    lab = lab_of(args)
    try:
        result = make(lab).run(lab, args.out, resume=args.resume)
    except ValueError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
    from verdicts import section  # which reads what was written

    print(section(result))
