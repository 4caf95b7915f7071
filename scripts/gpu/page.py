"""The page of a run in Markdown: a table of each kind of rows, and what was left out."""

from __future__ import annotations

import math
from typing import Any

TITLES = {
    "limits": "What the card can do: loops on registers with the arithmetic of the kernels",
    "errors": "Relative errors against float64 on the CPU",
    "errors of the kernels": "Relative errors of each way to divide",
    "pytest": "pytest -m gpu",
    "operator": "Operator, forward (K = 3, l1, float32)",
    "operator, both": "Operator, forward and backward (K = 3, l1, float32)",
    "reference": "Operator beside the reference, which holds every product",
    "models": "Whole models, every layer reprogrammed (lambda 0.5, K = 3)",
    "graphs": "Small models, as called and as a CUDA graph",
    "tiles": "Tiles and ways to divide",
    "instructions": "Instructions for each product and step, counted in the machine code",
    "evaluation": "Adaptive evaluations, the plain model's included",
    "tuning": "Steps of tuning",
}
"""Titles of the tables, in the order of the page. Tables without a title, such as every tile, are in the JSON alone."""


def number(value: Any) -> str:
    """A cell: three significant digits, or nothing for what was not measured."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value).replace("|", "/")
    if value and abs(value) < 1e-3:
        return f"{value:.1e}"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def table(rows: list[dict[str, Any]]) -> list[str]:
    header = list(dict.fromkeys(key for row in rows for key in row))
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return lines + ["| " + " | ".join(number(row.get(key)) for key in header) + " |" for row in rows]


def markdown(result: dict[str, Any]) -> str:
    about = (result["tables"].get("machine") or [{"gpu": "unknown"}])[0]
    rest = ", ".join(f"{key} {value}" for key, value in about.items() if key != "gpu")
    lines = [
        "# What `scripts/gpu_check.py` measured",
        "",
        f"{about['gpu']}: {rest}. Times are medians of runs that take turns, by the device's own events. A product "
        "counts once, whatever K is; the limit is a loop on registers that does what the kernels do to each product, "
        "with the same division. Convolutions of plain layers may use TensorFloat-32, PyTorch's default; the errors "
        "were measured without it.",
    ]
    if result["quick"]:
        lines += ["", "**This was a quick run with tiny sizes, which tries the script: its times mean nothing.**"]
    for name, title in TITLES.items():
        if rows := result["tables"].get(name):
            lines += ["", f"## {title}", "", *table(rows)]
    lines += ["", "## Left out", ""]
    lines += [f"- {line}" for line in result["left_out"]] or ["Nothing."]
    seconds = ", ".join(f"{name} {value:.0f}" for name, value in result["seconds"].items())
    return "\n".join([*lines, "", f"Seconds of each part: {seconds}."]) + "\n"
