"""Related systems that need no retraining, each beside its control (docs/related.md says what they are).

    python scripts/related.py --quick --shared SHARED --kept FOLDER                     # hours on two cores
    python scripts/related.py --quick --shared SHARED --kept FOLDER --parts ensembles   # one part
    python scripts/related.py --shared SHARED --kept FOLDER                             # with more images, for a GPU
    python scripts/related.py --shared SHARED --kept FOLDER --page                      # the page from what is kept

Settings are chosen on other images than those that effects are measured on. A run that was stopped goes on. Writes
results/related.json and .md.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "related"))
import ensembles
import guarantees
import reports
import tuning
from bases import Bases
from row import Row

ROOT = Path(__file__).parents[1]

PARTS: dict[str, tuple[str, Callable[[Bases, Path], list[Row]]]] = {
    "ensembles": ("Models made of models", ensembles.rows),
    "guarantees": ("Guarantees", guarantees.rows),
    "tuning": ("Other ways to tune", tuning.rows),
    "reports": ("What else a report says", reports.rows),
}
"""Title and function of each part, by its name."""

COLUMNS = ("method", "base", "measured", "control", "its value", "the method's", "difference, 95 %", "")
HEAD = f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|"


def page(found: dict[str, list[Row]]) -> str:
    """The page of the results."""
    lines = [
        "# Related systems, measured", "",
        "Each method beside its control, on images that nothing was chosen on. A worst case is that of the adaptive "
        "suite with the least effort; a null result is a result. What each system is, and the others: "
        "[docs/related.md](../docs/related.md). By `scripts/related.py`.", "",
    ]  # fmt: skip
    for name, rows in found.items():
        lines += [f"## {PARTS[name][0]}", "", HEAD, *map(str, rows), ""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shared", type=Path, required=True, help="folder of the datasets and of published weights")
    parser.add_argument("--kept", type=Path, required=True, help="folder of trained networks and of what is measured")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="parts to measure")
    parser.add_argument("--quick", action="store_true", help="some hundred images, for two cores; else five times more")
    parser.add_argument("--page", action="store_true", help="measure nothing, and write the page from what is kept")
    parser.add_argument("--out", type=Path, default=ROOT / "results", help="folder of the page")
    args = parser.parse_args()
    args.kept.mkdir(parents=True, exist_ok=True)
    bases = Bases(args.shared, args.kept, times=1 if args.quick else 5)
    for name in () if args.page else args.parts:
        rows = PARTS[name][1](bases, args.kept / name)
        (args.kept / f"{name}.json").write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
        print(*rows, sep="\n")
    found = {
        name: [Row(**row) for row in json.loads(file.read_text())]
        for name in PARTS
        if (file := args.kept / f"{name}.json").exists()
    }
    args.out.mkdir(parents=True, exist_ok=True)
    rows_of = {name: [asdict(row) for row in rows] for name, rows in found.items()}
    (args.out / "related.json").write_text(json.dumps(rows_of, indent=1) + "\n")
    (args.out / "related.md").write_text(page(found))


if __name__ == "__main__":
    main()
