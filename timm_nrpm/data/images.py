"""Checks of images and labels: what every public function expects of them, checked here and nowhere else.

Images are pixels `[B, C, H, W]`: floating-point numbers in [0, 1], not normalised. Labels are `[B]`: integers, one for
each image, that are classes of the model. Pixels up to `ROUNDING` outside of [0, 1] are clamped, as rounding errors.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from operator import length_hint
from typing import Any

import torch
from torch import Tensor

ROUNDING = 1e-6
"""Largest distance of a pixel from [0, 1] that counts as a rounding error, of resizing or of float32 arithmetic."""


def count_of(loader: Iterable[Any]) -> int | None:
    """Number of batches that a loader says it gives; None if it has no length, such as a loader of a stream."""
    return length_hint(loader) or None


def pixels_of(loader: Iterable[Any], name: str = "The loader") -> Iterator[Tensor]:
    """The pixels `[B, C, H, W]` of every batch of a loader.

    Args:
        loader: Batches of pixels, or of tuples that start with pixels.
        name: Name of the loader in error messages.

    Raises:
        ValueError: A batch does not hold pixels in [0, 1].
    """
    for batch in loader:
        pixels = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
        if not isinstance(pixels, Tensor):
            raise ValueError(
                f"{name} gives {type(pixels).__name__}: give batches of pixels [B, C, H, W], or tuples that start with "
                "one."
            )
        yield _check_batch_of_pixels(pixels, f"{name} gives")


def check_batch(batch: Any, classes: int | None = None) -> tuple[Tensor, Tensor]:
    """The pixels `[B, C, H, W]` and the labels `[B]`, int64, of a batch.

    Args:
        batch: A batch of a loader.
        classes: Number of classes of the model; None returns the labels unchecked and unchanged.

    Raises:
        ValueError: The batch is not a pair of valid pixels and labels.
    """
    if not (isinstance(batch, (tuple, list)) and len(batch) == 2 and all(isinstance(t, Tensor) for t in batch)):
        raise ValueError(f"The loader gives {type(batch).__name__}: give pairs of pixels [B, C, H, W] and labels [B].")
    pixels, labels = _check_batch_of_pixels(batch[0], "The loader gives"), batch[1]
    if classes is not None:
        labels = check_labels(labels, classes, count=len(pixels))
    return pixels, labels


def check_labels(
    labels: Any, classes: int | None = None, *, count: int | None = None, what: str = "The loader gives labels"
) -> Tensor:
    """Labels `[B]` as int64.

    Args:
        labels: Labels to check, `[B]`, integers of any type.
        classes: Number of classes of the model; None allows every integer >= 0.
        count: Number of labels that there must be; None allows any number.
        what: Beginning of the error message.

    Raises:
        ValueError: The labels are not `[B]` integers that are classes of the model.
    """
    is_list = isinstance(labels, Tensor) and labels.ndim == 1 and len(labels) > 0
    is_integer = is_list and not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
    if not is_integer or count not in (None, len(labels)):
        raise ValueError(
            f"{what} {_described(labels)}: give {'[B]' if count is None else count} integers, one for each image (for "
            "logits, their argmax(1))."
        )
    labels = labels.long()  # unsigned integers have no minimum in torch
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or (classes is not None and high >= classes):
        has, allowed = "", ">= 0"
        if classes is not None:
            has, allowed = f", and the model has {classes} classes", f"from 0 to {classes - 1}"
            allowed += f", or a model with num_classes={high + 1}" if high >= classes else ""
        raise ValueError(f"{what} {_described(labels)} from {low} to {high}{has}: give integers {allowed}.")
    return labels.clone() if labels.is_inference() else labels


def check_pixels(pixels: Tensor, what: str = "The loader gives") -> Tensor:
    """The pixels, with rounding errors beyond 0 and 1 clamped.

    Args:
        pixels: Pixels to check, of any shape.
        what: Beginning of the error message.

    Raises:
        ValueError: The pixels are not floating-point numbers in [0, 1].
    """
    if not pixels.is_floating_point():
        raise ValueError(
            f"{what} {_described(pixels)}: give floating-point pixels in [0, 1], for bytes `pixels.float() / 255`."
        )
    low, high = float(pixels.min()), float(pixels.max())
    if not (low >= -ROUNDING and high <= 1 + ROUNDING):
        raise ValueError(
            f"{what} values from {low:.3g} to {high:.3g}: give pixels in [0, 1], before "
            "normalisation, which is done inside. With timm's loaders, use normalize=False."
        )
    if pixels.is_inference():
        pixels = pixels.clone()  # autograd refuses inference tensors
    return pixels if low >= 0 and high <= 1 else pixels.clamp(0, 1)


def check_images(images: Any, name: str = "pixels") -> Tensor:
    """Images `[B, C, H, W]`, floating-point numbers in [0, 1].

    Args:
        images: Images to check.
        name: Name of the argument in the error message.

    Raises:
        ValueError: `images` are not a tensor of this kind.
    """
    if not isinstance(images, Tensor) or images.ndim != 4 or not images.numel():
        raise ValueError(f"{name} is {_described(images)}: give images [B, C, H, W] of floating-point numbers.")
    return check_pixels(images, f"{name} has")


def check_pair(pixels: Tensor, attacked: Tensor) -> tuple[Tensor, Tensor]:
    """Both arguments as images `[B, C, H, W]` in [0, 1]; raises a ValueError if they are not, or differ in shape."""
    pixels, attacked = check_images(pixels), check_images(attacked, "attacked")
    if pixels.shape != attacked.shape:
        raise ValueError(
            f"pixels are {list(pixels.shape)} and attacked {list(attacked.shape)}: give the same images twice, clean "
            "and attacked."
        )
    return pixels, attacked


def _check_batch_of_pixels(pixels: Tensor, what: str) -> Tensor:
    """The pixels `[B, C, H, W]` of a batch, checked; `what` begins the error message."""
    if pixels.ndim != 4 or not pixels.numel():
        raise ValueError(f"{what} a batch that holds no images, {_described(pixels)}: give pixels [B, C, H, W].")
    return check_pixels(pixels, what)


def _described(values: Any) -> str:
    """Shape and dtype of a tensor, or the type of anything else, for an error message."""
    return f"{list(values.shape)} of {values.dtype}" if isinstance(values, Tensor) else type(values).__name__
