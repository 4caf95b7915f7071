"""A picture of Algorithm 1: how much each layer of a late part depends on the one before it, and over the epochs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from timm_nrpm.evaluation.subnetwork_report import SubnetworkReport
from timm_nrpm.figures import canvas


def draw_subnetworks(reports: Sequence[SubnetworkReport], path: str | Path) -> Path:
    """Draw connectivity (the paper's rho) layer by layer, and over the epochs of the best trial of the longest late
    part.

    Args:
        reports: Results of :func:`timm_nrpm.semirobust.semirobust` for one network, with late parts of several lengths.
        path: The file to write, which ends in .png or .svg.

    Returns:
        `path`.

    Raises:
        ValueError: `path` has another ending.
        ImportError: Matplotlib is not installed.
    """
    target, figure = canvas.target(path), canvas.figure(11, 4.8)
    from matplotlib import colormaps
    from matplotlib.ticker import MaxNLocator

    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    ordered = sorted(reports, key=lambda report: len(report.late))
    longest = ordered[-1]
    places = {name: place for place, name in enumerate(longest.late)}
    for report, (colour, marker, line) in zip(ordered, canvas.STYLES, strict=False):
        at = [places[name] for name in report.late]
        start, end = (report.best.connectivity[epoch] for epoch in (0, -1))
        label = f"last {len(report.late)} layers"
        left.plot(at, end, color=colour, marker=marker, linestyle=line, label=f"{label}, tuned")
        left.plot(at, start, color=colour, marker=marker, linestyle="none", fillstyle="none", label=f"{label}, natural")
    left.set_xticks(range(len(longest.late)), longest.late, rotation=40, ha="right", fontsize=8, family="monospace")
    left.set_ylabel("dependence on the layer before, nats")
    left.set_title("of each layer, within a class", fontsize=10, loc="left")
    rows = longest.best.connectivity
    for place, name in enumerate(longest.late):
        shade = colormaps["viridis"](0.9 * place / max(len(longest.late) - 1, 1))
        named = name if len(longest.late) <= 6 or place in (0, len(longest.late) - 1) else None
        right.plot([row[place] for row in rows], color=shade, marker="o", markersize=3, label=named)
    right.xaxis.set_major_locator(MaxNLocator(integer=True))
    right.set_xlabel("epochs of the late part")
    right.set_title(f"over the epochs, last {len(longest.late)} layers, first in dark", fontsize=10, loc="left")
    for panel in (left, right):
        panel.set_ylim(0, 1.05 * panel.get_ylim()[1])
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8, frameon=False, loc="lower left")
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(target, dpi=120)
    return target
