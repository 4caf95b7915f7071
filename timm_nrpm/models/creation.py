"""Plain timm models, created from a name or from timm's two files, with one clear error where that fails."""

from __future__ import annotations

import difflib
import json
import math
import re
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
from timm_nrpm.models.network import OFFLINE, network_error_of, patience

TIMM_FILES = ("config.json", "model.safetensors")
"""Names of the files in which timm saves a model: its config and its weights."""


LARGEST_CONFIG = 16 << 20
"""Largest size of a config in bytes; the largest known ones name 22 thousand classes."""


LARGEST_IMAGE = 1 << 23
"""Largest number of values in one image, which is three channels of 1672x1672 pixels."""


ABOUT_IMAGES = (
    *("input_size", "test_input_size", "min_input_size", "fixed_input_size", "interpolation", "crop_pct"),
    *("test_crop_pct", "crop_mode", "mean", "std", "num_classes", "label_names", "label_descriptions", "pool_size"),
    *("test_pool_size", "first_conv", "classifier", "license", "description", "origin_url", "paper_name", "paper_ids"),
    *("notes", "tag", "architecture"),
)
"""Keys of timm's pretrained config that a stranger may set, since they do not say where to read weights from."""


def brings_weights(kwargs: Mapping[str, Any]) -> bool:
    """Whether arguments of timm's `create_model` say where the weights are, so that the model's name does not."""
    overlay = dict(kwargs.get("pretrained_cfg_overlay") or {})
    return any(kwargs.get(key) for key in ("checkpoint_path", "pretrained_cfg")) or any(
        overlay.get(key) for key in ("file", "url", "state_dict")
    )


def check_name(name: str) -> None:
    """Raise a ValueError that suggests similar names if timm does not know `name`."""
    if ":" in name or "/" in name:
        return  # a source such as hf-hub:owner/name, which timm checks itself
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        near = difflib.get_close_matches(architecture, timm.list_models(exclude_filters="nrpm_*"), n=3)
        hint = f" Near names: {', '.join(near)}." if near else ""
        raise ValueError(f"Unknown model {name!r}.{hint} timm_nrpm.list_models() lists all.")
    tags = [n.partition(".")[2] for n in timm.list_models(architecture, include_tags=True)]
    if tag and tag not in tags:
        raise ValueError(f"Unknown tag {tag!r} for {architecture}. It has: {', '.join(filter(None, tags)) or 'none'}.")


def create_plain(name: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    """Call `timm.create_model`, with one clear error if the weights cannot be loaded.

    Args:
        name: Name of a model, with or without a tag, or a source such as `hf-hub:owner/name`.
        pretrained: Whether to load pretrained weights.
        **kwargs: Further arguments of `timm.create_model`.

    Raises:
        ValueError: timm does not know the name; the message suggests similar ones.
        ValueError: The file at `checkpoint_path` holds a reprogrammed model.
        FileNotFoundError: There is no file at `checkpoint_path`.
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
        if checkpoint and isinstance(error, RuntimeError) and re.search(r"Unexpected key.*\.lam\"", str(error)):
            raise ValueError(
                f"{checkpoint} holds a reprogrammed model with its lambdas: load it by "
                f"timm.create_model({f'nrpm_{name}'!r}, checkpoint_path={str(checkpoint)!r}), with the settings "
                "that it was trained with, such as iterations and learnable."
            ) from None
        unreachable = (EntryNotFoundError, HfHubHTTPError, OfflineModeIsEnabled, HubError, URLError)
        if isinstance(error, WeightsUnavailable) or not (isinstance(error, unreachable) or is_lost_connection(error)):
            raise
        reason = str(network_error_of(error) or error).strip().split("\n")[0].rstrip(".")
    raise WeightsUnavailable(unavailable(name, reason))  # without the client's own error, which is pages long


def unavailable(name: str, reason: str) -> str:
    """The message for pretrained weights that cannot be loaded for a given reason."""
    return (
        f"The pretrained weights of {name} can be neither downloaded nor found in the cache ({reason}). "
        "Connect to the network once, or point to a copy: checkpoint_path=FILE with pretrained=False, or "
        f"pretrained_cfg_overlay=dict(file=FILE). {OFFLINE}."
    )


def from_timm_files(config: Path, weights: Path, kwargs: Mapping[str, Any], dtype: torch.dtype | None) -> nn.Module:
    """Build the model that timm's two files hold, and read nothing else, whatever the config names.

    Args:
        config: Path of timm's config.
        weights: Path of the safetensors file.
        kwargs: Further arguments of `timm.create_model`.
        dtype: The dtype of the model; None for timm's default.

    Raises:
        ValueError: `config` is not the config of a plain timm model.
    """
    content = json.loads(config.read_text())
    if not isinstance(content, dict) or not isinstance(content.get("pretrained_cfg"), dict):
        raise ValueError(f"{config.name} is not the config of a timm model: it has no pretrained_cfg.")
    if not timm.is_model(str(content.get("architecture"))) or content["architecture"].startswith("nrpm_"):
        raise ValueError(f"{config.name} names architecture {content.get('architecture')!r}, which timm does not know.")
    content["pretrained_cfg"] = {k: v for k, v in content["pretrained_cfg"].items() if k in ABOUT_IMAGES}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / TIMM_FILES[0]).write_text(json.dumps(content))
        try:
            (Path(folder) / TIMM_FILES[1]).symlink_to(weights.resolve())
        except OSError:  # on systems where only an administrator may create links
            shutil.copy(weights, Path(folder) / TIMM_FILES[1])
        model = timm.create_model(f"local-dir:{folder}", pretrained=True, dtype=dtype, **kwargs)
    cfg: Any = model.pretrained_cfg
    for key in ("file", "source"):
        cfg.pop(key, None)
    return model


def check_image_size(model: nn.Module) -> None:
    """Raise a ValueError if a stranger's model takes images so large that one could fill the memory."""
    size = get_model_input_config(model)["input_size"]
    if math.prod(size) > LARGEST_IMAGE:
        raise ValueError(f"its images of shape {list(size)} hold more than {LARGEST_IMAGE} numbers, the limit.")
