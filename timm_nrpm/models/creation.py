"""Plain timm models, created by timm from a name or from its two files, with one clear error where that fails."""

from __future__ import annotations

import difflib
import json
import math
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from urllib.error import URLError

import timm
import torch
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, OfflineModeIsEnabled
from timm.models import get_model_input_config
from torch import nn

from timm_nrpm.errors import HubError, WeightsUnavailable
from timm_nrpm.models.downloads import is_lost_connection
from timm_nrpm.models.network import network_error_of, patience

TIMM_FILES = ("config.json", "model.safetensors")
"""What timm saves a model in."""


LARGEST_CONFIG = 16 << 20
"""Bytes of a config: the largest have the names of 22 thousand classes."""


LARGEST_IMAGE = 1 << 23
"""Numbers of an image: three channels of 1672x1672."""


ABOUT_IMAGES = (
    *("input_size", "test_input_size", "min_input_size", "fixed_input_size", "interpolation", "crop_pct"),
    *("test_crop_pct", "crop_mode", "mean", "std", "num_classes", "label_names", "label_descriptions", "pool_size"),
    *("test_pool_size", "first_conv", "classifier", "license", "description", "origin_url", "paper_name", "paper_ids"),
    *("notes", "tag", "architecture"),
)
"""Of timm's pretrained config, what does not say where to read from."""


def brings_weights(kwargs: Mapping[str, Any]) -> bool:
    """Whether arguments of timm's create_model say where weights are, so that the model's name does not."""
    overlay = dict(kwargs.get("pretrained_cfg_overlay") or {})
    return any(kwargs.get(key) for key in ("checkpoint_path", "pretrained_cfg")) or any(
        overlay.get(key) for key in ("file", "url", "state_dict")
    )


def check_name(name: str) -> None:
    """Raise a ValueError for a name that timm does not know, with near ones."""
    if ":" in name or "/" in name:
        return  # a source, which timm checks itself
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        near = difflib.get_close_matches(architecture, timm.list_models(exclude_filters="nrpm_*"), n=3)
        hint = f" Near names: {', '.join(near)}." if near else ""
        raise ValueError(f"Unknown model {name!r}.{hint} timm_nrpm.list_models() lists all.")
    tags = [n.partition(".")[2] for n in timm.list_models(architecture, include_tags=True)]
    if tag and tag not in tags:
        raise ValueError(f"Unknown tag {tag!r} for {architecture}. It has: {', '.join(filter(None, tags)) or 'none'}.")


def create_plain(name: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    """`timm.create_model`, with one clear error where the weights cannot be had.

    Raises:
        ValueError: An unknown name; near ones are suggested.
        WeightsUnavailable: The weights can be neither downloaded nor found on this machine.
    """
    check_name(name)
    checkpoint = kwargs.get("checkpoint_path")
    if checkpoint and not Path(checkpoint).is_file():
        raise FileNotFoundError(f"checkpoint_path={str(checkpoint)!r} is no file.")
    try:
        with patience() if pretrained or ":" in name else nullcontext():
            return timm.create_model(name, pretrained=pretrained, **kwargs)
    except Exception as error:
        unreachable = (EntryNotFoundError, HfHubHTTPError, OfflineModeIsEnabled, HubError, URLError)
        if isinstance(error, WeightsUnavailable) or not (isinstance(error, unreachable) or is_lost_connection(error)):
            raise
        reason = str(network_error_of(error) or error).strip().split("\n")[0].rstrip(".")
    raise WeightsUnavailable(unavailable(name, reason))  # the client's own errors are pages long


def unavailable(name: str, reason: str) -> str:
    """What to say of weights that cannot be had."""
    return (
        f"The pretrained weights of {name} can be neither downloaded nor found in the cache ({reason}). "
        "Connect to the network once, or point to a copy: checkpoint_path=FILE with pretrained=False, or "
        "pretrained_cfg_overlay=dict(file=FILE)."
    )


def from_timm_files(config: Path, weights: Path, kwargs: Mapping[str, Any], dtype: torch.dtype | None) -> nn.Module:
    """The model in timm's two files, which do not get to say where else to read from.

    Raises:
        ValueError: They are no such files.
    """
    content = json.loads(config.read_text())
    if not isinstance(content, dict) or not isinstance(content.get("pretrained_cfg"), dict):
        raise ValueError(f"{config.name} is no model's: it has no pretrained_cfg.")
    if not timm.is_model(str(content.get("architecture"))) or content["architecture"].startswith("nrpm_"):
        raise ValueError(f"{config.name} names architecture {content.get('architecture')!r}, which timm does not know.")
    content["pretrained_cfg"] = {k: v for k, v in content["pretrained_cfg"].items() if k in ABOUT_IMAGES}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / TIMM_FILES[0]).write_text(json.dumps(content))
        try:
            (Path(folder) / TIMM_FILES[1]).symlink_to(weights.resolve())
        except OSError:  # where only an administrator may make links
            shutil.copy(weights, Path(folder) / TIMM_FILES[1])
        model = timm.create_model(f"local-dir:{folder}", pretrained=True, dtype=dtype, **kwargs)
    cfg: Any = model.pretrained_cfg
    for key in ("file", "source"):
        cfg.pop(key, None)
    return model


def check_image_size(model: nn.Module) -> None:
    """Raise a ValueError if a stranger's model wants images so large that one fills the memory."""
    size = get_model_input_config(model)["input_size"]
    if math.prod(size) > LARGEST_IMAGE:
        raise ValueError(f"its images have {list(size)} numbers, and {LARGEST_IMAGE} are the most.")
