"""A variant as a model again: from a folder, from the Hub, or through timm's own `create_model`."""

from __future__ import annotations

import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from timm_nrpm.errors import BrokenVariant, MissingFile, NotOnHub
from timm_nrpm.models.creation import check_image_size
from timm_nrpm.models.downloads import REPO_ID, Repository
from timm_nrpm.models.format import CONFIG, LARGEST, Variant
from timm_nrpm.models.reprogramming import reprogram_, reprogrammed_layers

PREFIX = "hf-hub:"


@dataclass(frozen=True)
class Found:
    """A variant and where its files are.

    Attributes:
        variant: Its checked contents.
        find: The path of a file by its name.
        where: They are, for messages.
        repository: On the Hub, at the commit that was found, if it is there.
    """

    variant: Variant
    find: Callable[[str], Path]
    where: str
    repository: Repository | None = None


@torch.inference_mode(False)  # through weights made within it no gradient would go
def from_pretrained(
    source: str | Path,
    *,
    base: nn.Module | None = None,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> nn.Module:
    """Load what `save_pretrained` wrote or `push_to_hub` published: the same layers, lambdas and statistics on the same
    weights. Every hash is checked, down to that of the finished model; nothing of it executes.

    Args:
        source: A folder, or a repository on the Hub, `owner/name`. A folder of that name goes first.
        base: The plain model, for a lambda-only variant of weights that no name leads to. It is reprogrammed in place,
            once its weights are found to be the right ones.
        revision: Of the repository: a branch, a tag, a commit or `refs/pr/1`. All files are of one commit.
        cache_dir: Where downloads are kept, weights of the base included; the default is the Hub's own cache.
        token: To read what is private; by default the one that is logged in.
        local_files_only: Whether to take all from the cache.

    Returns:
        The model, in evaluation mode.

    Raises:
        BrokenVariant: A file is missing, cut short, changed or of a later format, or was made up.
        timm_nrpm.errors.WrongBase: The base has other weights, or has to be given.
        timm_nrpm.errors.WeightsUnavailable: The base can be neither downloaded nor found in the cache.
        timm_nrpm.errors.HubError: The repository cannot be read; the message says why.

    Example:
        >>> model = from_pretrained("my-variant")
        >>> model = from_pretrained("me/resnet18-nrpm", revision="v1")
    """
    found = find_variant(source, revision=revision, cache_dir=cache_dir, token=token, local_files_only=local_files_only)
    variant = found.variant
    if base is not None:
        if reprogrammed_layers(base):
            raise ValueError("base= is reprogrammed already: give the plain model, timm_nrpm.restore_(base).")
        variant.base.check(base)
        return variant.install(base, found.where)
    make_base = partial(variant.base.build, cache_dir, token, local_files_only)
    return variant.build(found.find, make_base, found.where)


def find_variant(
    source: str | Path,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    weights: bool = True,
) -> Found:
    """The checked contents of a folder or a repository, without a model; see :func:`from_pretrained`.

    Args:
        weights: Whether those of a full variant are fetched and checked as well.
    """
    name = str(source).removeprefix(PREFIX)
    if not isinstance(source, str) or Path(source).is_dir() or not REPO_ID.fullmatch(name):
        folder = Path(source)
        inside = partial(in_folder, folder)
        return Found(Variant.read(inside, str(folder), weights), inside, str(folder))
    repository = Repository(name, revision, cache_dir, token, local_files_only)
    try:
        repository = repository.at(repository.fetch(CONFIG, LARGEST[CONFIG]), CONFIG)
    except NotOnHub as error:
        raise NotOnHub(f"{error} There is no folder {name} either.") from None

    def find(file: str) -> Path:
        return repository.fetch(file, LARGEST.get(file))

    return Found(Variant.read(find, name, weights), find, name, repository)


def in_folder(folder: Path, name: str) -> Path:
    """A file of a folder that somebody may have made up: a plain file, and not larger than it can be.

    Raises:
        MissingFile: It is not there.
        BrokenVariant: It is something else.
    """
    path = folder / name
    try:
        status = path.lstat()
    except OSError as error:
        if name == CONFIG:
            raise MissingFile(f"{folder} holds no {CONFIG}: give a folder that save_pretrained wrote.") from error
        raise MissingFile(f"{path} is missing: get it again.") from error
    if not stat.S_ISREG(status.st_mode):
        raise BrokenVariant(f"{path} is a link or no file, and a variant's files are files: get it again.")
    if status.st_size > LARGEST.get(name, status.st_size):
        raise BrokenVariant(f"{path} has {status.st_size} bytes, and such a file has {LARGEST[name]} at most.")
    return path


def is_variant(cfg: Any) -> bool:
    """Whether timm was led here by the config of a lambda-only variant."""
    return isinstance(cfg, Mapping) and cfg.get("source") in ("hf-hub", "local-dir")


def from_timm(cfg: Mapping[str, Any], pretrained: bool, arguments: Mapping[str, Any]) -> nn.Module:
    """What `timm.create_model("hf-hub:owner/name")` gives for a lambda-only variant.

    Args:
        cfg: timm's, which says where the variant is.
        pretrained: Without it weights are random, and layers and lambdas the variant's.
        arguments: Of `create_model`, of which a variant takes `cache_dir` alone.
    """
    refused = {k: v for k, v in arguments.items() if v is not None and k not in ("cache_dir", "pretrained_model_args")}
    source = Path(cfg["file"]) if cfg["source"] == "local-dir" else PREFIX + str(cfg["hf_hub_id"]).partition("@")[0]
    if refused:
        raise ValueError(
            f"{str(source).removeprefix(PREFIX)} is a variant, and is loaded as it was saved: without "
            f"{', '.join(refused)}. Change the model afterwards, for example by model.reset_classifier(10)."
        )
    revision = str(cfg.get("hf_hub_id")).partition("@")[2] or None
    cache_dir = arguments.get("cache_dir")
    if pretrained:
        return from_pretrained(source, revision=revision, cache_dir=cache_dir)
    found = find_variant(source, revision=revision, cache_dir=cache_dir)
    variant = found.variant
    try:
        plain = timm.create_model(variant.base.architecture, pretrained=False, **variant.base.kwargs)
        check_image_size(plain)
        return reprogram_(plain, variant.config)
    except Exception as error:  # whatever timm makes of arguments that somebody made up
        raise BrokenVariant(f"{found.where} holds no model that timm can build: {error!r}") from error
