"""Images and labels, found fit: pixels in [0, 1], and labels that are classes of the model."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def check_batch(batch: Any, classes: int | None = None) -> tuple[Tensor, Tensor]:
    """Pixels `[B, C, H, W]` and labels `[B]` of a batch, found fit; without `classes`, labels are not looked at."""
    if not (isinstance(batch, (tuple, list)) and len(batch) == 2 and all(isinstance(t, Tensor) for t in batch)):
        raise ValueError(f"The loader gives {type(batch).__name__}: give pairs of pixels [B, C, H, W] and labels [B].")
    pixels, labels = batch
    if pixels.ndim != 4 or not pixels.numel():
        raise ValueError(
            f"The loader gives a batch without images, or what are none: {_said(pixels)}. Give pixels [B, C, H, W]."
        )
    check_pixels(pixels)
    if classes is not None:
        check_labels(labels, classes)
        labels = labels.long()
    return pixels, labels


def check_labels(
    labels: Tensor, classes: int | None = None, *, count: int | None = None, what: str = "The loader gives labels"
) -> None:
    """Raise a ValueError unless labels are `[B]` integers of one of the classes.

    Args:
        classes: How many the model has; by default any number will do.
        count: How many labels there have to be, where that is known.
        what: How the message begins.
    """
    fit = isinstance(labels, Tensor) and labels.ndim == 1 and len(labels) > 0 and not labels.is_floating_point()
    if not fit or count not in (None, len(labels)):
        raise ValueError(
            f"{what} {_said(labels)}: give {'[B]' if count is None else count} integers, one for each image (of "
            "logits, the argmax(1))."
        )
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or (classes is not None and high >= classes):
        has, allowed = "", "of 0 and more"
        if classes is not None:
            has, allowed = f", and the model has {classes} classes", f"from 0 to {classes - 1}"
            allowed += f", or a model with num_classes={high + 1}" if high >= classes else ""
        raise ValueError(f"{what} {_said(labels)} from {low} to {high}{has}: give integers {allowed}.")


def check_pixels(pixels: Tensor, what: str = "The loader gives") -> None:
    """Raise a ValueError, which begins with `what`, unless all pixels are in [0, 1]."""
    low, high = float(pixels.min()), float(pixels.max())
    if not (low >= 0.0 and high <= 1.0):
        raise ValueError(
            f"{what} values from {low:.3g} to {high:.3g}: give pixels in [0, 1], before "
            "normalisation, which is done inside. With timm's loaders, use normalize=False."
        )


def check_images(images: Tensor, name: str = "pixels") -> None:
    """Raise a ValueError unless these are images `[B, C, H, W]`, floating-point numbers in [0, 1]."""
    if not isinstance(images, Tensor) or images.ndim != 4 or not images.numel() or not images.is_floating_point():
        raise ValueError(f"{name} is {_said(images)}: give images [B, C, H, W] of floating-point numbers.")
    check_pixels(images, f"{name} has")


def check_pair(pixels: Tensor, attacked: Tensor) -> None:
    """Raise a ValueError unless both are images `[B, C, H, W]` in [0, 1] of one shape."""
    check_images(pixels)
    check_images(attacked, "attacked")
    if pixels.shape != attacked.shape:
        raise ValueError(
            f"pixels are {list(pixels.shape)} and attacked {list(attacked.shape)}: give the same images twice, clean "
            "and attacked."
        )


def _said(values: Any) -> str:
    return f"{list(values.shape)} of {values.dtype}" if isinstance(values, Tensor) else type(values).__name__
