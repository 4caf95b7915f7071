"""A picture of the accuracy that randomized smoothing certified (Cohen et al., arXiv 1902.02918)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from timm_nrpm.evaluation.certificates import CertificationReport
from timm_nrpm.figures import canvas

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Colours of the sigmas: Okabe and Ito's palette, which colour-blind readers can tell apart."""
DASHES: tuple[Any, ...] = ("-", "--", ":", "-.", (0, (6, 1, 1, 1, 1, 1)), (0, (9, 3)))
"""Line styles of the models."""


def draw_certified(reports: Sequence[CertificationReport], path: str | Path) -> Path:
    """Draw certified accuracy over radius: one colour per sigma, one line style per model (Cohen et al., Figure 6).

    Where a curve drops to 0 at once, it has reached the largest radius that so many samples can certify, whatever the
    model: see :attr:`CertificationReport.largest_radius`.

    Args:
        reports: Reports on one or several models, at one or several sigmas.
        path: The file to write, which ends in .png or .svg.

    Raises:
        ValueError: There are no reports, two of one model and sigma, or too many to tell apart; or `path` has another
            ending.
        ImportError: Matplotlib is not installed.

    Example:
        >>> draw_certified([certify(model, loader, sigma) for sigma in (0.12, 0.25, 0.5)], "certified.png")
        PosixPath('certified.png')
    """
    path, reports = canvas.target(path), list(reports)
    sigmas, names = sorted({r.sigma for r in reports}), list(dict.fromkeys(r.title for r in reports))
    if not reports or len(sigmas) > len(COLOURS) or len(names) > len(DASHES):
        raise ValueError(
            f"{len(reports)} reports of {len(sigmas)} sigmas and {len(names)} models cannot be drawn: give at least "
            f"one report, and at most {len(COLOURS)} sigmas and {len(DASHES)} models."
        )
    if len({(r.sigma, r.title) for r in reports}) < len(reports):
        raise ValueError(
            "Two reports have the same model and sigma, so their curves would look the same: tell them apart by "
            "certify(..., name=...) or dataclasses.replace(report, name=...)."
        )
    figure = canvas.figure(8, 5)
    panel = figure.subplots()
    for report in reports:
        radii, accuracies = report.curve()
        corners = [100 * accuracy for accuracy in (*accuracies, 0.0)]
        look = {"color": COLOURS[sigmas.index(report.sigma)], "linestyle": DASHES[names.index(report.title)]}
        label = f"{canvas.as_written(report.title)}, sigma {report.sigma:g}"
        panel.plot((*radii, radii[-1]), corners, drawstyle="steps-pre", linewidth=1.8, label=label, **look)
    panel.set(xlabel="L2 radius, in pixel units of [0, 1]", ylabel="certified accuracy, %", ylim=(0, 101))
    panel.set_xlim(left=0)
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8)
    settings = {f"{len(r.images)} images, n = {r.n}, confidence {r.confidence}" for r in reports}
    panel.set_title("Randomized smoothing" + (f", {settings.pop()} each" if len(settings) == 1 else ""))
    figure.savefig(path, dpi=120)
    return path
