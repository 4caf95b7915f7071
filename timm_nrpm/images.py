"""What a loader gives, found fit: pixels in [0, 1], and labels that are classes of the model."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def check_batch(batch: Any, classes: int | None = None) -> tuple[Tensor, Tensor]:
    """Pixels `[B, C, H, W]` and labels `[B]` of a batch, found fit; without `classes`, labels are not looked at."""
    if not (isinstance(batch, (tuple, list)) and len(batch) == 2 and all(isinstance(t, Tensor) for t in batch)):
        raise ValueError(f"The loader gives {type(batch).__name__}: give pairs of pixels [B, C, H, W] and labels [B].")
    pixels, labels = batch
    check_pixels(pixels)
    if classes is not None:
        check_labels(labels, classes)
        labels = labels.long()
    return pixels, labels


def check_labels(labels: Tensor, classes: int) -> None:
    """Raise a ValueError unless labels are `[B]` integers of one of the classes."""
    low, high = int(labels.min()), int(labels.max())
    if labels.is_floating_point() or labels.ndim != 1 or low < 0 or high >= classes:
        raise ValueError(
            f"The loader gives labels {list(labels.shape)} of {labels.dtype} from {low} to {high}, and the model has "
            f"{classes} classes: give [B] integers from 0 to {classes - 1}, or a model with num_classes={high + 1}."
        )


def check_pixels(pixels: Tensor) -> None:
    """Raise a ValueError unless all pixels are in [0, 1]."""
    low, high = float(pixels.min()), float(pixels.max())
    if not (low >= 0.0 and high <= 1.0):
        raise ValueError(
            f"The loader gives values from {low:.3g} to {high:.3g}: give pixels in [0, 1], before "
            "normalisation, which is done inside. With timm's loaders, use normalize=False."
        )
