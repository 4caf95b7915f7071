"""Image files of every mode, decoded to grey or RGB as a viewer shows them, without loss of precision."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

DEEP = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")
"""Pillow's greyscale modes of more than 8 bits, which its own conversion clips at 255."""


def decoded(image: Image.Image, mode: str) -> Image.Image | Tensor:
    """The image upright, opaque, and in the mode that the model takes.

    - Greyscale of 16 bits is divided by 65535 and keeps its precision; floating-point greyscale, which must be in
      [0, 1], is taken as it is.
    - An image with an alpha channel, or with a transparent colour, is composed over white, as most viewers show it;
      otherwise the hidden colours of its transparent pixels would show.
    - The EXIF orientation is applied, so that photographs stand upright.
    - Images with a palette, of 1 bit and in CMYK become grey or RGB by Pillow's own formulas. Colour profiles (ICC) are
      not applied.
    - Pillow reads 16-bit colour, and 16-bit grey with alpha, with 8 bits a channel; the lower 8 are lost.

    Args:
        image: The image as `Image.open` gives it.
        mode: `"L"` for grey or `"RGB"`.

    Returns:
        An image of that mode or, for greyscale with more than 8 bits, a tensor `[1, H, W]` of float32 in [0, 1].

    Raises:
        ValueError: The values of a greyscale image with more than 8 bits are outside the range of its mode, so that
            it is unknown which value is white.

    Example:
        >>> decoded(Image.new("RGBA", (2, 2), (255, 0, 0, 0)), "RGB").getpixel((0, 0))
        (255, 255, 255)
    """
    image = _upright(image)
    if image.mode in DEEP:
        return _scaled(image)
    if image.getbands()[-1] in ("A", "a") or "transparency" in image.info:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert(mode)


def _upright(image: Image.Image) -> Image.Image:
    """The image with its EXIF orientation applied."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # EXIF data that are broken in any way are ignored: the image is fine without them
        return image


def _scaled(image: Image.Image) -> Tensor:
    """Greyscale of more than 8 bits as `[1, H, W]` in [0, 1]."""
    values = np.asarray(image).astype(np.float32)  # [H, W]
    low, high, white = float(values.min()), float(values.max()), 1.0 if image.mode == "F" else 65535.0
    if not 0.0 <= low <= high <= white:
        raise ValueError(
            f"An image of mode {image.mode!r} has values from {low:g} to {high:g}, and is read with 0 as black and "
            f"{white:g} as white: save it with 8 or 16 bits, or as floating-point numbers in [0, 1]."
        )
    pixels = torch.from_numpy(values / white)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        pixels[torch.from_numpy(values == transparent)] = 1.0
    return pixels.unsqueeze(0)  # [1, H, W]
