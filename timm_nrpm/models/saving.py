"""Saving a model as a variant on disk, either as a whole or not at all."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import timm
from timm.models._hub import save_config_for_hf
from torch import Tensor, nn

from timm_nrpm.config import NRPMConfig
from timm_nrpm.models.base import Base, checksum_of, dtype_of, weights_sha256
from timm_nrpm.models.creation import TIMM_FILES
from timm_nrpm.models.downloads import sha256_of
from timm_nrpm.models.format import CONFIG, FORMAT, TENSORS
from timm_nrpm.models.loadable import check_loads, is_rebuilt
from timm_nrpm.models.loading import find_variant
from timm_nrpm.models.plain_statistics import moved
from timm_nrpm.models.reprogramming import model_sha256, plain_copy, record_of, reprogrammed_layers
from timm_nrpm.models.tensors import write_tensors
from timm_nrpm.nn.wrappers import unwrapped

DRAFT = ".draft-"
"""Start of the names of folders that are not complete yet."""


def needs_weights(model: nn.Module) -> bool:
    """Whether a variant has to hold the weights, since these were trained, before or after they were loaded."""
    base = record_of(model).base
    return base is not None and (base.tuned or weights_sha256(plain_copy(model).state_dict()) != base.sha256)


def is_timm(model: nn.Module) -> bool:
    """Whether a model, without wrappers, is one that timm can build."""
    return hasattr(model, "pretrained_cfg") and hasattr(model, "num_classes")


def save_variant(model: nn.Module, folder: str | Path, *, full: bool = False) -> Path:
    """Write a reprogrammed model to a folder, as :func:`timm_nrpm.save_pretrained` does, which writes ensembles too.

    Example:
        >>> save_variant(model, "my-variant")
        PosixPath('my-variant')
    """
    model = unwrapped(model)
    record, layers = record_of(model), reprogrammed_layers(model)
    if full and not is_timm(model):
        raise ValueError(f"{type(model).__name__} is no timm classifier, and a full folder is timm's: use full=False.")
    folder = Path(folder)
    plain = plain_copy(model)
    sha256 = weights_sha256(plain.state_dict())
    if record.base is not None:
        record.base = record.base.proven()
    base = record.base or Base.of(plain, None, getattr(plain, "_model_args", {}), sha256)
    if sha256 != base.sha256:
        if not full:
            raise ValueError(
                "The weights of this model changed since it was reprogrammed, and a lambda-only folder would lose "
                "them: save with full=True."
            )
        base = replace(base, sha256=sha256, tuned=True)
    base = replace(base, dtype=dtype_of(plain))  # the model may have been cast since
    if not full and base.is_public and not is_rebuilt(base, plain):
        base = base.nameless()
    content: dict[str, Any] = {"format": FORMAT, "base": base.to_dict(), "layers": list(layers)}
    content |= {"settings": record.config.settings, "model": model_sha256(model)}
    if record.statistics:
        content["statistics"] = [step.to_dict() for step in record.statistics]
    with filling(folder) as draft:
        if is_timm(model):
            cfg: Any = plain.pretrained_cfg
            cfg["license"] = base.license_in(cfg)  # timm's licence is that of its own weights
            _save_timm_files(model, plain, draft, full)
        write_tensors(_tensors(model), draft / TENSORS)
        content["files"] = {f.name: sha256_of(f) for f in sorted(draft.iterdir())}
        try:
            text = json.dumps({**content, "sha256": checksum_of(content)}, indent=2)
        except TypeError as error:
            raise ValueError(
                f"The base was created with an argument that JSON cannot hold ({error}): {base.kwargs}. "
                "Create it with names and numbers alone, and save again."
            ) from error
        (draft / CONFIG).write_text(text + "\n")
        if full:
            check_loads(draft, plain)
    return folder


def save_loadable(model: nn.Module, folder: str | Path) -> bool:
    """Save a variant, with its weights where no public name leads to them, so that it can be loaded anywhere.

    Args:
        model, folder: The same as in :func:`save_variant`.

    Returns:
        Whether the weights are in it.
    """
    save_variant(model, folder, full=needs_weights(model))
    return complete(model, folder)


def complete(model: nn.Module, folder: str | Path) -> bool:
    """Add the weights to the variant of a model that was saved, if no public name leads to them.

    Returns:
        Whether the weights are in it.
    """
    variant = find_variant(folder, weights=False).variant
    if not variant.is_full and not variant.base.is_public:
        save_variant(model, folder, full=True)
        return True
    return variant.is_full


@contextmanager
def filling(
    folder: Path, *, kind: str = "variant", config: str = CONFIG, maybe: Collection[str] = TIMM_FILES
) -> Iterator[Path]:
    """Yield an empty draft folder, whose files, a whole variant, are moved to `folder` at the end.

    A new folder appears in one step. In a folder that holds a variant the config is replaced last: if that is
    interrupted, the config does not fit the other files, and loading refuses the folder.

    Args:
        folder: Path of the variant's folder. The draft is made beside it, or in it if it exists.
        kind: What the folder holds, in a word.
        config: Name of the file that every such folder has, and no other.
        maybe: Names of files of such a folder that the new one may lack.

    Raises:
        ValueError: `folder` is a file, or exists and holds something else than a variant.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file, and a {kind} is a folder: choose another name.")
    fresh = not folder.exists()
    others = [] if fresh else [f.name for f in folder.iterdir() if not f.name.startswith(DRAFT)]
    if others and config not in others:
        raise ValueError(f"{folder} exists and holds no {kind}: choose a new or an empty folder.")
    place, prefix = (folder.parent, f"{DRAFT}{folder.name}-") if fresh else (folder, DRAFT)
    place.mkdir(parents=True, exist_ok=True)
    for stale in place.iterdir():  # left by a process that was killed
        if re.fullmatch(rf"{re.escape(prefix)}\w{{8}}", stale.name):
            shutil.rmtree(stale, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=prefix, dir=place, ignore_cleanup_errors=True) as temporary:
        draft = Path(temporary) / "ready"
        draft.mkdir()
        yield draft
        if fresh and not folder.exists():
            os.replace(draft, folder)
            return
        ready = sorted(draft.iterdir(), key=lambda f: f.name == config)
        for file in ready:
            os.replace(file, folder / file.name)
    for name in set(maybe) - {f.name for f in ready}:
        (folder / name).unlink(missing_ok=True)


def _save_timm_files(model: nn.Module, plain: nn.Module, folder: Path, full: bool) -> None:
    """Write the files that timm reads: the plain model (full), or the config of the `nrpm_*` architecture."""
    names = {f.name for f in fields(NRPMConfig)}
    recorded = getattr(model, "_model_args", {})
    vars(plain)["_model_args"] = {k: v for k, v in recorded.items() if k not in names}
    architecture = (getattr(plain, "pretrained_cfg", None) or {}).get("architecture")
    if full:
        save_config_for_hf(plain, str(folder / TIMM_FILES[0]))
        write_tensors(plain.state_dict(), folder / TIMM_FILES[1])
    elif timm.is_model(f"nrpm_{architecture}"):
        cfg: Any = plain.pretrained_cfg
        content: dict[str, Any] = {"architecture": f"nrpm_{architecture}", "num_classes": plain.num_classes}
        content["pretrained_cfg"] = {
            key: cfg[key]
            for key in ("input_size", "interpolation", "crop_pct", "mean", "std", "license")
            if cfg.get(key)
        }
        (folder / TIMM_FILES[0]).write_text(json.dumps(content, indent=2) + "\n")


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors that a variant adds to its base, by name: lambdas, what calibration fitted, changed statistics."""
    tensors: dict[str, Tensor] = {}
    for name, layer in reprogrammed_layers(model).items():
        tensors[f"{name}.lam"] = layer.lam.detach().float().clamp(0, 1)
        for part, fitted in layer.parts().items():
            tensors |= {f"{name}.{part}.{key}": buffer for key, buffer in fitted.named_buffers()}
    tensors |= moved(model)
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
