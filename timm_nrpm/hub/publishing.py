"""Publish a variant and its card on the Hub: a folder is completed on disk, and then sent in exactly one commit."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from torch import nn

from timm_nrpm.evaluation.report import RobustnessReport
from timm_nrpm.hub.cards import PICTURE
from timm_nrpm.hub.contents import About, contents_of
from timm_nrpm.hub.earlier import UNASKED, Earlier
from timm_nrpm.hub.published import Published
from timm_nrpm.hub.pushing import Push
from timm_nrpm.hub.templates import read_reports
from timm_nrpm.models.downloads import (
    REPO_ID,
    Repository,
)
from timm_nrpm.models.signatures import Signature


def push_to_hub(
    model: nn.Module | Signature | str | Path,
    repo_id: str,
    *,
    reports: Sequence[RobustnessReport] | RobustnessReport | None = None,
    full: bool | None = None,
    license: str | None = None,
    datasets: Sequence[str] = (),
    private: bool | None = None,
    revision: str | None = None,
    pull_request: bool = False,
    commit_message: str = "Publish a reprogrammed model",
    token: str | bool | None = None,
    dry_run: bool = False,
    folder: str | Path | None = None,
) -> Published:
    """Publish a reprogrammed model with a card, in one commit.

    The whole folder is written before the first request. Requests that fail temporarily are repeated; if the reply to
    the commit is lost, the Hub is asked whether the commit arrived. A second call sends what is missing, and nothing
    if nothing changed. Large files show a progress bar.

    Args:
        model: A reprogrammed model, an ensemble or a weight signature, or a folder that holds one.
        repo_id: The repository, `owner/name`, created if it does not exist. Other files in it stay, and so do the
            handwritten parts of its card.
        reports: Reports of :func:`timm_nrpm.evaluate` on this very model, one for each threat. The default is those in
            the folder of the variant, or else those in the repository, if they are on this very model. Without any, as
            with `reports=()`, the card says that the model is not evaluated.
        full: Whether to publish the weights too. By default they are published if they were tuned, or if the repository
            holds these very weights already.
        license: Licence of the weights, an identifier that the Hub knows; the default is the base's. It is required if
            the weights did not come through a public name.
        datasets: Names on the Hub of the datasets that the model was trained on.
        private: Whether a new repository is private, which is the default. True refuses an existing repository that is
            public, and False one that is private.
        revision: The branch to commit to, created if it does not exist; the default is `main`.
        pull_request: Whether to open a pull request instead of committing to `main`.
        commit_message: Title of the commit, one line.
        token: An access token that may write to the repository; the default is the one that is logged in.
        dry_run: Whether to stop once the folder is complete, without any request.
        folder: Folder to write the variant to, replacing a variant in it; the default is a temporary folder.

    Raises:
        ValueError: A report is on another model, no licence is known, an argument does not fit, or the card in the
            repository cannot be read. Nothing was sent.
        timm_nrpm.errors.HubError: The push failed; the message says why. The repository never holds half of a variant.

    Example:
        >>> print(push_to_hub(model, "me/resnet18-nrpm", reports=report))
        me/resnet18-nrpm: http.../me/resnet18-nrpm/tree/...
          nrpm_config.json ... bytes  sent
          ...
    """
    repo_id = check_repo_id(repo_id)
    if reports is None and not isinstance(model, (nn.Module, Signature)):
        reports = read_reports(Path(model)) or None
    if isinstance(reports, RobustnessReport):
        reports = (reports,)
    if pull_request and revision is not None:
        raise ValueError(f"pull_request=True opens a pull request against main: leave out revision={revision!r}.")
    if not commit_message.strip():
        raise ValueError("commit_message is empty: say what changed.")
    with ExitStack() as stack:
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "variant"
        folder = Path(folder)
        contents = contents_of(model, folder)
        about = About(repo_id, license, datasets)
        contents.fill(full)
        if reports is None:
            reports = [report for report in read_reports(folder) if report.sha256 == contents.sha256] or None
        contents.write_card(replace(about, reports=reports or ()))
        if dry_run:
            return Published(repo_id, None, None, contents.sizes(), notes=() if reports else (UNASKED,))
        push = Push(HfApi(token=token), repo_id, revision, folder, contents.sizes(), (), token)
        push.make_repository(private)
        parent = push.head()
        earlier = Earlier.read(Repository(repo_id, parent, token=token), contents.config, contents.read)
        push.known = contents.known(earlier.config)
        if full is None and isinstance(model, nn.Module) and earlier.config and contents.is_based_on(earlier.config):
            contents.fill(True)
        shown, notes = earlier.reports(contents.sha256, reports)
        picture = None if (folder / PICTURE).exists() else earlier.picture(contents.sha256)
        contents.write_card(replace(about, reports=shown, existing=earlier.card, picture=picture))
        push.sizes = contents.sizes()
        return replace(push.commit(parent, commit_message.strip(), pull_request), notes=notes)


def check_repo_id(repo_id: str) -> str:
    """Return `repo_id`, or raise a ValueError that says what is allowed."""
    try:
        validate_repo_id(repo_id)
        if REPO_ID.fullmatch(repo_id):
            return repo_id
        why = "it names no owner"
    except HFValidationError as error:
        why = str(error).rstrip(".")
    raise ValueError(f"repo_id={repo_id!r} is not allowed ({why}): write owner/name.")
