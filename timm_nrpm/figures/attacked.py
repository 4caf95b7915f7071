"""A picture of attacked images beside the clean ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from timm_nrpm.data.images import check_labels, check_pair
from timm_nrpm.figures.canvas import SIGNED, as_written, figure, target

MOST_IMAGES = 64
IN_A_ROW = 8


def draw_attacked(
    pixels: Tensor,
    attacked: Tensor,
    labels: Tensor,
    predictions: Tensor,
    path: str | Path,
    names: Sequence[str] | None = None,
) -> Path:
    """Draw clean images, attacked images and their differences, amplified so that the largest fills the scale.

    Args:
        pixels, attacked: The same images, clean and attacked, each `[B, C, H, W]` in [0, 1], grey or RGB, at most 64.
        labels, predictions: The true classes, and those that a model predicts for the attacked images, each `[B]`.
        path: The file to write, which ends in .png or .svg.
        names: Names of the classes; the default is their numbers.

    Returns:
        `path`.

    Raises:
        ValueError: `path` has another ending, the images or classes do not fit, or a class has no name.
        ImportError: Matplotlib is not installed.

    Example:
        >>> draw_attacked(pixels[:8], attacked[:8], labels[:8], model(attacked[:8]).argmax(1), "attacked.png")
        PosixPath('attacked.png')
    """
    check_pair(pixels, attacked)
    count, channels = pixels.shape[:2]
    if channels not in (1, 3) or count > MOST_IMAGES:
        raise ValueError(
            f"pixels are {count} images with {channels} channels: give at most {MOST_IMAGES}, grey (1) or RGB (3)."
        )
    for name, classes in (("labels", labels), ("predictions", predictions)):
        check_labels(classes, count=count, what=f"{name} are")
        if names is not None and int(classes.max()) >= len(names):
            raise ValueError(
                f"{name} go up to {int(classes.max())}, and there are {len(names)} names: give one for each class."
            )
    file = target(path)
    change = (attacked - pixels).detach().cpu().float()
    largest = float(change.abs().max())
    factor = 1 / largest if largest > 0 else 1.0
    across = min(count, IN_A_ROW)
    down = math.ceil(count / across)
    drawing = figure(max(1.4 * across, 5.0), 4.9 * down + 0.5)
    panels = drawing.subplots(3 * down, across, squeeze=False)
    for panel in panels.flat:
        panel.axis("off")
    for i in range(count):
        column = panels[3 * (i // across) : 3 * (i // across) + 3, i % across]
        # In a colour image grey stands for no change; a single channel is drawn in signed colours.
        difference = change[i] * factor if channels == 1 else 0.5 + change[i] * factor / 2
        for j, image in enumerate((pixels[i], attacked[i], difference)):
            signed = j == 2 and channels == 1
            look: dict[str, Any] = {"cmap": SIGNED if signed else "gray", "vmin": -1.0 if signed else 0.0, "vmax": 1.0}
            shown = image.detach().cpu().float().movedim(0, -1).squeeze(-1).clamp(-1, 1).numpy()
            column[j].imshow(shown, interpolation="nearest", **look)
        label, prediction = (str(int(c[i])) if names is None else names[int(c[i])] for c in (labels, predictions))
        column[0].set_title(f"label: {as_written(label)}", fontsize=9)
        column[1].set_title(f"model: {as_written(prediction)}{'' if prediction == label else ' (wrong)'}", fontsize=9)
    drawing.suptitle(f"Clean, attacked, and the difference (largest {largest:.3g}) times {factor:.3g}", fontsize=11)
    drawing.savefig(file, dpi=120, bbox_inches="tight")
    return file
