"""A picture of a model's accuracy by the size that its images were reduced to."""

from __future__ import annotations

from pathlib import Path

from timm_nrpm.evaluation.intervals import exact
from timm_nrpm.evaluation.resolutions import ResolutionReport
from timm_nrpm.figures.canvas import STYLES, figure, target


def draw_resolutions(report: ResolutionReport, path: str | Path) -> Path:
    """Draw accuracy over size with the exact 95 % intervals, beside accuracy at full size and chance.

    Args:
        report: The result of :func:`timm_nrpm.resolutions.evaluate_resolutions`.
        path: The file to write, which ends in .png or .svg.

    Returns:
        `path`.

    Raises:
        ValueError: `path` has another ending.
        ImportError: Matplotlib is not installed.

    Example:
        >>> draw_resolutions(timm_nrpm.resolutions.evaluate_resolutions(model, loader, (2, 4)), "sizes.png")
        PosixPath('sizes.png')
    """
    file, sizes = target(path), sorted(report.sizes)
    shares = [100 * report.accuracy_at(size) for size in sizes]
    ends = [exact(report.reduced[size].count("1"), report.samples) for size in sizes]
    below = [max(0.0, share - 100 * low) for share, (low, _) in zip(shares, ends, strict=True)]
    above = [max(0.0, 100 * high - share) for share, (_, high) in zip(shares, ends, strict=True)]
    drawing = figure(5.0, 3.2)
    panel = drawing.subplots()
    colour, marker, line = STYLES[0]
    panel.errorbar(sizes, shares, [below, above], color=colour, marker=marker, linestyle=line, capsize=3)
    panel.axhline(100 * report.accuracy, color="black", linewidth=1, label="full size")
    panel.axhline(100 / report.classes, color="grey", linewidth=1, linestyle=":", label="chance")
    panel.set_xscale("log", base=2)
    panel.set_xticks(sizes, [str(size) for size in sizes])
    panel.set_ylim(0, 100)
    panel.set_xlabel("shorter side of the reduced images, pixels")
    panel.set_ylabel("accuracy, %")
    panel.set_title(f"{report.samples} images", fontsize=10)
    panel.legend(frameon=False)
    drawing.savefig(file, dpi=120)
    return file
