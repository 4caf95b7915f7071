"""A picture of a search for lambda: every setting, the Pareto front, and the bound on the clean accuracy lost."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from timm_nrpm.evaluation.pareto import ParetoFront
from timm_nrpm.figures import canvas

KINDS = {"global": ("#0072B2", "o", "one lambda"), "layerwise": ("#E69F00", "^", "a lambda for each layer")}
"""Colour, marker and label of each kind of setting."""


def draw_front(found: ParetoFront, path: str | Path) -> Path:
    """Draw accuracy under quick attacks over the clean accuracy lost, for every setting, with the front and the bound.

    Args:
        found: The result of :func:`timm_nrpm.search_lambda`.
        path: The file to write, which ends in .png or .svg.

    Returns:
        `path`.

    Raises:
        ValueError: `path` has another ending.
        ImportError: Matplotlib is not installed.

    Example:
        >>> draw_front(search_lambda(model, loader, Threat("Linf", 0.2), budget=5), "front.png")
        PosixPath('front.png')
    """
    path, figure = canvas.target(path), canvas.figure(12, 4.8)
    panels = figure.subplots(1, 2)
    for panel, heading in zip(panels, ("all settings", "near the bound"), strict=True):
        _draw_settings(found, panel)
        panel.set(title=heading, xlabel="clean accuracy lost, points", ylabel="right under quick attacks, %")
        panel.grid(alpha=0.3)
    # A setting that broke the model lies so far away that those worth choosing shrink to one spot beside it.
    front, best, plain = found.front, found.best, found.plain
    least = found.lost(front[0])
    span = max(2 * found.bound, -least, 1.0)
    near = [c.quick for c in found.trials if found.lost(c) <= span]
    low = max(min(near), min(front[0].quick, plain.quick) - 0.1)
    pad = 0.06 * max(best.quick - low, 0.05)
    panels[1].set(xlim=(least - 0.06 * span, span))
    panels[1].set(ylim=(100 * (low - pad), 100 * (max(near) + 2 * pad)))
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=9)
    p = plain.quick
    spread = 196 * math.sqrt(p * (1 - p) / found.samples)
    threat = f"{found.threat.norm} {found.threat.eps:.4g}, PGD-{found.steps}"
    images = f"{found.samples} images (sampling error {spread:.1f} points at 95 %)"
    figure.suptitle(f"{len(found.trials)} settings of lambda, {images}, {threat}")
    figure.savefig(path, dpi=120)
    return path


def _draw_settings(result: ParetoFront, panel: Any) -> None:
    """Draw the bound, the front and every setting."""
    bound = f"bound: {result.bound:g} points"
    panel.axvline(result.bound, color="#555555", linestyle="--", linewidth=1.2, label=bound)
    at = [(result.lost(c), 100 * c.quick) for c in result.front]
    panel.step(*zip(*at, strict=True), where="post", color="#009E73", linewidth=2, label="front", zorder=1)
    for kind, (colour, marker, label) in KINDS.items():
        tried = [c for c in result.trials if c.kind == kind]
        if tried:
            x, y = [result.lost(c) for c in tried], [100 * c.quick for c in tried]
            look = {"color": colour, "marker": marker, "edgecolor": "white", "linewidth": 0.5}
            panel.scatter(x, y, s=46, label=label, zorder=2, **look)
    star, ring = ((result.lost(c), 100 * c.quick) for c in (result.plain, result.best))
    panel.scatter(*star, s=190, color="black", marker="*", edgecolor="white", label="plain model", zorder=4)
    panel.scatter(*ring, s=200, facecolor="none", edgecolor="#D55E00", linewidth=2, label="best", zorder=3)
