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

from timm_nrpm.checks import check_choice, check_names
from timm_nrpm.evaluation.cost_report import CostReport
from timm_nrpm.evaluation.report import RobustnessReport
from timm_nrpm.hub.collection import check_collection
from timm_nrpm.hub.contents import About, Contents, contents_of
from timm_nrpm.hub.earlier import UNASKED, UNKNOWN
from timm_nrpm.hub.latency import read_cost
from timm_nrpm.hub.losses import Consent
from timm_nrpm.hub.published import Published
from timm_nrpm.hub.pushing import Push
from timm_nrpm.hub.sending import Sending
from timm_nrpm.hub.templates import read_reports
from timm_nrpm.hub.visibility import VISIBILITIES
from timm_nrpm.models.downloads import REPO_ID
from timm_nrpm.models.signatures import Signature


def push_to_hub(
    model: nn.Module | Signature | str | Path,
    repo_id: str,
    *,
    reports: Sequence[RobustnessReport] | RobustnessReport | None = None,
    cost: CostReport | bool = True,
    full: bool | None = None,
    license: str | None = None,
    datasets: Sequence[str] = (),
    tags: Sequence[str] = (),
    collection: str | None = None,
    visibility: str | None = None,
    revision: str | None = None,
    pull_request: bool = False,
    commit_message: str = "Publish a reprogrammed model",
    allow_removal: Consent = False,
    token: str | bool | None = None,
    dry_run: bool = False,
    folder: str | Path | None = None,
) -> Published:
    """Publish a reprogrammed model with a card, in one commit.

    The whole folder is written before the first request. Requests that fail temporarily are repeated; if the reply to
    the commit is lost, the Hub is asked whether the commit arrived. A second call sends what is missing, and nothing
    if nothing changed. Large files show a progress bar.

    A push that would take something away is refused before anything is sent, with a list of what would go: another
    model, weights, reports or files of an earlier one, files of the repository that would be overwritten, a licence,
    datasets, a base model or numbers on the card, what was changed by hand inside its generated part, or readers. A
    pull request takes nothing away before it is merged: the list is among its notes.

    Args:
        model: A reprogrammed model, an ensemble or a weight signature, or a folder that holds one.
        repo_id: The repository, `owner/name`, created if it does not exist. Other files in it stay, and so do the
            handwritten parts of its card.
        reports: Reports of :func:`timm_nrpm.evaluate` on this very model, one for each threat. The default is those in
            the folder of the variant, or else those in the repository, if they are on this very model. Without any, as
            with `reports=()`, the card says that the model is not evaluated.
        cost: What a forward costs, for the card: a report of :func:`timm_nrpm.cost` on this model. True, the default,
            takes the one that the folder or the repository has of this very model, or else estimates it on this machine
            for one image, which takes about two seconds in a process and does not run the reprogrammed model, but
            sets the number of PyTorch's threads for that time: give False beside a training, which estimates nothing.
        full: Whether to publish the weights too. By default they are published if they were tuned, or if the repository
            holds these very weights already.
        license: Licence of the weights, an identifier that the Hub knows; the default is the base's. It is required if
            the weights did not come through a public name.
        datasets: Names on the Hub of the datasets that the model was trained on.
        tags: Further tags of the card. Those that it has already stay.
        collection: A collection on the Hub to add the repository to, after the commit: the slug in its address, or the
            title of one of the owner's, which is made if there is none, as visible as the repository.
        visibility: Who may read the repository, "public" or "private". By default a new one is private, and another one
            stays what it is. One that is private becomes public after the commit, with all its earlier commits; one
            that is public becomes private before it.
        revision: The branch to commit to, created if it does not exist; the default is `main`.
        pull_request: Whether to open a pull request instead of committing to `main`.
        commit_message: Title of the commit, one line.
        allow_removal: Whether the push may take something away; or a function that is given the list of what would go,
            and answers. By default it may not.
        token: An access token that may write to the repository; the default is the one that is logged in.
        dry_run: Whether to stop once the folder is complete, without any request.
        folder: Folder to write the variant to, replacing a variant in it; the default is a temporary folder.

    Raises:
        ValueError: A report is on another model, no licence is known, an argument does not fit, the card in the
            repository cannot be read, or the push would take something away. Nothing was sent.
        timm_nrpm.errors.HubError: The push failed; the message says why. The repository never holds half of a variant.
            If the commit was made, and making the repository public or adding it to a collection failed, the message
            says so.

    Example:
        >>> print(push_to_hub(model, "me/resnet18-nrpm", reports=report))
        me/resnet18-nrpm: http.../me/resnet18-nrpm/tree/...
          nrpm_config.json ... bytes  sent
          ...
    """
    repo_id = check_repo_id(repo_id)
    about = About(repo_id, license, check_names("datasets", datasets), check_names("tags", tags))
    if visibility is not None:
        check_choice("visibility", visibility, VISIBILITIES)
    check_collection(collection)
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
        contents.fill(full)
        if reports is None:
            reports = [report for report in read_reports(folder) if report.sha256 == contents.sha256] or None
        about = replace(about, cost=_cost_of(contents, cost))
        contents.write_card(replace(about, reports=reports or ()))
        if dry_run:
            notes = (UNKNOWN,) if reports else (UNASKED, UNKNOWN)
            return Published(repo_id, None, None, contents.sizes(), notes=notes)
        sending = Sending(
            contents=contents,
            about=about,
            reports=reports,
            cost=cost if isinstance(cost, CostReport) else None,
            completes=full is None and isinstance(model, nn.Module),
            visibility=visibility,
            collection=collection,
            message=commit_message.strip(),
            pull_request=pull_request,
            consent=allow_removal,
        )
        return sending.send(Push(HfApi(token=token), repo_id, token, revision, folder))


def _cost_of(contents: Contents, cost: CostReport | bool) -> CostReport | None:
    """What a forward of a model costs: what is given, or lies beside it, or is estimated where that is asked for."""
    if isinstance(cost, CostReport):
        return contents.checked(cost)
    known = read_cost(contents.source, contents.sha256) if isinstance(contents.source, Path) else None
    return known or (contents.estimated() if cost else None)


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
