"""The census: how much of every architecture of timm can be reprogrammed, and whether it runs.

    python scripts/census.py                                  # about ten minutes on one core
    python scripts/census.py --families resnet swin_transformer
    python scripts/census.py --forward --minutes 300          # also runs each, plain and reprogrammed; hours

Models are built and run on the meta device, which computes shapes alone; where that fails, on the CPU. With --forward
each is also run for real, on two images of the smallest size that it takes and with random weights: at lambda 1 it must
give what the plain model gives, bit for bit, and at lambda 0.9 other numbers, all finite. Each has a process of its own
with a limit on memory, and those with few parameters come first.

Rows are kept in results/.journals, and a run that was stopped goes on. Writes results/coverage.json and
results/coverage.md from all rows that are kept, and timm_nrpm/assets/architectures.json, which `list_models` and
`is_supported` read, once all architectures have a row.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import timm
import torch
from census_forward import MIXED, limited
from census_page import markdown, passed, ran
from timm.models import model_entrypoint

import timm_nrpm
from timm_nrpm.jobs.journal import Journal
from timm_nrpm.jobs.progress import progress_bar
from timm_nrpm.models.architectures import Remainder, measured

ROOT = Path(__file__).parents[1]
ASSET = Path(timm_nrpm.__file__).parent / "assets" / "architectures.json"

Row = dict[str, Any]


def family_of(name: str) -> str:
    """The module that defines an architecture, such as `resnet` for `timm.models.resnet`."""
    module = model_entrypoint(name).__module__
    return module.removeprefix("timm.models.").removeprefix("timm_nrpm.models.")


def row_of(name: str) -> Row:
    """What the census says of an architecture, as JSON can hold it."""
    try:
        found = measured(name)
    except ValueError as error:
        return {"failed": str(error)}
    return {
        "parameters": found.parameters, "layers": found.layers, "whole": found.whole, "covered": found.covered,
        "share": found.share, "why": found.why, "plain": [_entry(each) for each in found.plain],
        "unused": list(found.unused), "loose": _entry(found.loose) if found.loose else None, "fixed": found.fixed,
    }  # fmt: skip


def _entry(remainder: Remainder) -> Row:
    """A remainder with the number of its names and the first of them."""
    entry = asdict(remainder)
    names = entry.pop("names")
    return {"kind": entry.pop("kind"), "count": len(names), "first": names[0], **entry}


def fill(
    journal: Journal,
    names: Sequence[str],
    chosen: Sequence[str],
    row: Callable[[str], Row],
    what: str,
    ends: float = float("inf"),
) -> None:
    """Add the rows that a journal lacks.

    Args:
        journal: The journal, whose rows have the numbers of their architectures.
        names: All architectures.
        chosen: Those that are wanted, in this order.
        row: Function that gives the row of one.
        what: What is done, for the progress bar.
        ends: Time of `time.monotonic` after which none is begun.
    """
    with progress_bar(True, counted=True) as progress:
        for name in progress.track(chosen, description=what):
            if time.monotonic() > ends:
                return
            if (number := names.index(name)) not in journal.rows:
                journal.add(number, row(name))


def journal_of(path: Path, names: Sequence[str], settings: Row, anew: bool) -> Journal:
    """The journal of these architectures under these versions."""
    if anew:
        path.unlink(missing_ok=True)
    digest = hashlib.sha256("\n".join(names).encode()).hexdigest()
    return Journal(path, {"timm": timm.__version__, "torch": torch.__version__, "names": digest, **settings})


def written(out: Path, rows: dict[str, Row], whole_census: bool) -> None:
    """Write the results, and what the package reads of them if every architecture has a row."""
    versions = {"timm": timm.__version__, "torch": torch.__version__}
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(row)}" for name, row in rows.items())
    out.mkdir(parents=True, exist_ok=True)
    (out / "coverage.json").write_text(f'{{"versions": {json.dumps(versions)}, "architectures": {{\n{lines}\n}}}}\n')
    (out / "coverage.md").write_text(markdown(rows, versions))
    if whole_census:
        complete = [name for name, row in rows.items() if row.get("whole")]
        partial = {name: row.get("failed") or row["why"] for name, row in rows.items() if not row.get("whole")}
        content = {"timm": timm.__version__, "complete": complete, "partial": partial}
        ASSET.write_text(json.dumps(content, indent=0) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--families", nargs="+", help="modules of timm.models, such as resnet (default: all)")
    parser.add_argument("--forward", action="store_true", help="run each architecture, too")
    parser.add_argument("--memory", type=float, default=12, help="limit for a forward in GiB (default: 12)")
    parser.add_argument("--seconds", type=float, default=300, help="limit for a forward in seconds (default: 300)")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no forward after these minutes")
    parser.add_argument("--anew", action="store_true", help="measure again what is kept")
    parser.add_argument("--strict", action="store_true", help="fail if one that ran did not give what it must")
    parser.add_argument("--out", type=Path, default=ROOT / "results", help="folder of the results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    ends = time.monotonic() + 60 * args.minutes
    names = timm.list_models(exclude_filters="nrpm_*")
    families = {name: family_of(name) for name in names}
    unknown = sorted(set(args.families or ()) - set(families.values()))
    if unknown:
        parser.error(f"timm has no family {', '.join(unknown)}: it has {', '.join(sorted(set(families.values())))}")
    chosen = [name for name in names if not args.families or families[name] in args.families]
    kept = args.out / ".journals"
    census = journal_of(kept / "census.jsonl", names, {}, args.anew)
    fill(census, names, chosen, row_of, "Layers")
    forwards = journal_of(kept / "census-forward.jsonl", names, {"lam": MIXED}, args.anew and args.forward)
    if args.forward:
        small_first = sorted(chosen, key=lambda name: census.rows[names.index(name)].get("parameters", 0))
        fill(forwards, names, small_first, lambda n: limited(n, int(args.memory * 2**30), args.seconds), "Runs", ends)
    rows = {
        name: {"family": families[name], **census.rows[number], "forward": forwards.rows.get(number)}
        for number, name in enumerate(names)
        if number in census.rows
    }
    written(args.out, rows, whole_census=len(rows) == len(names))
    print(f"{sum(bool(row.get('whole')) for row in rows.values())} of {len(rows)} architectures are covered whole.")
    wrongly = [name for name, row in rows.items() if ran(row) and not passed(row)]
    if args.strict and wrongly:
        raise SystemExit(f"Not as they must be: {', '.join(wrongly)}; see {args.out / 'coverage.md'}.")


if __name__ == "__main__":
    main()
