"""The origin of a plain model: enough to build it again, and to verify that it is the same."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from timm.models import get_pretrained_cfg
from torch import Tensor, nn

from timm_nrpm.errors import HubError, NotOnHub, WeightsUnavailable, WrongBase
from timm_nrpm.models.creation import (
    ABOUT_IMAGES,
    LARGEST_CONFIG,
    TIMM_FILES,
    brings_weights,
    create_plain,
    from_timm_files,
    unavailable,
)
from timm_nrpm.models.downloads import REPO_ID, Repository

PLACEMENT = ("device", "dtype", "cache_dir")
"""Arguments of timm's `create_model` that say where and in which dtype to put the model, not which model it is."""


WORD = re.compile(r"[\w.-]{1,200}")
REVISION = re.compile(r"(?!/)(?!.*\.\.)[\w./-]{1,200}")  # it becomes a path in the cache, so it must not leave that
ARCHITECTURE = re.compile(rf"(?!nrpm_){WORD.pattern}")
NAME = re.compile(rf"{ARCHITECTURE.pattern}|hf[-_]hub:{REPO_ID.pattern}(@{REVISION.pattern})?")


def _public(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of timm's `create_model` that mean the same on every machine: no local files, no placement."""
    portable = {k: v for k, v in kwargs.items() if k not in (*PLACEMENT, "checkpoint_path", "pretrained_cfg")}
    overlay = portable.pop("pretrained_cfg_overlay", None) or {}
    overlay = {k: v for k, v in dict(overlay).items() if k in (*ABOUT_IMAGES, "hf_hub_id")}
    return {**portable, "pretrained_cfg_overlay": overlay} if overlay else portable


def weights_sha256(state: Mapping[str, Tensor]) -> str:
    """SHA-256 of the names, dtypes, shapes and values of a state dict, independent of its file and its device."""
    digest = hashlib.sha256()
    for name in sorted(state):
        value = state[name].detach().cpu().contiguous()
        digest.update(json.dumps([name, str(value.dtype), list(value.shape)]).encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def dtype_of(model: nn.Module) -> str:
    """Name of the dtype of a model's first parameter, such as `float32`."""
    return str(next(model.parameters()).dtype).removeprefix("torch.")


def checksum_of(content: Mapping[str, Any]) -> str:
    """SHA-256 of the content of a JSON file, independent of its layout."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Base:
    """The origin of a plain timm model.

    Attributes:
        architecture: timm's name of the architecture, such as `resnet18`.
        name: Name to give to `timm.create_model`, with a tag or a Hub prefix; None if no name leads to the weights
            (random, from a checkpoint file, or with a new classifier), so that only their owner has them.
        sha256: :func:`weights_sha256` of the plain model.
        tag: timm's pretrained tag, such as `a1_in1k`, if any.
        hub_id: Id of the Hub repository of the weights, if any.
        revision: Commit of that repository that the weights came from, if known.
        kwargs: Further arguments of `timm.create_model`.
        dtype: Name of the dtype of the first parameter, such as `float32`.
        tuned: Whether the weights were trained after they were loaded by `name`, which then says where training began.
        guessed: Whether `name` was inferred and not given; :meth:`proven` verifies it. A variant does not hold this.
    """

    architecture: str
    name: str | None
    sha256: str
    tag: str | None = None
    hub_id: str | None = None
    revision: str | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)
    dtype: str = "float32"
    tuned: bool = False
    guessed: bool = field(default=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        dtype = getattr(torch, self.dtype, None) if isinstance(self.dtype, str) else None
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise ValueError(f"dtype={self.dtype!r} is no dtype of torch.")
        if brings_weights(self.kwargs):
            # With such arguments, loading a variant would read a file or an address that its author chose.
            raise ValueError(f"{self.name} with {sorted(self.kwargs)} does not name its weights by a timm or Hub name.")

    @classmethod
    def of(cls, model: nn.Module, name: str | None, kwargs: Mapping[str, Any], sha256: str | None = None) -> Base:
        """The base of a model that `timm.create_model(name, pretrained=True, **kwargs)` made.

        Args:
            model: The model, which has to be plain if `sha256` is None.
            name: Name that leads to the weights; None if none does.
            kwargs: Further arguments of `timm.create_model`.
            sha256: :func:`weights_sha256` of the plain model; by default it is computed.
        """
        cfg: dict[str, Any] = getattr(model, "pretrained_cfg", None) or {}
        architecture = str(cfg.get("architecture") or type(model).__name__)
        tag = cfg.get("tag") or None
        hub_id, _, revision = str(cfg.get("hf_hub_id") or "").partition("@")
        if name is not None and ":" not in name and tag:
            name = f"{architecture}.{tag}"  # a later timm may have another default tag
        if getattr(model, "num_classes", None) not in (cfg.get("num_classes"), 0, None):
            name = None  # the classifier is new
        if name is None:
            hub_id = revision = ""  # the weights are not the repository's
        return cls(
            architecture=architecture,
            name=name,
            sha256=sha256 or weights_sha256(model.state_dict()),
            tag=tag,
            hub_id=hub_id or None,
            revision=revision or _cached_revision(hub_id, cfg.get("hf_hub_filename"), kwargs.get("cache_dir")),
            kwargs=_public(kwargs),
            dtype=dtype_of(model),
        )

    @classmethod
    def guess(cls, model: nn.Module) -> Base:
        """The base of a plain model of unknown origin, taken for pretrained if such weights are on this machine."""
        cfg: dict[str, Any] = getattr(model, "pretrained_cfg", None) or {}
        local = cfg.get("file") or _cached_revision(str(cfg.get("hf_hub_id") or ""), cfg.get("hf_hub_filename"), None)
        base = cls.of(model, cfg.get("architecture") if local else None, getattr(model, "_model_args", {}))
        return replace(base, guessed=True)

    def proven(self) -> Base:
        """This base, without its name if that was guessed and does not lead to these weights on this machine."""
        if not self.guessed or self.name is None:
            return self
        try:
            with torch.random.fork_rng(devices=[]):  # timm draws random weights before it loads others
                replace(self, tuned=False).build(local_files_only=True)
        except Exception:  # a guessed name may fail in any way
            return self.nameless()
        return replace(self, guessed=False)

    def nameless(self) -> Base:
        """This base without a name, for weights to which no name leads."""
        return replace(self, name=None, hub_id=None, revision=None, guessed=False)

    def license_in(self, cfg: Mapping[str, Any]) -> str | None:
        """The licence of the weights, as far as it is known.

        Args:
            cfg: timm's pretrained config of the model, whose licence is that of the weights that `name` leads to.

        Returns:
            Identifier of the licence, or None if no licence is stated for these weights.
        """
        overlay = self.kwargs.get("pretrained_cfg_overlay") or {}
        others = self.name is None or overlay.get("hf_hub_id")
        stated = overlay.get("license") if others or overlay.get("license") else cfg.get("license")
        return stated if isinstance(stated, str) else None

    @classmethod
    def from_dict(cls, data: Any) -> Base:
        """The base that :meth:`to_dict` wrote, checked in full, since a stranger may have written `data`.

        Raises:
            ValueError: `data` is nothing that :meth:`to_dict` writes.
        """
        names = [f.name for f in fields(cls) if f.name != "guessed"]
        if not isinstance(data, dict) or set(data) != set(names):
            raise ValueError(f"base must hold {', '.join(names)}, and nothing else.")
        if not isinstance(data["dtype"], str):
            raise ValueError(f"base's dtype={data['dtype']!r} is no string.")
        if not isinstance(data["sha256"], str) or not re.fullmatch(r"[0-9a-f]{64}", data["sha256"]):
            raise ValueError(f"base's sha256={data['sha256']!r} is no SHA-256 of 64 hexadecimal digits.")
        if not isinstance(data["architecture"], str) or not ARCHITECTURE.fullmatch(data["architecture"]):
            raise ValueError(f"base's architecture={data['architecture']!r} is no name of an architecture.")
        for key, pattern in (("name", NAME), ("tag", WORD), ("hub_id", REPO_ID), ("revision", REVISION)):
            value = data[key]
            if value is not None and not (isinstance(value, str) and pattern.fullmatch(value)):
                raise ValueError(f"base's {key}={value!r} is not a valid {key}.")
        if not isinstance(data["kwargs"], dict) or not isinstance(data["tuned"], bool):
            raise ValueError(f"base's kwargs={data['kwargs']!r} must be a dict, and tuned={data['tuned']!r} a bool.")
        overlay = data["kwargs"].get("pretrained_cfg_overlay") or {}
        if not isinstance(overlay, dict) or set(overlay) - {*ABOUT_IMAGES, "hf_hub_id"}:
            raise ValueError(
                f"base's pretrained_cfg_overlay={overlay!r} may say what images are like, and nothing else."
            )
        repository = overlay.get("hf_hub_id")
        if data["name"] is not None and repository and str(repository).partition("@")[0] != data["hub_id"]:
            raise ValueError(f"base names two repositories, {data['hub_id']!r} and {overlay['hf_hub_id']!r}.")
        if set(data["kwargs"]) & set(PLACEMENT):
            raise ValueError(f"base's kwargs={data['kwargs']!r} must not hold {', '.join(PLACEMENT)}.")
        return cls(**data)

    def build(
        self,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
    ) -> nn.Module:
        """Build the plain model again, with the weights of the same revision, read from safetensors if on the Hub.

        Args:
            cache_dir, token, local_files_only: The same as in :class:`timm_nrpm.models.downloads.Repository`.

        Raises:
            WrongBase: No name leads to the weights, or the name leads to other weights by now.
            WeightsUnavailable: The weights can be neither downloaded nor found in the cache.
        """
        if not self.is_public:
            raise WrongBase(
                f"This variant was made for a {self.architecture} whose weights have no public name (random, from a "
                "checkpoint, tuned, or with a new classifier). Build that model and give it as base=."
            )
        source, _, hub_id = str(self.name).rpartition(":")
        repo_id = hub_id.partition("@")[0] if source else self.hub_id
        if repo_id is None:
            model = create_plain(
                str(self.name), pretrained=True, **self.kwargs, dtype=self.torch_dtype, cache_dir=cache_dir
            )
        else:
            revision = self.revision or (hub_id.partition("@")[2] if source else None) or None
            repository = Repository(repo_id, revision, cache_dir, token, local_files_only)
            try:
                model = self._from_hub(repository, in_registry=not source)
            except HubError as error:
                raise WeightsUnavailable(unavailable(str(self.name), str(error).rstrip("."))) from None
        self.check(model)
        return model

    def _from_hub(self, repository: Repository, in_registry: bool) -> nn.Module:
        """Build the model from a repository that timm's registry names, or that holds timm's config and weights."""
        if not in_registry:
            config = repository.fetch(TIMM_FILES[0], LARGEST_CONFIG)
            weights = repository.at(config, TIMM_FILES[0]).fetch(_weights_of(config))
            return from_timm_files(config, weights, self.kwargs, self.torch_dtype)
        known = get_pretrained_cfg(str(self.name))
        options = {**self.kwargs, "dtype": self.torch_dtype}
        overlay = dict(self.kwargs.get("pretrained_cfg_overlay") or {})
        name = (known and known.hf_hub_filename) or TIMM_FILES[1]
        try:
            overlay["file"] = str(repository.fetch(name if name.endswith(".safetensors") else TIMM_FILES[1]))
        except NotOnHub:
            if known is None or known.hf_hub_id != repository.repo_id:
                raise  # a stranger's repository is read from safetensors alone
            overlay["hf_hub_id"] = repository.repo_id  # without the stranger's revision, which may be a pull request
            options["cache_dir"] = repository.cache_dir
        model = create_plain(str(self.name), pretrained=True, **{**options, "pretrained_cfg_overlay": overlay})
        cfg: Any = model.pretrained_cfg
        cfg.pop("file", None)  # a path on this machine
        return model

    @property
    def is_public(self) -> bool:
        """Whether the name leads to these weights."""
        return self.name is not None and not self.tuned

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """The dtype to create the model with; None for float32, timm's default."""
        return None if self.dtype == "float32" else getattr(torch, self.dtype)

    def check(self, model: nn.Module) -> None:
        """Raise WrongBase unless `model` has these weights."""
        sha256 = weights_sha256(model.state_dict())
        if sha256 != self.sha256:
            raise WrongBase(
                f"The variant was made for a {self.architecture} with weights sha256 {self.sha256[:12]}..., and this "
                f"{type(model).__name__} has {sha256[:12]}...: give the base it was made for"
                + (f", {self.name}." if self.name else ".")
            )

    def to_dict(self) -> dict[str, Any]:
        """The base as a variant's config holds it."""
        return {key: value for key, value in asdict(self).items() if key != "guessed"}


def _weights_of(config: Path) -> str:
    """Name of the safetensors file that a timm config names; by default timm's own."""
    try:
        name = json.loads(config.read_text())["pretrained_cfg"]["hf_hub_filename"]
    except (ValueError, LookupError, TypeError):
        return TIMM_FILES[1]
    return name if isinstance(name, str) and re.fullmatch(r"[\w.-]+\.safetensors", name) else TIMM_FILES[1]


def _cached_revision(hub_id: str, filename: str | None, cache_dir: str | Path | None) -> str | None:
    """The commit in the Hub's cache that the weights were just loaded from; None if they are not there."""
    hub_id = hub_id.partition("@")[0]
    if not hub_id:
        return None
    for candidate in filter(None, (filename, "model.safetensors", "pytorch_model.bin")):
        path = try_to_load_from_cache(hub_id, candidate, cache_dir=cache_dir)
        if isinstance(path, str):
            return Path(path).parts[-1 - len(Path(candidate).parts)]
    return None
