"""What pictures are drawn on: PNG or SVG, without pyplot, in colours that the colour-blind can tell apart."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIGNED = "PuOr"
"""Colours of what may be negative: orange below 0, white at 0, purple above."""

STYLES = (("#0072B2", "o", "-"), ("#D55E00", "s", "--"), ("#009E73", "^", "-."), ("#CC79A7", "D", ":"))
"""Colour, marker and line of the first, the second, ..."""


def target(path: str | Path) -> Path:
    """Where a picture goes, found fit: before any work, so that none is lost.

    Raises:
        ValueError: The path does not end in .png or .svg.
    """
    if Path(path).suffix.lower() not in (".png", ".svg"):
        raise ValueError(f"path={str(path)!r} must end in .png or .svg.")
    return Path(path)


def figure(width: float, height: float) -> Figure:
    """An empty figure of that size in inches.

    Raises:
        ImportError: Matplotlib is not installed.

    Example:
        >>> drawing = figure(6, 4)
        >>> drawing.subplots().plot([1, 2])
        >>> drawing.savefig(target("line.png"))
    """
    try:
        import matplotlib  # noqa: F401, without which the two below fail later, in the middle of a picture
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("The picture needs Matplotlib: pip install 'timm_nrpm[demo]'.") from error
    drawing = Figure(figsize=(width, height), layout="compressed")  # not pyplot's, which would keep it and its windows
    FigureCanvasAgg(drawing)
    return drawing
