"""One table or figure of the paper (arXiv 2410.04577): rows that are measured once and kept, claims, a JSON file."""

from __future__ import annotations

import argparse
import atexit
import json
import os
import platform
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from families import DATA
from lab import Lab, Missing
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from timm_nrpm.errors import Diverged

RESULTS = Path(__file__).parents[2] / "results"
PACKAGES = ("timm_nrpm", "torch", "timm", "torchattacks", "accelerate")

TO_BE_CONTINUED = 75
"""Exit status of a run whose time was over: EX_TEMPFAIL, a failure that the same command may not meet again."""

Measured = dict[str, Any]
"""Result of a row: under "ours" a number for each column, in % or in the unit of the table; where it was measured, the
same under "worst case"; and further values to keep."""


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Attributes:
        name: The paper's name of the row, or ours for a row that the paper does not have.
        measure: Function that returns the row's numbers; it raises `Missing` if images or weights are missing.
        paper: The paper's numbers, one for each column, None where it has none.
        full: Reason why only full mode measures the row; empty if quick mode does, too.
        why: Known reason why our numbers differ from the paper's; shown where they do.
    """

    name: str
    measure: Callable[[], Measured]
    paper: Sequence[float | None] = ()
    full: str = ""
    why: str = ""


@dataclass(frozen=True)
class Claim:
    """A statement of the paper about its numbers, or one of ours.

    Attributes:
        text: The statement.
        holds: Function that takes the numbers by row and returns whether the statement holds.
    """

    text: str
    holds: Callable[[Mapping[str, Sequence[float]]], bool]

    def judged(self, rows: Mapping[str, Measured], kind: str) -> bool | None:
        """Return whether it holds for one kind of numbers, "ours" or "worst case"; None where they are missing."""
        try:
            return self.holds({name: row[kind] for name, row in rows.items() if row.get(kind) is not None})
        except (KeyError, ValueError, TypeError):  # a row that is not there, the largest of none, an empty cell
            return None


@dataclass(frozen=True)
class Experiment:
    """A table or a figure.

    Attributes:
        key: Name of the result's file, such as `"table-4"`.
        title: Title of the experiment's section.
        families: Families of the backbones, keys of :data:`families.FAMILIES`.
        columns: Headings of the numbers.
        rows: Rows in the order of the table.
        claims: Statements to judge by the numbers.
        unit: Unit of the numbers.
        settings: Everything beside the mode that decides the numbers.
        about: Description of the measurement.
        draw: Function that draws the finished result into a file; None for no picture.
        draws: Key of the table that a figure draws; empty if the experiment has numbers of its own.
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
        """Measure all missing rows and write each to the result's file at once.

        Args:
            lab: Source of images, models and measurements.
            out: Folder of the results.
            resume: Whether to keep rows that an earlier run with the same settings measured; otherwise all are
                measured again.

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
                    f"{file} is of a run with other settings or versions: leave out --resume to measure again, or give "
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
                measured = kept.get(row.name) or self._measured(row, lab)
                stated = {"paper": list(row.paper) or None, "why": row.why}
                done[row.name] = {**stated, **{k: v for k, v in measured.items() if k not in stated}}
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
            if picture.exists():  # `draw` may find nothing to draw
                result["picture"] = picture.name
        _write(file, result)
        return result

    def _measured(self, row: Row, lab: Lab) -> Measured:
        if row.full and lab.mode != "full":
            return {"not run": row.full}
        start = time.perf_counter()
        try:
            measured = row.measure()
        except Missing as error:
            return {"not run": str(error)}
        except Diverged as error:
            return {"not run": f"tuning diverged: {error}"}
        short = len(measured["ours"]) != len(self.columns) or len(row.paper) not in (0, len(self.columns))
        if short:
            raise ValueError(
                f"{self.key}, {row.name}: {len(self.columns)} columns, and not as many numbers: return one for each."
            )
        return {**measured, "seconds": round(time.perf_counter() - start, 1)}


def hardware(lab: Lab) -> dict[str, Any]:
    """Return the hardware of the run."""
    gpu = torch.cuda.get_device_name() if lab.device == "cuda" else None
    return {"machine": platform.machine(), "cores": os.cpu_count(), "threads": torch.get_num_threads(), "gpu": gpu}


def _write(file: Path, result: Mapping[str, Any]) -> None:
    draft = file.with_suffix(f".{os.getpid()}")
    draft.write_text(json.dumps(result, indent=1) + "\n")
    draft.replace(file)


def arguments(description: str) -> argparse.ArgumentParser:
    """Return a parser of the options of every experiment."""
    parser = argparse.ArgumentParser(description=description)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--quick", action="store_true", help="minutes on two cores, on a part of the images (default)")
    mode.add_argument("--full", action="store_true", help="the paper's images and epochs, for a GPU")
    parser.add_argument("--resume", action="store_true", help="keep what an earlier run measured, batch by batch")
    parser.add_argument(
        "--minutes", type=float, help=f"stop then, with exit status {TO_BE_CONTINUED}; the same command goes on"
    )
    parser.add_argument("--data", type=Path, default=Path("data"), help=f"folder of datasets: {DATA} (default: data)")
    parser.add_argument("--checkpoints", type=Path, default=Path("checkpoints"), help="folder of published weights")
    parser.add_argument("--authors", type=Path, help="checkout of the authors' repository, for parity.py alone")
    parser.add_argument("--download", action="store_true", help="download the datasets that torchvision knows")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of results")
    return parser


def lab_of(args: argparse.Namespace) -> Lab:
    """Return the lab that the options describe; with `--minutes`, the clock runs from here on."""
    if args.minutes is not None:
        stop_after(args.minutes)
        args.resume = True
    mode = "full" if args.full else "quick"
    folders = (args.data, args.checkpoints, args.out / ".kept")
    return Lab(mode, *folders, authors=args.authors, resume=args.resume, download=args.download)


def stop_after(minutes: float) -> None:
    """End the process after some minutes: tuning saves a checkpoint first, and all else is kept batch by batch."""

    def leave(*_: Any) -> None:
        print(f"{minutes:g} minutes are over: the same command goes on.", file=sys.stderr)
        sys.exit(TO_BE_CONTINUED)

    signal.signal(signal.SIGTERM, leave)  # while a model is tuned, the signal waits for the end of the step
    signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGTERM))
    signal.setitimer(signal.ITIMER_REAL, 60 * minutes)
    atexit.register(signal.setitimer, signal.ITIMER_REAL, 0)  # a run that is done has no use for the alarm


def main(make: Callable[[Lab], Experiment]) -> None:
    """Run one experiment from the command line."""
    module = sys.modules["__main__"].__doc__ or ""
    args = arguments(module.split("\n")[0]).parse_args()
    lab = lab_of(args)
    try:
        result = make(lab).run(lab, args.out, resume=args.resume)
    except ValueError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
    from verdicts import section  # it reads what this module writes

    print(section(result))
