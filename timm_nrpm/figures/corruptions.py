"""A picture of a model's accuracy under corruptions, beside its baseline's."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

from timm_nrpm.evaluation.corruption_report import CorruptionReport
from timm_nrpm.evaluation.corruptions import EXTRA, IMAGENET_C, NATIVE
from timm_nrpm.figures.canvas import SIGNED, figure, target

GROUPS = (IMAGENET_C[:3], IMAGENET_C[3:7], IMAGENET_C[7:11], IMAGENET_C[11:], EXTRA, NATIVE)
"""Kinds by group (noise, blur, weather, digital, and two more), between which a white line is drawn."""


def draw_corruptions(report: CorruptionReport, path: str | Path) -> Path:
    """Draw accuracy by kind and severity as heat maps, of the model, of its baseline and of the difference, with the
    corruption error (CE) of each kind on the right.

    Args:
        report: The result of :func:`timm_nrpm.evaluate_corruptions`. Without a baseline there is one map.
        path: The file to write, which ends in .png or .svg.

    Returns:
        `path`.

    Raises:
        ValueError: `path` has another ending.
        ImportError: Matplotlib is not installed.

    Example:
        >>> draw_corruptions(evaluate_corruptions(model, loader, "white_noise"), "corruptions.png")
        PosixPath('corruptions.png')
    """
    file, kinds = target(path), list(report.model.corrupted)
    severities = list(report.model.corrupted[kinds[0]])
    shown = {"model": report.model} if report.baseline is None else {"model": report.model, "baseline": report.baseline}
    shares = {
        name: [[100 * accuracy[kind][severity] for severity in severities] for kind in kinds]
        for name, accuracy in ((name, answers.accuracy) for name, answers in shown.items())
    }
    maps = [
        (f"{name}\nclean {100 * answers.clean:.1f} %", shares[name], "accuracy, %") for name, answers in shown.items()
    ]
    if report.baseline is not None:
        change = [[a - b for a, b in zip(*rows, strict=True)] for rows in zip(*shares.values(), strict=True)]
        clean = 100 * (report.model.clean - report.baseline.clean)
        maps.append((f"model - baseline\nclean {clean:+.1f}", change, "percentage points"))
    across = max(1.5, 0.5 * len(severities))
    drawing = figure((across + 0.6) * len(maps) + 3.0, 0.32 * len(kinds) + 1.9)
    panels = drawing.subplots(1, len(maps), squeeze=False, sharey=True)[0]
    images = [_fill(panel, *each) for panel, each in zip(panels, maps, strict=True)]
    for panel in panels:
        panel.set_xticks(range(len(severities)), severities)
        panel.set_xlabel("severity")
        for row, (above, below) in enumerate(pairwise(kinds)):
            if not any({above, below} <= set(group) for group in GROUPS):
                panel.axhline(row + 0.5, color="white", linewidth=4)
    panels[0].set_yticks(range(len(kinds)), [kind.replace("_", " ") for kind in kinds])
    scale: dict[str, Any] = {"aspect": 30, "pad": 0.02, "shrink": 0.8}
    drawing.colorbar(images[0], ax=list(panels[: len(shown)]), label=maps[0][2], **scale)
    heading = f"{report.samples} images"
    if report.baseline is not None:
        drawing.colorbar(images[-1], ax=panels[-1], label=maps[-1][2], **scale)
        for row, error in enumerate(report.corruption_errors().values()):
            where: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "va": "center", "fontsize": 8}
            panels[-1].annotate(f"CE {_percent(error)}", (1.03, row), **where)
        heading += f", mCE {_percent(report.mean_corruption_error)}"
        heading += f", relative mCE {_percent(report.relative_mean_corruption_error)}"
    drawing.suptitle(heading, fontsize=10)
    drawing.savefig(file, dpi=120, bbox_inches="tight")
    return file


def _fill(panel: Any, title: str, rows: list[list[float]], unit: str) -> Any:
    """Draw a heat map with the number in each cell; the image is returned."""
    signed = unit != "accuracy, %"
    largest = max(1.0, *(abs(value) for row in rows for value in row)) if signed else 100.0
    image = panel.imshow(
        rows, cmap=SIGNED if signed else "viridis", vmin=-largest if signed else 0, vmax=largest, aspect="auto"
    )
    panel.set_title(title, fontsize=10)
    for y, row in enumerate(rows):
        for x, value in enumerate(row):
            red, green, blue, _ = image.cmap(image.norm(value))
            dark = 0.3 * red + 0.59 * green + 0.11 * blue < 0.5
            text = f"{value:+.0f}" if signed and round(value) else f"{abs(value):.0f}"
            panel.text(x, y, text, ha="center", va="center", fontsize=8, color="white" if dark else "black")
    return image


def _percent(ratio: float | None) -> str:
    return "undefined" if ratio is None else f"{100 * ratio:.0f} %"
