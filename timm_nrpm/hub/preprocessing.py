"""What a model takes, as its card says it: the size of images, who normalises them, and how timm prepares them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from timm_nrpm.hub.templates import Metadata

FITTED = {
    "center": ", by their shorter side and cropped in the middle",
    "squash": " to that shape",
    "border": ", by their longer side and padded",
}
"""How an image of another shape is made to fit, by timm's name of it."""


def prepared(config: Path) -> Metadata:
    """The values of the variables in the part on preprocessing.

    Args:
        config: timm's config of a model, or the path where there is none.
    """
    images = images_of(config)
    return {"images_of": None} if images is None else {"images_of": in_words(images)}


def images_of(config: Path) -> Mapping[str, Any] | None:
    """What timm's config says of a model's images, such as `input_size` and `mean`; None without a config."""
    if not config.is_file():
        return None
    found = json.loads(config.read_text(encoding="utf-8")).get("pretrained_cfg") or {}
    return found if found.get("input_size") else None


def in_words(images: Mapping[str, Any]) -> dict[str, str]:
    """The same in words, by name of the fact."""
    channels, height, width = images["input_size"]
    kind = {1: "grey", 3: "RGB"}.get(channels, f"{channels} channels")
    crop = float(images.get("crop_pct") or 1)
    mode = str(images.get("crop_mode") or "center")
    return {
        "size": f"{height} x {width} pixels, {kind}",
        "shape": f"[B, {channels}, {height}, {width}]",
        "mode": "L" if channels == 1 else "RGB",
        "mean": numbers(images.get("mean")),
        "std": numbers(images.get("std")),
        "resize": f"{images.get('interpolation') or 'bilinear'} interpolation{FITTED.get(mode, '')}"
        + (f", of which the middle {100 * crop:.3g} % of the side are kept" if crop < 1 else ""),
    }


def numbers(values: Any) -> str:
    """Numbers, one for each channel, as text."""
    return ", ".join(f"{float(value):.4g}" for value in values or ())
