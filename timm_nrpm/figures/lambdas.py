"""A picture of the lambdas of a model, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from timm_nrpm.figures import canvas


def draw_lambdas(lams: Mapping[str, float], path: str | Path, title: str = "") -> Path:
    """Draw lambda of every layer, in the order in which the model calls them: 1 is the plain layer.

    Args:
        lams: Lambda of every layer, as :func:`timm_nrpm.lambdas` gives it.
        path: The file to write, which ends in .png or .svg.
        title: Title above the picture; the default is none.

    Raises:
        ValueError: `path` has another ending.
        ImportError: Matplotlib is not installed.

    Example:
        >>> draw_lambdas(timm_nrpm.lambdas(model), "lambdas.png")
        PosixPath('lambdas.png')
    """
    target = canvas.target(path)
    rows = max(len(lams), 3)
    figure = canvas.figure(7, min(0.9 + 0.2 * rows, 40))
    axes = figure.subplots()
    places = range(len(lams))
    axes.barh(places, list(lams.values()), color=canvas.STYLES[0][0], height=0.6)
    # A dot shows a lambda of 0 as well.
    axes.plot(list(lams.values()), places, "o", color=canvas.STYLES[0][0], markersize=4, clip_on=False)
    size = 8 if len(lams) <= 60 else max(2, 480 / len(lams))
    axes.set_yticks(places, list(lams), fontsize=size, family="monospace")
    axes.invert_yaxis()  # puts the first layer at the top
    axes.set_xlim(0, 1)
    axes.set_xlabel("lambda (0 = the robust estimate, 1 = the plain layer)")
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if title:
        axes.set_title(title, fontsize=10, loc="left")
    figure.savefig(target, dpi=120)
    return target
