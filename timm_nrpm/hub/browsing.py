"""Variants on the Hub: listing an owner's, inspecting one without its weights, and copying one to disk."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.constants import HF_HUB_OFFLINE

from timm_nrpm.config import Estimator
from timm_nrpm.ensembles.folders import FoundEnsemble, filling_as, find_ensemble
from timm_nrpm.errors import MissingFile, NotOnHub, Unreachable
from timm_nrpm.evaluation.report import RobustnessReport
from timm_nrpm.hub.cards import TAGS
from timm_nrpm.hub.contents import BESIDE
from timm_nrpm.hub.publishing import check_repo_id
from timm_nrpm.hub.templates import EVALUATION, parse_evaluation
from timm_nrpm.models.base import Base
from timm_nrpm.models.downloads import insist
from timm_nrpm.models.loading import PREFIX, Found, find_variant
from timm_nrpm.models.provenance import Step

LARGEST_EXTRA = 64 << 20
"""Most bytes that a card or one of the files behind it may have."""


@dataclass(frozen=True)
class Description:
    """A variant as its files describe it, read without its weights.

    Attributes:
        name: The folder or repository that holds the variant.
        commit: The commit that was read; None for a folder.
        base: The model that the variant was made from.
        is_full: Whether the variant holds the weights.
        estimator: Settings of the robust estimate.
        standardize: Whether they count in standard units, see :class:`timm_nrpm.NRPMConfig`.
        lams: Lambda of every layer.
        statistics: The steps that moved the statistics, as far as they are known.
        reports: The reports behind its card, if they are on this very model.
        note: A remark on the reports, such as `"2 evaluations"` or `"Not evaluated."`.
    """

    name: str
    commit: str | None
    base: Base
    is_full: bool
    estimator: Estimator
    standardize: bool
    lams: Mapping[str, float]
    statistics: tuple[Step, ...]
    reports: tuple[RobustnessReport, ...]
    note: str

    @property
    def flags(self) -> tuple[str, ...]:
        """Every flag that any of the reports raises."""
        return tuple(dict.fromkeys(flag for report in self.reports for flag in report.flags))


@dataclass(frozen=True)
class Listed:
    """A repository that :func:`list_variants` found.

    Attributes:
        repo_id: Its name, `owner/name`.
        private: Whether it is private.
        base: The base model that its card names, if it names one.
        modified: Date of the last change, as `2025-12-31`; empty if it is not known.
    """

    repo_id: str
    private: bool
    base: str | None
    modified: str


def inspect(
    source: str | Path, *, revision: str | None = None, token: str | bool | None = None, local_files_only: bool = False
) -> Description:
    """Read what a variant holds, without its weights and without those of its base.

    Args:
        source, revision, token, local_files_only: The same as in :func:`timm_nrpm.from_pretrained`.

    Raises:
        timm_nrpm.errors.BrokenVariant, timm_nrpm.errors.HubError: The variant cannot be read, for the reasons that
            :func:`timm_nrpm.from_pretrained` lists.

    Example:
        >>> about = inspect("me/resnet18-nrpm")
        >>> about.base.name, about.lams["fc"], about.flags
        ('resnet8_digits', 0.8, ())
    """
    try:
        found = find_variant(source, revision=revision, token=token, local_files_only=local_files_only, weights=False)
    except (MissingFile, NotOnHub):
        ensemble = find_ensemble(source, revision, None, token, local_files_only)
        if ensemble is None:
            raise
        kind, members = ensemble.content["kind"], ", ".join(ensemble.content["members"])
        raise ValueError(
            f"{source} is an ensemble ({kind}) of {members}, and this shows one variant: its card says what it is made "
            "of, and from_pretrained loads it."
        ) from None
    variant = found.variant
    reports: list[RobustnessReport] = []
    try:
        path = found.repository.fetch(EVALUATION, LARGEST_EXTRA) if found.repository else found.find(EVALUATION)
        reports = parse_evaluation(path.read_text(encoding="utf-8"))
        note = f"{len(reports)} evaluation{'s' * (len(reports) != 1)}"
    except (NotOnHub, FileNotFoundError):
        note = "Not evaluated."
    except Unreachable:
        if not (local_files_only or HF_HUB_OFFLINE):
            raise
        note = "If it was evaluated, the evaluation is not in the cache."
    except ValueError as error:
        note = f"Its evaluation cannot be read: {error}"
    if any(report.sha256 != variant.model for report in reports):
        note, reports = "Its evaluation is of another model, and says nothing about this one.", []
    commit = found.repository.revision if found.repository else None
    return Description(
        found.where,
        commit,
        variant.base,
        variant.is_full,
        variant.config.estimator,
        variant.config.standardize,
        variant.lams,
        variant.statistics,
        tuple(reports),
        note,
    )


def list_variants(author: str, *, token: str | bool | None = None) -> list[Listed]:
    """The variants that a user or an organization has published, found by their tag.

    Args:
        author: Name of the user or organization.
        token: An access token, or whether to use the one that is logged in, which is the default.

    Raises:
        timm_nrpm.errors.HubError: The Hub does not answer, or refuses.

    Example:
        >>> [listed.repo_id for listed in list_variants("me")]
        ['me/resnet18-nrpm']
    """
    ask = partial(HfApi(token=token).list_models, author=author, filter=TAGS[0], full=True, cardData=True)
    models = insist(f"Listing the models of {author}", lambda: list(ask()), token=token)
    return [
        Listed(
            model.id,
            bool(model.private),
            _base_of(model),
            f"{model.last_modified:%Y-%m-%d}" if model.last_modified else "",
        )
        for model in sorted(models, key=lambda model: model.id)
    ]


def pull(
    repo_id: str,
    folder: str | Path,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> Path:
    """Copy a variant or an ensemble from the Hub into a folder, with its card: all files of one commit, or nothing.

    Args:
        repo_id: The repository, `owner/name`.
        folder: The folder to write to, created if it does not exist; a variant in it is replaced.
        revision, cache_dir, token, local_files_only: The same as in :func:`timm_nrpm.from_pretrained`.

    Returns:
        The folder, which `from_pretrained` loads.

    Raises:
        ValueError: `folder` holds something else, or `repo_id` is not `owner/name`.
        timm_nrpm.errors.BrokenVariant, timm_nrpm.errors.HubError: The variant cannot be read, for the reasons that
            :func:`timm_nrpm.from_pretrained` lists.

    Example:
        >>> pull("me/resnet18-nrpm", "resnet18-nrpm")
        PosixPath('resnet18-nrpm')
    """
    folder, source = Path(folder), f"{PREFIX}{check_repo_id(repo_id)}"  # the prefix rules out a folder of that name
    found = _found(source, revision, cache_dir, token, local_files_only)
    with filling_as(found, folder) as draft:
        assert found.repository is not None
        for name in found.names():
            shutil.copyfile(found.find(name), draft / name)
        for name in BESIDE:
            try:
                shutil.copyfile(found.repository.fetch(name, LARGEST_EXTRA), draft / name)
            except NotOnHub:
                pass
            except Unreachable:
                if not (local_files_only or HF_HUB_OFFLINE):
                    raise
        copied = {file.name for file in draft.iterdir()}
    for name in set(BESIDE) - copied:
        (folder / name).unlink(missing_ok=True)  # left by the variant that was there before
    return folder


def _found(
    source: str, revision: str | None, cache_dir: str | Path | None, token: str | bool | None, local_files_only: bool
) -> Found | FoundEnsemble:
    """The variant or the ensemble of a repository."""
    try:
        return find_variant(
            source, revision=revision, cache_dir=cache_dir, token=token, local_files_only=local_files_only
        )
    except NotOnHub:
        ensemble = find_ensemble(source, revision, cache_dir, token, local_files_only)
        if ensemble is None:
            raise
        ensemble.check()
        return ensemble


def _base_of(model: Any) -> str | None:
    """The base model that a card names, as text: whoever wrote the card may have put any value there."""
    base = model.card_data.get("base_model") if model.card_data else None
    return ", ".join(map(str, base)) if isinstance(base, list) else base and str(base)
