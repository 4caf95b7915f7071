"""Loading a variant as a model: from a folder, from the Hub, or through timm's own `create_model`."""

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
    """A variant and the place of its files.

    Attributes:
        variant: Checked contents of the variant.
        find: Function from the name of a file to its path.
        where: Folder or repository as error messages name it.
        repository: Repository on the Hub at the commit that was read; None for a folder.
    """

    variant: Variant
    find: Callable[[str], Path]
    where: str
    repository: Repository | None = None

    def names(self) -> tuple[str, ...]:
        """Names of the variant's files."""
        return (CONFIG, *self.variant.files)

    def build(self, cache_dir: str | Path | None, token: str | bool | None, local_files_only: bool) -> nn.Module:
        """The model of the variant; the arguments are those of :func:`load_variant`."""
        make_base = partial(self.variant.base.build, cache_dir, token, local_files_only)
        return self.variant.build(self.find, make_base, self.where)


@torch.inference_mode(False)  # no gradient would pass through weights made in that mode
def load_variant(
    source: str | Path,
    *,
    base: nn.Module | None = None,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> nn.Module:
    """Load a variant as a model; every argument, and what is raised, is as in :func:`timm_nrpm.from_pretrained`, which
    loads ensembles too.

    Example:
        >>> model = load_variant(save_pretrained(model, "my-variant"))
    """
    located = find_variant(
        source, revision=revision, cache_dir=cache_dir, token=token, local_files_only=local_files_only
    )
    if base is not None:
        if reprogrammed_layers(base):
            raise ValueError("base= is reprogrammed already: give the plain model, timm_nrpm.restore_(base).")
        located.variant.base.check(base)
        return located.variant.install(base, located.where)
    return located.build(cache_dir, token, local_files_only)


def find_variant(
    source: str | Path,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    weights: bool = True,
) -> Found:
    """The checked contents of a folder or a repository, without a model; see :func:`load_variant`.

    Args:
        source, revision, cache_dir, token, local_files_only: The same as in :func:`load_variant`.
        weights: Whether the weights file of a full variant is fetched and checked as well.
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
    """Path of a file in a folder, which a stranger may have filled: a regular file of the allowed size.

    Raises:
        MissingFile: The file is not there.
        BrokenVariant: It is a link or another kind of entry, or is too large.
    """
    path = folder / name
    try:
        status = path.lstat()
    except OSError as error:
        if name == CONFIG:
            raise MissingFile(f"{folder} holds no {CONFIG}: give a folder that save_pretrained wrote.") from error
        raise MissingFile(f"{path} is missing: get it again.") from error
    if not stat.S_ISREG(status.st_mode):
        raise BrokenVariant(f"{path} is a link or no file, and a variant holds only regular files: get it again.")
    if status.st_size > LARGEST.get(name, status.st_size):
        raise BrokenVariant(f"{path} has {status.st_size} bytes, and such a file has {LARGEST[name]} at most.")
    return path


def is_variant(cfg: Any) -> bool:
    """Whether timm read its pretrained config `cfg` from a lambda-only variant, in a repository or a folder."""
    return isinstance(cfg, Mapping) and cfg.get("source") in ("hf-hub", "local-dir")


def from_timm(cfg: Mapping[str, Any], pretrained: bool, arguments: Mapping[str, Any]) -> nn.Module:
    """Build the model that `timm.create_model("hf-hub:owner/name")` returns for a lambda-only variant.

    Args:
        cfg: timm's pretrained config, which says where the variant is.
        pretrained: Whether to load the weights; otherwise they are random, with the variant's layers and lambdas.
        arguments: Further arguments of `timm.create_model`, of which a variant accepts only `cache_dir`.

    Raises:
        ValueError: `arguments` holds an argument that a variant does not accept.
        BrokenVariant: The variant is broken, or timm cannot build its model.
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
        return load_variant(source, revision=revision, cache_dir=cache_dir)
    located = find_variant(source, revision=revision, cache_dir=cache_dir)
    return with_random_weights(located.variant, located.where)


def with_random_weights(variant: Variant, where: str) -> nn.Module:
    """The model of a variant with its layers and lambdas, and random weights in the place of its own.

    Args:
        variant: The checked contents of the variant.
        where: Its folder or repository as error messages name it.

    Raises:
        BrokenVariant: timm cannot build the model.

    Example:
        >>> found = find_variant(save_pretrained(model, "my-variant"))
        >>> lambdas(with_random_weights(found.variant, found.where)) == lambdas(model)
        True
    """
    try:
        plain = timm.create_model(variant.base.architecture, pretrained=False, **variant.base.kwargs)
        check_image_size(plain)
        return reprogram_(plain, variant.config)
    except Exception as error:  # timm may raise anything for arguments that a stranger made up
        raise BrokenVariant(f"{where} holds no model that timm can build: {error!r}") from error
