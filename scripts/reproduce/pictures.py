"""Pictures of results: bars over lambda or models, darker for larger budgets as in the paper, and lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from timm_nrpm.figures import canvas

SHADES = ("#c6dbef", "#9ecae1", "#6baed6", "#4292c6", "#2171b5", "#08519c", "#08306b", "#041b3d")
KINDS = {"ours": "the paper's attack", "worst case": "worst case"}


def bars(result: Mapping[str, Any], path: Path) -> None:
    """Draw a group of bars for each row, a bar for each column; the worst case has a panel where it was measured."""
    rows = {name: row for name, row in result["rows"].items() if "ours" in row}
    kinds = [kind for kind in KINDS if any(row.get(kind) for row in rows.values())]
    figure = canvas.figure(max(5.0, 0.75 * len(rows)) * len(kinds), 4.2)
    panels = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
    columns = [str(column) for column in result["columns"]]
    for panel, kind in zip(panels, kinds, strict=True):
        for i, column in enumerate(columns):
            heights = [row[kind][i] if row.get(kind) else float("nan") for row in rows.values()]
            places = [place + (i - (len(columns) - 1) / 2) * 0.8 / len(columns) for place in range(len(rows))]
            panel.bar(places, heights, 0.8 / len(columns), color=SHADES[i % len(SHADES)], label=column)
        panel.set_xticks(range(len(rows)), list(rows), rotation=35, ha="right", fontsize=8)
        panel.set_title(KINDS[kind], fontsize=10)
        panel.grid(axis="y", alpha=0.3)
    panels[0].set_ylabel("accuracy, %" if result["unit"] == "%" else result["unit"])
    figure.legend(*panels[-1].get_legend_handles_labels(), loc="outside right upper", fontsize=7, title="budget")
    figure.savefig(path, dpi=120)


def lines(
    result: Mapping[str, Any],
    path: Path,
    groups: Mapping[str, Mapping[str, str]],
    columns: Mapping[str, Sequence[str]] | None = None,
) -> None:
    """Draw a panel for each group, with a line over the columns for each of its rows.

    Lines of the paper's attack are solid, those of the worst case dashed.

    Args:
        result: Finished result of an experiment.
        path: File of the picture.
        groups: For each panel's heading, the rows to draw by their labels.
        columns: For each panel's heading, labels of the x axis in place of the table's columns.
    """
    figure = canvas.figure(3.6 * len(groups) + 0.4, 3.9)
    panels = figure.subplots(1, len(groups), sharey=True, squeeze=False)[0]
    colours = [colour for colour, _, _ in canvas.STYLES] + ["#000000", "#E69F00"]
    for panel, (heading, names) in zip(panels, groups.items(), strict=True):
        below = columns[heading] if columns else [str(column) for column in result["columns"]]
        for colour, (label, name) in zip(colours, names.items(), strict=False):
            row = result["rows"].get(name, {})
            for kind, look in (("ours", "-"), ("worst case", "--")):
                if row.get(kind):
                    legend = label if kind == "ours" else f"{label}, worst case"
                    panel.plot(below, row[kind], look, color=colour, marker="o", markersize=3, label=legend)
        panel.set_title(heading, fontsize=10)
        panel.grid(alpha=0.3)
        panel.tick_params(axis="x", labelsize=7)
    panels[0].set(ylabel="accuracy, %", ylim=(0, 101))
    figure.legend(*panels[-1].get_legend_handles_labels(), loc="outside right upper", fontsize=7)
    figure.savefig(path, dpi=120)
