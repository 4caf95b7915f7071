"""Where a plain model came from: enough to build the same one again, and to tell whether it is the same."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, OfflineModeIsEnabled
from torch import Tensor, nn

PLACEMENT = ("device", "dtype", "cache_dir")
"""Arguments of timm's create_model that say where, not what."""


HTTP_LIBRARY = re.compile(r"(httpx2?|httpcore2?|requests|urllib3)\b")


def brings_weights(kwargs: Mapping[str, Any]) -> bool:
    """Whether arguments of timm's create_model say where weights are, so that the model's name does not."""
    overlay = dict(kwargs.get("pretrained_cfg_overlay") or {})
    return any(kwargs.get(key) for key in ("checkpoint_path", "pretrained_cfg")) or any(
        overlay.get(key) for key in ("file", "url", "state_dict")
    )


class WeightsUnavailable(RuntimeError):
    """Pretrained weights can be neither downloaded nor found on this machine."""


class WrongBase(ValueError):
    """A model is not the one that a variant was made for."""


def weights_sha256(state: Mapping[str, Tensor]) -> str:
    """Hash of names, types, shapes and values, whatever file they came from and whatever device they are on."""
    digest = hashlib.sha256()
    for name in sorted(state):
        value = state[name].detach().cpu().contiguous()
        digest.update(json.dumps([name, str(value.dtype), list(value.shape)]).encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def checksum_of(content: Mapping[str, Any]) -> str:
    """Hash of what a JSON file says, however it is laid out."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Base:
    """A plain timm model.

    Attributes:
        architecture: timm's name, like `resnet18`.
        name: What to give to `timm.create_model`, with a tag or a Hub prefix; None if the weights did not come through
            a name (random, from a checkpoint file, or with a new classifier), so that only their owner has them.
        tag: timm's pretrained tag, like `a1_in1k`, if any.
        hub_id: The Hub repository of the weights, if any, and its revision, the commit they came from, if known.
        kwargs: The further arguments of `timm.create_model`.
        sha256: :func:`weights_sha256` of the plain model.
        dtype: Of its parameters, as torch names it.
    """

    architecture: str
    name: str | None
    sha256: str
    tag: str | None = None
    hub_id: str | None = None
    revision: str | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if not isinstance(getattr(torch, self.dtype, None), torch.dtype):
            raise ValueError(f"dtype={self.dtype!r} is no dtype of torch.")
        if self.name is not None and brings_weights(self.kwargs):
            # Such arguments would make whoever loads a variant read a file or an address that its maker chose.
            raise ValueError(f"{self.name} with {sorted(self.kwargs)} does not name its weights by a timm or Hub name.")

    @classmethod
    def of(cls, model: nn.Module, name: str | None, kwargs: Mapping[str, Any], sha256: str | None = None) -> Base:
        """The base of a model that `timm.create_model(name, pretrained=True, **kwargs)` made.

        `name` is None if the weights are not those that the name stands for; `sha256` is computed if not given, which
        needs the model plain.
        """
        cfg: dict[str, Any] = getattr(model, "pretrained_cfg", None) or {}
        architecture = str(cfg.get("architecture") or type(model).__name__)
        tag = cfg.get("tag") or None
        hub_id, _, revision = str(cfg.get("hf_hub_id") or "").partition("@")
        if name is not None and ":" not in name and tag:
            name = f"{architecture}.{tag}"  # the default tag may be another in the next timm
        if getattr(model, "num_classes", None) not in (cfg.get("num_classes"), 0, None):
            name = None  # a new classifier
        if name is None:
            hub_id = revision = ""  # the weights are not the repository's
        return cls(
            architecture=architecture,
            name=name,
            sha256=sha256 or weights_sha256(model.state_dict()),
            tag=tag,
            hub_id=hub_id or None,
            revision=revision or _cached_revision(hub_id, cfg.get("hf_hub_filename"), kwargs.get("cache_dir")),
            kwargs={k: v for k, v in kwargs.items() if k not in PLACEMENT},
            dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
        )

    @classmethod
    def guess(cls, model: nn.Module) -> Base:
        """The base of a plain model that somebody else made: pretrained, if its weights are on this machine."""
        cfg: dict[str, Any] = getattr(model, "pretrained_cfg", None) or {}
        found = cfg.get("file") or _cached_revision(str(cfg.get("hf_hub_id") or ""), cfg.get("hf_hub_filename"), None)
        return cls.of(model, cfg.get("architecture") if found else None, getattr(model, "_model_args", {}))

    def build(self, cache_dir: str | Path | None = None) -> nn.Module:
        """The plain model again, its weights at the same revision.

        Raises:
            WrongBase: No name leads to the weights, or they are others by now.
            WeightsUnavailable: The weights cannot be had.
        """
        if self.name is None:
            raise WrongBase(
                f"This variant was made for a {self.architecture} whose weights have no public name (random, from a "
                "checkpoint, or with a new classifier). Build that model and give it as base=."
            )
        overlay = dict(self.kwargs.get("pretrained_cfg_overlay") or {})
        if self.hub_id and self.revision and ":" not in self.name:
            overlay["hf_hub_id"] = f"{self.hub_id}@{self.revision}"
        kwargs = {**self.kwargs, "pretrained_cfg_overlay": overlay or None, "cache_dir": cache_dir}
        kwargs["dtype"] = self.torch_dtype
        model = create_plain(self.name, pretrained=True, **kwargs)
        self.check(model)
        return model

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """The dtype to create the model with; None for float32, which is what models have anyway."""
        return None if self.dtype == "float32" else getattr(torch, self.dtype)

    def check(self, model: nn.Module) -> None:
        """Raise WrongBase unless `model` has these weights."""
        found = weights_sha256(model.state_dict())
        if found != self.sha256:
            raise WrongBase(
                f"The variant was made for a {self.architecture} with weights sha256 {self.sha256[:12]}..., and this "
                f"{type(model).__name__} has {found[:12]}...: give the base it was made for"
                + (f", {self.name}." if self.name else ".")
            )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def create_plain(name: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    """`timm.create_model`, with one clear error where the weights cannot be had.

    Raises:
        WeightsUnavailable: As it says.
    """
    checkpoint = kwargs.get("checkpoint_path")
    if checkpoint and not Path(checkpoint).is_file():
        raise FileNotFoundError(f"checkpoint_path={str(checkpoint)!r} is no file.")
    try:
        return timm.create_model(name, pretrained=pretrained, **kwargs)
    except Exception as error:
        unreachable = (EntryNotFoundError, HfHubHTTPError, OfflineModeIsEnabled, ConnectionError, TimeoutError)
        # The Hub's client raises its HTTP library's own errors when a connection fails, whichever library that is.
        if not isinstance(error, unreachable) and not HTTP_LIBRARY.match(type(error).__module__):
            raise
        cause = error
    reason = str(cause).strip().split("\n")[0]
    raise WeightsUnavailable(
        f"The pretrained weights of {name} can be neither downloaded nor found in the cache ({reason}). "
        "Connect to the network once, or point to a copy: checkpoint_path=FILE with pretrained=False, or "
        "pretrained_cfg_overlay=dict(file=FILE)."
    ) from cause


def _cached_revision(hub_id: str, filename: str | None, cache_dir: str | Path | None) -> str | None:
    """The commit of the snapshot in the Hub's cache that the weights were just loaded from."""
    hub_id = hub_id.partition("@")[0]
    if not hub_id:
        return None
    for candidate in filter(None, (filename, "model.safetensors", "pytorch_model.bin")):
        path = try_to_load_from_cache(hub_id, candidate, cache_dir=cache_dir)
        if isinstance(path, str):
            return Path(path).parts[-1 - len(Path(candidate).parts)]
    return None
