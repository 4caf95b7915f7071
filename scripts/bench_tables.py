"""Tables of what `bench.py` measured."""

from __future__ import annotations

import math
from typing import Any

K = 3  # number of steps in the measurements of operators
Row = dict[str, Any]


def _gib(count: float | None) -> str:
    return "" if count is None else f"{count / 2**20:.0f} MiB" if count < 2**30 else f"{count / 2**30:.1f} GiB"


def _times(value: float | None, by: float | None) -> str:
    if not value or not by or math.isnan(value / by):
        return ""
    ratio = value / by
    return f"{ratio:.0f}x" if ratio >= 10 else f"{ratio:.2f}x"


def tables(result: Row) -> list[tuple[str, list[str], list[list[str]]]]:
    """Return the title, header and rows of every table that has rows."""
    made = []
    gpu = result["machine"]["gpu"]
    for kind, title in (("forward", "Forward"), ("both", "Forward and backward")):
        rows = [
            [
                row["layer"],
                f"{row[kind]['products_a_second'] / 1e9:.2f}",
                _times(row[kind]["reference_seconds"], row[kind]["seconds"]),
                _times(row["steps_a_second_at_the_limit"][kind], K * row[kind]["products_a_second"]),
                _times(row[kind]["seconds"], row[kind]["plain_seconds"]),
                _gib(row[kind]["bytes"]),
                _gib(row[kind].get("reference_bytes")),
                *([_times(row[kind].get("compiled_reference_seconds"), row[kind]["seconds"])] if gpu else []),
            ]
            for row in result.get("operators", [])
        ]
        header = ["layer", "G products/s", "faster than the reference", "limit over ours", "ours over plain",
                  "memory", "of the reference", *(["faster than it compiled"] if gpu else [])]  # fmt: skip
        made.append((f"{title}, K = {K}, l1, float32", header, rows))
    rows = []
    for row in result.get("models", []):
        for step in ("forward", "train"):
            ours, plain = row["ours"][f"{step}_seconds"], row["plain"][f"{step}_seconds"]
            shares = row.get("time_goes_to", {}).get(step, {})
            rows.append([
                f"{row['model']}, batch {row['batch']}, {step}", f"{ours:.2f} s", f"{plain:.2f} s", _times(ours, plain),
                f"{row['batch'] / ours:.1f}", _gib(row["ours"]["resident_bytes"]) if step == "train" else "",
                ", ".join(f"{name} {share:.0%}" for name, share in shares.items()),
            ])  # fmt: skip
    header = ["224x224, every layer", "ours", "plain", "ratio", "images/s", "resident", "where the time goes"]
    made.append(("Models", header, rows))
    rows = [
        [f"{row['varied']} = {row['value']}", f"{row['forward_steps_a_second'] / 1e9:.1f}",
         f"{row['both_steps_a_second'] / 1e9:.1f}"]
        for row in result.get("scaling", [])
    ]  # fmt: skip
    made.append(("Scaling: G product steps/s, constant if the cost is linear", ["", "forward", "both"], rows))
    return [table for table in made if table[2]]


def markdown(result: Row) -> str:
    about = result["machine"]
    lines = [
        "# What `scripts/bench.py` measured",
        "",
        f"{about['gpu'] or about['cpu']} ({', '.join(about['cpu_flags'])}), {about['threads']} threads, torch "
        f"{about['torch']}, timm {about['timm']}, {about['compiler'] or 'no compiler'}. A product counts once, "
        "whatever K is. The reference holds every product; it is left out where they would not fit. The limit is a "
        "loop over data in the first-level cache with the same number of |x|, additions, reciprocals and "
        "multiply-adds; with backward, two loops with the arithmetic of its passes.",
    ]
    for title, header, rows in tables(result):
        lines += ["", f"## {title}", "", "| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
        lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines) + "\n"
