"""The format of variants on disk: safetensors and JSON, nothing executable; docs/format.md specifies it.

A *lambda-only* folder holds a few kilobytes and names its base model; a *full* folder also holds the weights, in timm's
own format, so that plain timm can load them as the un-reprogrammed model.

    nrpm_config.json      format, base, settings, layers; sha256 of the model, the other files and itself
    nrpm.safetensors      lambdas, what calibration fitted
    config.json           timm's config, of the plain model (full) or of the `nrpm_*` architecture (lambda-only)
    model.safetensors     weights of the plain model in timm's format (full)
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse_tensors
from safetensors.torch import load_file
from torch import Tensor, nn

from timm_nrpm.config import NRPMConfig
from timm_nrpm.errors import BrokenVariant, HubError, WrongBase
from timm_nrpm.models.base import Base, checksum_of
from timm_nrpm.models.creation import LARGEST_CONFIG, TIMM_FILES, check_image_size, from_timm_files
from timm_nrpm.models.downloads import sha256_of
from timm_nrpm.models.provenance import Step
from timm_nrpm.models.reprogramming import (
    decimal_of,
    model_sha256,
    record_of,
    reprogram_,
    reprogrammed_layers,
    restore_,
)
from timm_nrpm.nn.layers import PARTS

FORMAT = 1
CONFIG, TENSORS = "nrpm_config.json", "nrpm.safetensors"
KEYS = ("format", "base", "settings", "layers", "model", "files", "sha256")
MAYBE = ("statistics",)  # of calibrated and adapted variants
SETTINGS = tuple(NRPMConfig().settings)
HASH = re.compile(r"[0-9a-f]{64}")
LARGEST = {CONFIG: LARGEST_CONFIG, TENSORS: 256 << 20, TIMM_FILES[0]: LARGEST_CONFIG, "evaluation.json": 64 << 20}
"""Largest size of each file in bytes; a larger one is neither downloaded nor read."""


@dataclass(frozen=True)
class Variant:
    """The checked contents of a variant's folder, before any model is built.

    Attributes:
        base: Origin of the plain model.
        config: Settings by which the base is reprogrammed, with the name and lambda of each layer in the order the
            model calls them.
        tensors: All else that the variant adds to its base, by name: what calibration fitted, and changed statistics.
        model: :func:`timm_nrpm.models.reprogramming.model_sha256` of the reprogrammed model.
        files: SHA-256 of every other file, by the name of the file.
        statistics: The steps that moved the statistics, as far as they are known.
    """

    base: Base
    config: NRPMConfig
    tensors: dict[str, Tensor]
    model: str
    files: dict[str, str]
    statistics: tuple[Step, ...] = ()

    @property
    def is_full(self) -> bool:
        """Whether the variant holds the weights."""
        return TIMM_FILES[1] in self.files

    @property
    def lams(self) -> dict[str, float]:
        """Lambda of every reprogrammed layer by name, in the order the model calls them."""
        assert isinstance(self.config.lam, dict)
        return self.config.lam

    @classmethod
    def read(cls, find: Callable[[str], Path], where: str, weights: bool = True) -> Variant:
        """Read and check a variant.

        Args:
            find: Function from the name of a file to its path.
            where: Folder or repository as error messages name it.
            weights: Whether the weights file of a full variant is checked as well.

        Raises:
            BrokenVariant: A file is missing, damaged, of a later format, or holds something that no variant holds.
        """
        content = parse_config(find(CONFIG), where)
        for name, expected in content["files"].items():
            if name == TIMM_FILES[1] and not weights:
                continue
            if sha256_of(find(name)) != expected:
                raise BrokenVariant(f"{name} of {where} is cut short or was changed after it was saved: get it again.")
        try:
            tensors = parse_tensors(find(TENSORS).read_bytes())
        except (SafetensorError, OSError, ValueError, KeyError, TypeError, OverflowError, RuntimeError) as error:
            raise BrokenVariant(f"{TENSORS} of {where} cannot be read ({error}): get it again.") from error
        try:
            lams = {layer: _lam(tensors.pop(f"{layer}.lam", None), layer) for layer in content["layers"]}
            check_tensors(tensors, lams, "standardize" in content["settings"])
            base = Base.from_dict(content["base"])
            settings = content["settings"]
            config = NRPMConfig(**settings, lam=lams, layers=tuple(lams))
            if checksum_of(settings) != checksum_of(config.settings):
                raise ValueError(f"its settings {settings} hold an integer where a float is required, or the reverse.")
            steps = _steps(content.get("statistics", []))
        except (TypeError, ValueError, OverflowError, RecursionError) as error:
            raise BrokenVariant(f"{where} holds no variant that this version can read: {error}") from error
        return cls(base, config, tensors, content["model"], content["files"], steps)

    def build(self, find: Callable[[str], Path], plain: Callable[[], nn.Module], where: str) -> nn.Module:
        """Build the saved model: the same layers, lambdas and statistics on the same weights.

        Args:
            find, where: The same as in :meth:`read`.
            plain: Function that makes the plain model; it is called if the variant does not hold the weights.

        Raises:
            BrokenVariant: The variant does not fit its base, or gives another model than was saved.
            timm_nrpm.errors.WrongBase: The base has other weights.
        """
        try:
            if self.is_full:
                config, weights = (find(name) for name in TIMM_FILES)
                model = from_timm_files(config, weights, {}, self.base.torch_dtype)
                _take_types_(model, weights)
            else:
                model = plain()
            self.base.check(model)
            check_image_size(model)
        except (HubError, WrongBase):
            raise
        except Exception as error:  # timm may raise anything for arguments that a stranger made up
            reason = error if type(error) is ValueError else repr(error)
            raise BrokenVariant(f"{where} holds no model that timm can build: {reason}") from error
        return self.install(model, where)

    def install(self, base: nn.Module, where: str) -> nn.Module:
        """Reprogram the plain model, in place, and return it in evaluation mode; after an error it is plain again.

        Args:
            base: The plain model.
            where: The same as in :meth:`read`.

        Raises:
            BrokenVariant: The variant does not fit the model, or gives another model than was saved.
        """
        try:
            unknown = set(self.lams) - {name for name, _ in base.named_modules()}  # a glob counts as unknown, too
            if unknown:
                raise BrokenVariant(f"{where} does not fit its base: it has no layers {sorted(unknown)[:3]}.")
            reprogram_(base, self.config)
            record_of(base).base = self.base
            layers = set(reprogrammed_layers(base))
            if layers != set(self.lams):
                raise BrokenVariant(
                    f"{where} does not fit its base: layers {sorted(layers ^ set(self.lams))[:3]} differ."
                )
            _install(base, self.tensors, where)
            record_of(base).statistics = self.statistics
            if model_sha256(base) != self.model:
                raise BrokenVariant(f"{where} gives another model than the one that was saved: get it again.")
        except BaseException as error:
            restore_(base)
            if isinstance(error, Exception) and not isinstance(error, BrokenVariant):
                raise BrokenVariant(f"{where} does not fit its base model: {error}") from error
            raise
        return base.eval()


def parse_config(path: Path, where: str) -> dict[str, Any]:
    """The checked content of a variant's config, without its own hash.

    Args:
        path: Path of the config.
        where: The same as in :meth:`Variant.read`.

    Raises:
        BrokenVariant: The file was changed, is of a later format, or is not the config of a variant.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse)
        version, checksum = content["format"], content.pop("sha256")
        expected = checksum_of(content)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BrokenVariant(
            f"{CONFIG} of {where} is cut short or is no variant's config ({error!r}): get it again."
        ) from error
    if version != FORMAT or type(version) is not int:
        raise BrokenVariant(f"{where} has format {version!r}, and this version reads {FORMAT}: update timm_nrpm.")
    if checksum != expected:
        raise BrokenVariant(
            f"{CONFIG} of {where} was changed after it was saved: get it again, or save the variant anew."
        )
    if (set(content) | {"sha256"}) - set(MAYBE) != set(KEYS):
        raise BrokenVariant(f"{CONFIG} of {where} holds {sorted(content)}, and a variant's {sorted(KEYS)}.")
    layers, files, settings = content["layers"], content["files"], content["settings"]
    if not _is_list_of_names(layers):
        raise BrokenVariant(f"{CONFIG} of {where} lists no layers, or one twice: save the variant anew.")
    allowed = [{TENSORS}, {TENSORS, TIMM_FILES[0]}, {TENSORS, *TIMM_FILES}]
    hashes = files.values() if isinstance(files, dict) else [None]
    if not all(isinstance(value, str) and HASH.fullmatch(value) for value in [*hashes, content["model"]]):
        raise BrokenVariant(f"{CONFIG} of {where} holds something else than SHA-256 hashes: save the variant anew.")
    if set(files) not in allowed:
        raise BrokenVariant(
            f"{CONFIG} of {where} has hashes of {sorted(files)}, and a variant of {sorted(allowed[-1])}."
        )
    if not isinstance(settings, dict) or set(settings) - {"standardize"} != set(SETTINGS):
        raise BrokenVariant(f"{CONFIG} of {where} has other settings than {', '.join(SETTINGS)}: update timm_nrpm.")
    if not isinstance(settings["learnable"], bool):
        raise BrokenVariant(f"{CONFIG} of {where} has learnable={settings['learnable']!r}, which is true or false.")
    if settings.get("standardize", True) is not True:
        raise BrokenVariant(
            f"{CONFIG} of {where} has standardize={settings['standardize']!r}, which is true or left out."
        )
    return content


def _take_types_(model: nn.Module, weights: Path) -> None:
    """Give each tensor of a model the dtype that it has in the weights file, since some models have several."""
    tensors = load_file(weights)
    for name, value in model.state_dict(keep_vars=True).items():
        if name in tensors and tensors[name].dtype != value.dtype and tensors[name].shape == value.shape:
            value.data = tensors[name]


def _refuse(constant: str) -> None:
    """Raise a ValueError for NaN and Infinity, which are no JSON."""
    raise ValueError(f"{constant} is no number")


def _is_list_of_names(layers: Any) -> bool:
    if not isinstance(layers, list) or not layers or not all(isinstance(name, str) for name in layers):
        return False
    return len(set(layers)) == len(layers)


def _lam(tensor: Tensor | None, layer: str) -> float:
    """Return the lambda of a layer, or raise a ValueError."""
    if tensor is None or tensor.ndim or not tensor.is_floating_point():
        raise ValueError(f"{layer} has no lambda.")
    if not 0 <= float(tensor) <= 1:
        raise ValueError(f"{layer} has lambda {float(tensor)}, which is not in [0, 1].")
    return decimal_of(tensor)


def _steps(data: Any) -> tuple[Step, ...]:
    """The steps of a config's `statistics`, or a ValueError."""
    if not isinstance(data, list):
        raise ValueError(f"its statistics={data!r} is no list of steps.")
    return tuple(Step.from_dict(step) for step in data)


PARTNERS = {"correction.gain": "correction.offset", "units.centre": "units.distance", "running_mean": "running_var"}
PARTNERS |= {second: first for first, second in PARTNERS.items()}
"""Ends of the names of two tensors that a variant holds together or not at all."""


def check_tensors(tensors: dict[str, Tensor], layers: dict[str, float], standardize: bool) -> None:
    """Raise a ValueError for tensors that no calibration writes: other names, halves of pairs, non-finite values, units
    where none were asked for."""
    for name, tensor in tensors.items():
        key = next((key for key in PARTNERS if name.endswith(f".{key}")), None)
        if key is None or name.removesuffix(key) + PARTNERS[key] not in tensors:
            raise ValueError(f"{name} has no place in a variant.")
        owner, part = name.removesuffix(f".{key}"), key.rpartition(".")[0]
        if part and owner not in layers:
            raise ValueError(f"{name} is a part of a layer that is not reprogrammed.")
        if part == "units" and not standardize:
            raise ValueError(f"{name} has no place in a variant without standardize.")
        if not tensor.is_floating_point() or tensor.ndim != 1 or not bool(tensor.isfinite().all()):
            raise ValueError(f"{name} does not hold one finite number per channel.")
        if name.endswith(".running_var") and bool((tensor < 0).any()):
            raise ValueError(f"{name} holds variances below 0.")
        if name.endswith(".units.distance") and bool((tensor < torch.finfo(tensor.dtype).tiny).any()):
            raise ValueError(f"{name} holds distances that are too small to divide by.")


def _install(model: nn.Module, tensors: dict[str, Tensor], where: str) -> None:
    """Put what calibration fitted into a freshly reprogrammed model."""
    layers = reprogrammed_layers(model)
    modules = dict(model.named_modules())
    for name, tensor in tensors.items():
        owner, _, key = name.rpartition(".")
        above, _, part = owner.rpartition(".")
        if part in PARTS and above in layers:
            fitted = layers[above].parts().get(part) or layers[above].add_part(PARTS[part])
            target = fitted._buffers.get(key)
        else:
            target = modules[owner]._buffers.get(key) if owner in modules else None
        if target is None or target.shape != tensor.shape or target.dtype != tensor.dtype:
            raise BrokenVariant(
                f"{TENSORS} of {where} holds {name} {list(tensor.shape)}, which its base has no place for."
            )
        with torch.no_grad():
            target.copy_(tensor)
