"""What an image and a label are: the contract of every entrance, checked here and nowhere else.

Images are pixels `[B, C, H, W]`, floating-point numbers in [0, 1], not normalised; labels are `[B]`, integers that are
classes of the model, one for each image. What lies up to `ROUNDING` outside of [0, 1] was rounded, and is cut off.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from operator import length_hint
from typing import Any

import torch
from torch import Tensor

ROUNDING = 1e-6
"""How far beyond [0, 1] resizing and arithmetic may leave a pixel; on the device's own float32."""


def count_of(loader: Iterable[Any]) -> int | None:
    """How many batches a loader says it gives; None for one that has no length, such as that of a stream."""
    return length_hint(loader) or None


def pixels_of(loader: Iterable[Any], name: str = "The loader") -> Iterator[Tensor]:
    """The pixels `[B, C, H, W]` of every batch of a loader, whose batches are pixels or tuples that start with them.

    Args:
        loader: The batches.
        name: How messages call it.

    Raises:
        ValueError: A batch that holds no pixels in [0, 1].
    """
    for batch in loader:
        pixels = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
        if not isinstance(pixels, Tensor):
            raise ValueError(
                f"{name} gives {type(pixels).__name__}: give batches of pixels [B, C, H, W], or tuples that start with "
                "one."
            )
        yield _fit(pixels, f"{name} gives")


def check_batch(batch: Any, classes: int | None = None) -> tuple[Tensor, Tensor]:
    """Pixels `[B, C, H, W]` and labels `[B]`, int64, of a batch.

    Args:
        batch: What a loader gave.
        classes: How many the model has; without it labels are not looked at, and come as they are.

    Raises:
        ValueError: It is no pair of pixels and labels that fit.
    """
    if not (isinstance(batch, (tuple, list)) and len(batch) == 2 and all(isinstance(t, Tensor) for t in batch)):
        raise ValueError(f"The loader gives {type(batch).__name__}: give pairs of pixels [B, C, H, W] and labels [B].")
    pixels, labels = _fit(batch[0], "The loader gives"), batch[1]
    if classes is not None:
        labels = check_labels(labels, classes, count=len(pixels))
    return pixels, labels


def check_labels(
    labels: Any, classes: int | None = None, *, count: int | None = None, what: str = "The loader gives labels"
) -> Tensor:
    """Labels `[B]` as int64.

    Args:
        labels: Integers of any type.
        classes: How many the model has; by default any number will do.
        count: How many labels there have to be, where that is known.
        what: How the message begins.

    Raises:
        ValueError: They are not `[B]` integers of one of the classes.
    """
    fit = isinstance(labels, Tensor) and labels.ndim == 1 and len(labels) > 0
    whole = fit and not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
    if not whole or count not in (None, len(labels)):
        raise ValueError(
            f"{what} {_said(labels)}: give {'[B]' if count is None else count} integers, one for each image (of "
            "logits, the argmax(1))."
        )
    labels = labels.long()  # unsigned integers have no minimum in torch
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or (classes is not None and high >= classes):
        has, allowed = "", "of 0 and more"
        if classes is not None:
            has, allowed = f", and the model has {classes} classes", f"from 0 to {classes - 1}"
            allowed += f", or a model with num_classes={high + 1}" if high >= classes else ""
        raise ValueError(f"{what} {_said(labels)} from {low} to {high}{has}: give integers {allowed}.")
    return labels.clone() if labels.is_inference() else labels


def check_pixels(pixels: Tensor, what: str = "The loader gives") -> Tensor:
    """The pixels, cut off at 0 and 1 where they were rounded.

    Args:
        pixels: Numbers of any shape.
        what: How the message begins.

    Raises:
        ValueError: They are no floating-point numbers in [0, 1].
    """
    if not pixels.is_floating_point():
        raise ValueError(
            f"{what} {_said(pixels)}: give floating-point pixels in [0, 1], of bytes `pixels.float() / 255`."
        )
    low, high = float(pixels.min()), float(pixels.max())
    if not (low >= -ROUNDING and high <= 1 + ROUNDING):
        raise ValueError(
            f"{what} values from {low:.3g} to {high:.3g}: give pixels in [0, 1], before "
            "normalisation, which is done inside. With timm's loaders, use normalize=False."
        )
    if pixels.is_inference():
        pixels = pixels.clone()  # through which no gradient goes otherwise
    return pixels if low >= 0 and high <= 1 else pixels.clamp(0, 1)


def check_images(images: Any, name: str = "pixels") -> Tensor:
    """Images `[B, C, H, W]`, floating-point numbers in [0, 1].

    Args:
        images: What was given.
        name: The argument it was given as.

    Raises:
        ValueError: They are none.
    """
    if not isinstance(images, Tensor) or images.ndim != 4 or not images.numel():
        raise ValueError(f"{name} is {_said(images)}: give images [B, C, H, W] of floating-point numbers.")
    return check_pixels(images, f"{name} has")


def check_pair(pixels: Tensor, attacked: Tensor) -> tuple[Tensor, Tensor]:
    """Both as images `[B, C, H, W]` in [0, 1] of one shape; a ValueError if they are none."""
    pixels, attacked = check_images(pixels), check_images(attacked, "attacked")
    if pixels.shape != attacked.shape:
        raise ValueError(
            f"pixels are {list(pixels.shape)} and attacked {list(attacked.shape)}: give the same images twice, clean "
            "and attacked."
        )
    return pixels, attacked


def _fit(pixels: Tensor, what: str) -> Tensor:
    """Pixels `[B, C, H, W]` of a batch."""
    if pixels.ndim != 4 or not pixels.numel():
        raise ValueError(f"{what} a batch without images, or what are none: {_said(pixels)}. Give pixels [B, C, H, W].")
    return check_pixels(pixels, what)


def _said(values: Any) -> str:
    return f"{list(values.shape)} of {values.dtype}" if isinstance(values, Tensor) else type(values).__name__
