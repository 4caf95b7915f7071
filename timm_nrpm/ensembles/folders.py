"""Ensembles on disk and on the Hub: a folder that holds the files of each member, and how they are joined.

Members are variants, whose files have the name of the member before their own. A plain model is kept as a variant whose
lambdas are all 1, and is plain again after loading.

    nrpm_ensemble.json            kind, settings, members; sha256 of the model, the other files and itself
    nrpm_ensemble.safetensors     tensors that the ensemble has beside its members
    robust.nrpm_config.json       files of the member `robust`, as docs/format.md specifies them
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse_tensors
from torch import nn

from timm_nrpm.config import NRPMConfig
from timm_nrpm.ensembles.adaptive_smoothing import AdaptiveSmoothing
from timm_nrpm.ensembles.crossmax import CrossMax
from timm_nrpm.errors import BrokenVariant, MissingFile, NotOnHub
from timm_nrpm.models.base import checksum_of
from timm_nrpm.models.creation import LARGEST_CONFIG
from timm_nrpm.models.downloads import REPO_ID, Repository, sha256_of
from timm_nrpm.models.format import CONFIG, LARGEST, Variant
from timm_nrpm.models.loading import PREFIX, Found, in_folder, load_variant
from timm_nrpm.models.reprogramming import is_reprogrammed, model_sha256, plain_copy, reprogram_, restore_
from timm_nrpm.models.saving import filling, save_loadable, save_variant
from timm_nrpm.models.tensors import write_tensors
from timm_nrpm.nn.ensemble import Ensemble, Member
from timm_nrpm.nn.pixel_model import PixelModel
from timm_nrpm.nn.wrappers import unwrapped

ENSEMBLE, JOINTS = "nrpm_ensemble.json", "nrpm_ensemble.safetensors"
FORMAT = 1
KEYS = {"format", "kind", "settings", "members", "files", "model"}
KINDS: dict[str, type[Ensemble]] = {kind.kind: kind for kind in (AdaptiveSmoothing, CrossMax)}
LARGEST_JOINTS = 64 << 20


def save_pretrained(model: nn.Module, folder: str | Path, *, full: bool = False) -> Path:
    """Write a reprogrammed model, or an ensemble, to a folder.

    Args:
        model: A reprogrammed timm model, or an ensemble, with or without a wrapper such as DataParallel.
        folder: Path of the folder. It is created, or the variant in it is replaced; its other files stay.
        full: Whether to write the weights too. Without them, the base is needed to load the variant. Of an ensemble,
            weights that no public name leads to are written in any case.

    Returns:
        Path of the folder, which changes only once everything is written.

    Raises:
        ValueError: The model is not reprogrammed; its weights changed since they were loaded, so that lambdas alone
            would lose them; timm would build another model from a full folder; or `folder` holds something else.

    Example:
        >>> save_pretrained(model, "my-variant")
        PosixPath('my-variant')
    """
    model = unwrapped(model)
    if not isinstance(model, Ensemble):
        return save_variant(model, folder, full=full)
    folder = Path(folder)
    with filling(folder, kind="ensemble", config=ENSEMBLE, maybe=_names_in(folder)) as draft:
        members = {name: _save_member(model.member(name), name, draft, full) for name in model.members}
        write_tensors({name: tensor.detach().cpu() for name, tensor in model.tensors().items()}, draft / JOINTS)
        content: dict[str, Any] = {"format": FORMAT, "kind": model.kind, "settings": model.settings()}
        content |= {"members": members, "model": model_sha256(model)}
        content["files"] = {f.name: sha256_of(f) for f in sorted(draft.iterdir())}
        (draft / ENSEMBLE).write_text(json.dumps({**content, "sha256": checksum_of(content)}, indent=2) + "\n")
    return folder


@torch.inference_mode(False)
def from_pretrained(
    source: str | Path,
    *,
    base: nn.Module | None = None,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> nn.Module:
    """Load a variant or an ensemble that `save_pretrained` wrote or `push_to_hub` published.

    The model has the same layers, lambdas and statistics on the same weights. Every hash is checked, that of the
    finished model included, and nothing in the variant is executed.

    Args:
        source: Path of a folder, or a repository on the Hub, `owner/name`. A folder of that name takes precedence.
        base: The plain model, for a lambda-only variant of weights that no name leads to. It is reprogrammed in place,
            after its weights have been verified.
        revision: Branch, tag, commit or `refs/pr/1` of the repository; the default is `main`. All files are read at one
            commit.
        cache_dir: Folder for downloads, weights of the base included; the default is the Hub's own cache.
        token: Token that can read the repository if it is private; the default is the one that is logged in.
        local_files_only: Whether to read only from the cache, without any request.

    Returns:
        The model, in evaluation mode.

    Raises:
        ValueError: `base` is reprogrammed already, or given for an ensemble.
        BrokenVariant: A file is missing, cut short, changed, of a later format, or was made up.
        timm_nrpm.errors.WrongBase: The base has other weights, or no name leads to them and `base` is None.
        timm_nrpm.errors.WeightsUnavailable: The base can be neither downloaded nor found in the cache.
        timm_nrpm.errors.HubError: The repository cannot be read; the message says why.

    Example:
        >>> model = from_pretrained(save_pretrained(model, "my-variant"))
        >>> model = from_pretrained("me/resnet18-nrpm", revision="main")
    """
    try:
        return load_variant(
            source, base=base, revision=revision, cache_dir=cache_dir, token=token, local_files_only=local_files_only
        )
    except (MissingFile, NotOnHub):
        found = find_ensemble(source, revision, cache_dir, token, local_files_only)
        if found is None:
            raise
    if base is not None:
        raise ValueError(f"{source} is an ensemble, whose members bring their weights: leave out base=.")
    return found.build(cache_dir, token, local_files_only)


@dataclass(frozen=True)
class FoundEnsemble:
    """The checked contents of an ensemble's folder, before any model is built.

    Attributes:
        content: Content of its config.
        find: Function from the name of a file to its path.
        where: Folder or repository as error messages name it.
        repository: Repository on the Hub at the commit that was read; None for a folder.
    """

    content: Mapping[str, Any]
    find: Callable[[str], Path]
    where: str
    repository: Repository | None = None

    def names(self) -> tuple[str, ...]:
        """Names of the ensemble's files."""
        return (ENSEMBLE, *self.content["files"])

    def check(self) -> None:
        """Raise a BrokenVariant if a file is not the one that was saved."""
        for name, expected in self.content["files"].items():
            if sha256_of(self.find(name)) != expected:
                raise BrokenVariant(f"{name} of {self.where} is cut short or was changed: get it again.")

    def members(self) -> dict[str, Found]:
        """The members' variants by name, of which every file is checked."""
        found = {}
        for name in self.content["members"]:
            inside = partial(_of_member, self.find, name)
            where = f"{self.where} ({name})"
            found[name] = Found(Variant.read(inside, where), inside, where)
        return found

    def build(self, cache_dir: str | Path | None, token: str | bool | None, local_files_only: bool) -> Ensemble:
        """The ensemble; the arguments are those of :func:`from_pretrained`."""
        self.check()
        models = {name: found.build(cache_dir, token, local_files_only) for name, found in self.members().items()}
        try:
            members = {name: _member(model, self.content["members"][name]) for name, model in models.items()}
            tensors = parse_tensors(self.find(JOINTS).read_bytes())
            ensemble = KINDS[self.content["kind"]].build(members, self.content["settings"], tensors).eval()
        except (SafetensorError, OSError, LookupError, ValueError, TypeError, AttributeError, RuntimeError) as error:
            raise BrokenVariant(f"{self.where} holds no ensemble that can be built: {error}") from error
        if model_sha256(ensemble) != self.content["model"]:
            raise BrokenVariant(f"{self.where} gives another model than the one that was saved: get it again.")
        return ensemble


def find_ensemble(
    source: str | Path,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> FoundEnsemble | None:
    """The checked contents of a folder or a repository; None if it holds no ensemble.

    Raises:
        BrokenVariant: The config was changed, is of a later format, or was made up.
        timm_nrpm.errors.HubError: The repository cannot be read.
    """
    name = str(source).removeprefix(PREFIX)
    if not isinstance(source, str) or Path(source).is_dir() or not REPO_ID.fullmatch(name):
        if not (Path(source) / ENSEMBLE).is_file():
            return None
        find_here = partial(in_folder, Path(source))
        return FoundEnsemble(parse_ensemble(find_here(ENSEMBLE), str(source)), find_here, str(source))
    repository = Repository(name, revision, cache_dir, token, local_files_only)
    try:
        path = repository.fetch(ENSEMBLE, LARGEST_CONFIG)
    except NotOnHub:
        return None
    repository = repository.at(path, ENSEMBLE)

    def find(file: str) -> Path:
        return repository.fetch(file, LARGEST.get(file.partition(".")[2], LARGEST_JOINTS if file == JOINTS else None))

    return FoundEnsemble(parse_ensemble(path, name), find, name, repository)


@contextmanager
def filling_as(found: Found | FoundEnsemble, folder: Path) -> Iterator[Path]:
    """Yield an empty draft folder for the files of a variant or an ensemble, see
    :func:`timm_nrpm.models.saving.filling`."""
    if isinstance(found, FoundEnsemble):
        with filling(folder, kind="ensemble", config=ENSEMBLE, maybe=_names_in(folder)) as draft:
            yield draft
    else:
        with filling(folder) as draft:
            yield draft


def _save_member(member: Member, name: str, draft: Path, full: bool) -> dict[str, Any]:
    """Write the files of a member, and return what the ensemble's config says of it."""
    model = member.net.model
    plain = not is_reprogrammed(model)
    if plain:
        model = reprogram_(plain_copy(model), NRPMConfig(lam=1.0))
    with tempfile.TemporaryDirectory(dir=draft.parent) as temporary:
        place = Path(temporary) / "variant"
        if full:
            save_variant(model, place, full=True)
        else:
            save_loadable(model, place)
        for file in place.iterdir():
            file.replace(draft / f"{name}.{file.name}")
    size = None if member.size is None else list(member.size)
    return {"plain": plain, "size": size, **member.net.normalisation()}


def _member(model: nn.Module, described: Mapping[str, Any]) -> Member:
    """A member as the config of its ensemble describes it."""
    net = PixelModel(restore_(model) if described["plain"] else model, described["mean"], described["std"])
    size = described["size"]
    return Member(net, None if size is None else (int(size[0]), int(size[1])))


def _of_member(find: Callable[[str], Path], member: str, name: str) -> Path:
    return find(f"{member}.{name}")


def _names_in(folder: Path) -> list[str]:
    """Names of the files of the ensemble in a folder, if it holds one that can be read."""
    with suppress(BrokenVariant, OSError):
        return [*parse_ensemble(folder / ENSEMBLE, str(folder))["files"]]
    return []


def parse_ensemble(path: Path, where: str) -> Mapping[str, Any]:
    """The checked content of an ensemble's config.

    Raises:
        BrokenVariant: The file was changed, is of a later format, or is no ensemble's config.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        expected = content.pop("sha256")
        version = content["format"]
        unchanged = checksum_of(content) == expected
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BrokenVariant(f"{ENSEMBLE} of {where} is cut short or no ensemble's config ({error!r}).") from error
    if version != FORMAT or type(version) is not int:
        raise BrokenVariant(f"{where} has format {version!r}, and this version reads {FORMAT}: update timm_nrpm.")
    if not unchanged:
        raise BrokenVariant(f"{ENSEMBLE} of {where} was changed after it was saved: get it again.")
    members, files = content.get("members"), content.get("files")
    described = isinstance(members, dict) and all(
        name.isidentifier() and isinstance(each, dict) and set(each) == {"plain", "size", "mean", "std"}
        for name, each in members.items()
    )
    listed = isinstance(files, dict) and all(Path(name).name == name for name in files)
    is_known = set(content) == KEYS and isinstance(content["kind"], str) and content["kind"] in KINDS
    if not is_known or not described or not listed:
        raise BrokenVariant(f"{where} holds no ensemble that this version can read; it knows {', '.join(KINDS)}.")
    if any(f"{name}.{CONFIG}" not in files for name in members) or JOINTS not in files:
        raise BrokenVariant(f"{ENSEMBLE} of {where} does not list all files of its members: get it again.")
    return content
