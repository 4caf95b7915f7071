"""Variants on disk: safetensors and JSON, nothing that executes.

A *lambda-only* folder holds a few kilobytes and names its base model; a *full* folder also holds the weights, in timm's
own format, so that plain timm can load them as the un-reprogrammed model.

    nrpm_config.json      format, base, settings, layers, sha256 of the other files and of itself
    nrpm.safetensors      lambdas, calibrated statistics
    config.json           full: timm's
    model.safetensors     full: timm's
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from dataclasses import fields
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse_tensors
from safetensors.torch import save as serialize_tensors
from timm.models import save_for_hf
from torch import Tensor, nn

from timm_nrpm.base import Base, checksum_of, weights_sha256
from timm_nrpm.config import NRPMConfig
from timm_nrpm.reprogramming import Statistic, plain_copy, record_of, reprogram_, reprogrammed_layers, restore_

FORMAT = 1
CONFIG, TENSORS = "nrpm_config.json", "nrpm.safetensors"
TIMM_FILES = ("config.json", "model.safetensors")
DRAFT = ".draft-"


class BrokenVariant(ValueError):
    """A folder that does not hold what `save_pretrained` writes."""


def has_changed(model: nn.Module) -> bool:
    """Whether the weights or BatchNorm statistics are others than when the model was reprogrammed."""
    base = record_of(model).base
    return base is not None and weights_sha256(plain_copy(model).state_dict()) != base.sha256


def save_pretrained(model: nn.Module, folder: str | Path, *, full: bool = False) -> Path:
    """Write a reprogrammed model to a folder.

    Args:
        model: A reprogrammed timm model.
        folder: Is made, or holds a variant that is replaced. Other files in it stay.
        full: Whether to write the weights too. Without them, whoever loads the variant needs its base.

    Returns:
        The folder. It changes only once everything is written.

    Raises:
        ValueError: The model is not reprogrammed; its weights changed since they were loaded, so that lambdas alone
            would lose them; or `folder` holds something else.

    Example:
        >>> save_pretrained(model, "my-variant")
        PosixPath('my-variant')
    """
    record, layers = record_of(model), reprogrammed_layers(model)
    if full and not (hasattr(model, "pretrained_cfg") and hasattr(model, "num_classes")):
        raise ValueError(f"{type(model).__name__} is no timm classifier, and a full folder is timm's: use full=False.")
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file, and a variant is a folder: choose another name.")
    others = [f.name for f in folder.iterdir() if not f.name.startswith(DRAFT)] if folder.exists() else []
    if others and CONFIG not in others:
        raise ValueError(f"{folder} exists and holds no variant: choose a new or an empty folder.")
    plain = plain_copy(model)
    base = record.base or Base.of(plain, None, getattr(plain, "_model_args", {}))
    if has_changed(model):
        if not full:
            raise ValueError(
                "The weights of this model changed since it was reprogrammed (BatchNorm statistics count, which a "
                "forward in training mode moves), and a lambda-only folder would lose them: save with full=True."
            )
        base = Base.of(plain, None, base.kwargs)
    config = record.config
    settings = {f.name: getattr(config, f.name) for f in fields(config) if f.name not in ("lam", "layers")}
    tensors = serialize_tensors(_tensors(model))
    content: dict[str, Any] = {"format": FORMAT, "base": base.to_dict(), "settings": settings, "layers": list(layers)}
    fresh = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob(f"{DRAFT}*"):  # of a process that was killed
        shutil.rmtree(stale, ignore_errors=True)
    try:
        with tempfile.TemporaryDirectory(prefix=DRAFT, dir=folder) as temporary:
            draft = Path(temporary)
            if full:
                names = {f.name for f in fields(NRPMConfig)}
                recorded = getattr(model, "_model_args", {})
                vars(plain)["_model_args"] = {k: v for k, v in recorded.items() if k not in names}
                save_for_hf(plain, str(draft), safe_serialization=True)
            (draft / TENSORS).write_bytes(tensors)
            content["files"] = {f.name: sha256_of(f) for f in sorted(draft.iterdir())}
            try:
                text = json.dumps({**content, "sha256": checksum_of(content)}, indent=2)
            except TypeError as error:
                raise ValueError(
                    f"The base was created with an argument that JSON cannot hold ({error}): {base.kwargs}. "
                    "Create it with names and numbers alone, and save again."
                ) from error
            (draft / CONFIG).write_text(text + "\n")
            # The config last: whatever interrupts this, a folder whose config does not fit its files is refused.
            for ready in sorted(draft.iterdir(), key=lambda f: f.name == CONFIG):
                os.replace(ready, folder / ready.name)
    except BaseException:
        if fresh and not any(folder.iterdir()):
            folder.rmdir()
        raise
    for name in set(TIMM_FILES) - content["files"].keys():
        (folder / name).unlink(missing_ok=True)
    return folder


def from_pretrained(
    folder: str | Path, *, base: nn.Module | None = None, cache_dir: str | Path | None = None
) -> nn.Module:
    """Load what `save_pretrained` wrote: the same layers, lambdas and statistics on the same weights.

    Args:
        folder: A lambda-only or full folder.
        base: The plain model, for a lambda-only variant of weights that no name leads to. It is reprogrammed in place,
            once its weights are found to be the right ones.
        cache_dir: Where timm keeps downloaded weights.

    Returns:
        The model, in evaluation mode.

    Raises:
        BrokenVariant: A file is missing, cut short, changed or of a later format.
        timm_nrpm.WrongBase: The base has other weights, or has to be given.
        timm_nrpm.WeightsUnavailable: The base can be neither downloaded nor found in the cache.

    Example:
        >>> model = from_pretrained("my-variant")
    """
    folder = Path(folder)
    content, tensors = _read(folder)
    try:
        origin = Base(**content["base"])
        values = {name: float(tensors.pop(f"{name}.lam")) for name in content["layers"]}
        config = NRPMConfig(**content["settings"], lam=values, layers=tuple(values))
    except (KeyError, TypeError, ValueError) as error:
        raise BrokenVariant(f"{folder / CONFIG} is not a variant this version can read: {error!r}.") from error
    if base is not None:
        if reprogrammed_layers(base):
            raise ValueError("base= is reprogrammed already: give the plain model, timm_nrpm.restore_(base).")
        origin.check(base)
    elif TIMM_FILES[1] in content["files"]:
        base = timm.create_model(f"local-dir:{folder}", pretrained=True, dtype=origin.torch_dtype)
        origin.check(base)
    else:
        base = origin.build(cache_dir)
    try:
        reprogram_(base, config)
        record_of(base).base = origin
        _install(base, tensors, folder)
    except BaseException as error:
        restore_(base)
        if isinstance(error, ValueError) and not isinstance(error, BrokenVariant):
            raise BrokenVariant(f"{folder} does not fit its base model: {error}") from error
        raise
    return base.eval()


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """What a variant adds to its base: lambdas, corrections, moved statistics."""
    tensors: dict[str, Tensor] = {}
    for name, layer in reprogrammed_layers(model).items():
        tensors[f"{name}.lam"] = layer.lam.detach().clamp(0, 1)
        if layer.correction is not None:
            tensors[f"{name}.correction.gain"] = layer.correction.gain
            tensors[f"{name}.correction.offset"] = layer.correction.offset
    for name, kept in record_of(model).statistics.items():
        tensors |= {f"{name}.{key}": getattr(model.get_submodule(name), key) for key in kept}
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _install(model: nn.Module, tensors: dict[str, Tensor], folder: Path) -> None:
    """Put corrections and statistics into a freshly reprogrammed model."""
    record, layers = record_of(model), reprogrammed_layers(model)
    for name, tensor in tensors.items():
        owner, _, key = name.rpartition(".")
        if owner.endswith(".correction") and owner.removesuffix(".correction") in layers:
            layer = layers[owner.removesuffix(".correction")]
            if layer.correction is None:
                layer.add_correction()
        target = model.get_submodule(owner)._buffers.get(key) if owner in dict(model.named_modules()) else None
        if target is None or target.shape != tensor.shape:
            raise BrokenVariant(
                f"{folder / TENSORS} holds {name} {list(tensor.shape)}, which its base has no place for."
            )
        if not owner.endswith(".correction"):
            record.statistics.setdefault(owner, {})[key] = Statistic(target.clone(), tensor.to(target))
        with torch.no_grad():
            target.copy_(tensor)


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The checked contents of a folder."""
    path = folder / CONFIG
    if not path.exists():
        raise BrokenVariant(f"{folder} holds no {CONFIG}: give a folder that save_pretrained wrote.")
    try:
        content = json.loads(path.read_text())
        checksum, version, files = content.pop("sha256"), content["format"], dict(content["files"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BrokenVariant(f"{path} is cut short or is no variant's config ({error!r}): get it again.") from error
    if version != FORMAT:
        raise BrokenVariant(f"{path} has format {version!r}, and this version reads {FORMAT}: update timm_nrpm.")
    if checksum != checksum_of(content):
        raise BrokenVariant(f"{path} was changed after it was saved: get it again, or save the variant anew.")
    if TENSORS not in files:
        raise BrokenVariant(f"{path} does not vouch for {TENSORS}: get it again, or save the variant anew.")
    for name, expected in files.items():
        file = folder / Path(name).name  # never outside the folder
        if not file.exists():
            raise BrokenVariant(f"{file} is missing: get it again.")
        if sha256_of(file) != expected:
            raise BrokenVariant(f"{file} is cut short or was changed after it was saved: get it again.")
    try:
        return content, parse_tensors((folder / TENSORS).read_bytes())
    except (SafetensorError, OSError) as error:
        raise BrokenVariant(f"{folder / TENSORS} cannot be read ({error}): get it again.") from error


def sha256_of(file: Path) -> str:
    """Hash of a file's bytes."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
