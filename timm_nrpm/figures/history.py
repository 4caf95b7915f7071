"""A picture of a tuning run: lambda of every layer, and the accuracies, over the steps."""

from __future__ import annotations

from pathlib import Path

from timm_nrpm.evaluation.history import History
from timm_nrpm.figures import canvas

VALIDATION = {
    "clean": ("#0072B2", "o", 1.5, "validation, clean"),
    "own": ("#E69F00", "^", 1.5, "PGD, own gradient"),
    "quick": ("#D55E00", "s", 3, "quick attacks"),
}
"""Colour, marker, line width and label of each field of an evaluation."""


def draw_history(history: History, path: str | Path) -> Path:
    """Draw lambda of every layer, and the accuracies, over the steps.

    Args:
        history: The result of :func:`timm_nrpm.tune`.
        path: The file to write, which ends in .png or .svg.

    Returns:
        `path`.

    Raises:
        ValueError: `path` has another ending.
        ImportError: Matplotlib is not installed.

    Example:
        >>> draw_history(tune(model, training_loader, TuneConfig(epochs=1)), "curves.png")
        PosixPath('curves.png')
    """
    path, figure = canvas.target(path), canvas.figure(8, 7)
    from matplotlib import colormaps

    upper, lower = figure.subplots(2, 1, sharex=True)
    at = [row.step for row in history.steps]
    few = len(history.layers) <= 8
    for i, name in enumerate(history.layers):
        # The shades go from dark to light, from the first layer to the last, which shows without colour as well.
        shade = colormaps["viridis"](0.9 * i / max(len(history.layers) - 1, 1))
        label = name if few or i in (0, len(history.layers) - 1) else None
        upper.plot(at, [row.lams[i] for row in history.steps], color=shade, label=label, linewidth=1.8)
    if not few and at:
        means = [sum(row.lams) / len(row.lams) for row in history.steps]
        upper.plot(at, means, color="black", linestyle="--", label="mean", linewidth=2)
    upper.set(ylabel="lambda (1 = the plain layer)", ylim=(-0.02, 1.02))
    above = {"loc": "lower left", "bbox_to_anchor": (0, 1), "fontsize": 8, "ncols": 4, "frameon": False}
    upper.legend(**above)
    right = [(row.step, 100 * row.attacked) for row in history.steps if row.attacked is not None]
    if right:
        lower.plot(*zip(*right, strict=True), color="#999999", linewidth=0.8, label="training, attacked")
    for key, (colour, marker, width, label) in VALIDATION.items():
        values = [100 * getattr(row, key) for row in history.evaluations]
        steps = [row.step for row in history.evaluations]
        lower.plot(steps, values, color=colour, marker=marker, linewidth=width, label=label)
    lower.set(xlabel="step", ylabel="accuracy, %", ylim=(0, 101))
    lower.legend(**above)
    for panel in (upper, lower):
        panel.grid(alpha=0.3)
    c = history.config
    figure.suptitle(f"paradigm {c.paradigm}, {c.objective}, {c.norm} {c.eps:.4g}, gradient: {c.gradient}")
    figure.savefig(path, dpi=120)
    return path
