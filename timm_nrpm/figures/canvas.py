"""The canvas of every picture: PNG or SVG, without pyplot, in colours that colour-blind readers can tell apart."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIGNED = "PuOr"
"""Colour map for values of either sign: orange below 0, white at 0, purple above."""

STYLES = (("#0072B2", "o", "-"), ("#D55E00", "s", "--"), ("#009E73", "^", "-."), ("#CC79A7", "D", ":"))
"""Colour, marker and line style of the first model, the second, and so on."""


def target(path: str | Path) -> Path:
    """The path of a picture, checked before any work is done, so that none is lost.

    Raises:
        ValueError: The path does not end in .png or .svg.
    """
    if Path(path).suffix.lower() not in (".png", ".svg"):
        raise ValueError(f"path={str(path)!r} must end in .png or .svg.")
    return Path(path)


def as_written(text: str) -> str:
    """Text of others, such as the name of a class or of a model, for Matplotlib.

    It would take what stands between dollar signs for a formula, and leave a name that begins with _ out of a legend.
    """
    return (" " if text.startswith("_") else "") + text.replace("$", r"\$")


def figure(width: float, height: float) -> Figure:
    """An empty figure of `width` by `height` inches.

    Raises:
        ImportError: Matplotlib is not installed.

    Example:
        >>> drawing = figure(6, 4)
        >>> lines = drawing.subplots().plot([1, 2])
        >>> drawing.savefig(target("line.png"))
    """
    try:
        import matplotlib  # noqa: F401, which finds a missing package here, and not in the middle of a picture
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("The picture needs Matplotlib: pip install 'timm_nrpm[demo]'.") from error
    drawing = Figure(figsize=(width, height), layout="compressed")  # pyplot would keep it, and open windows
    FigureCanvasAgg(drawing)
    return drawing
