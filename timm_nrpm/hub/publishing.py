"""Publish a variant and its card on the Hub: a folder is completed on disk, and then sent in exactly one commit."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id
from huggingface_hub.utils.sha import git_hash
from torch import nn

from timm_nrpm.errors import HubError, NotOnHub, Unreachable
from timm_nrpm.evaluation.report import RobustnessReport
from timm_nrpm.hub.cards import CARD, EVALUATION, PICTURE, read_reports, write_card
from timm_nrpm.hub.earlier import UNASKED, Earlier
from timm_nrpm.hub.published import Published
from timm_nrpm.models.creation import TIMM_FILES
from timm_nrpm.models.downloads import (
    REPO_ID,
    WAITS,
    Repository,
    hub_error,
    insist,
    is_lost_connection,
    may_pass,
    sha256_of,
)
from timm_nrpm.models.format import CONFIG, TENSORS
from timm_nrpm.models.loading import find_variant
from timm_nrpm.models.network import limit, patience
from timm_nrpm.models.saving import filling, needs_weights, save_pretrained

FILES = (CONFIG, TENSORS, *TIMM_FILES, EVALUATION, PICTURE, CARD)
"""The files of a repository that belong to a variant; all others stay."""

WITHOUT_NETWORK = "dry_run=True completes the folder without the network"
"""Advice on working offline: HF_HUB_OFFLINE does not help to send anything."""


def push_to_hub(
    model: nn.Module | str | Path,
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
        model: A reprogrammed model, or a folder that holds a variant.
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
    if reports is None and not isinstance(model, nn.Module):
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
        prepare = partial(write_card, folder, repo_id, license=license, datasets=datasets)
        _fill(model, folder, full)
        variant = find_variant(folder, weights=False).variant
        if reports is None:
            reports = [report for report in read_reports(folder) if report.sha256 == variant.model] or None
        prepare(reports or ())
        if dry_run:
            return Published(repo_id, None, None, _sizes(folder), notes=() if reports else (UNASKED,))
        push = _Push(HfApi(token=token), repo_id, revision, folder, token)
        push.make_repository(private)
        parent = push.head()
        earlier = Earlier.read(Repository(repo_id, parent, token=token))
        if full is None and isinstance(model, nn.Module) and earlier.holds_weights_of(variant):
            _fill(model, folder, True)
        shown, notes = earlier.reports(variant, reports)
        picture = None if (folder / PICTURE).exists() else earlier.picture(variant)
        prepare(shown, earlier.card, picture=picture)
        push.sizes = _sizes(folder)
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


def _fill(model: nn.Module | str | Path, folder: Path, full: bool | None) -> None:
    """Write the variant's own files into `folder`."""
    if isinstance(model, nn.Module):
        save_pretrained(model, folder, full=needs_weights(model) if full is None else full)
        return
    found = find_variant(Path(model))
    if full is not None and full != found.variant.is_full:
        held = "with its weights" if found.variant.is_full else "without its weights"
        raise ValueError(f"{model} holds a variant {held}: load it and push the model, or leave out full={full}.")
    if folder.resolve() != Path(model).resolve():
        with filling(folder) as draft:
            for name in (CONFIG, *found.variant.files):
                shutil.copyfile(found.find(name), draft / name)


def _sizes(folder: Path) -> dict[str, int]:
    """Size in bytes of each file to send: the variant's own and its card's, and no others in the folder."""
    names = (CONFIG, *find_variant(folder, weights=False).variant.files, EVALUATION, PICTURE, CARD)
    return {name: (folder / name).stat().st_size for name in names if (folder / name).is_file()}


@dataclass
class _Push:
    """One push of a folder that is complete."""

    api: HfApi
    repo_id: str
    revision: str | None
    folder: Path
    token: str | bool | None = field(repr=False)

    def __post_init__(self) -> None:
        self.sizes = _sizes(self.folder)

    def make_repository(self, private: bool | None) -> None:
        """Create the repository and the branch if they do not exist, and check who may see the repository."""
        try:
            info, wanted = self._info(None), private
        except NotOnHub:
            wanted = private is not False
            make = partial(self.api.create_repo, self.repo_id, private=wanted, exist_ok=True)
            self._do(f"Creating {self.repo_id}", make)
            info = self._info(None)
        if wanted and not info.private:
            raise HubError(
                f"{self.repo_id} is public, and was to be private: nothing was sent. Make it private in its settings "
                "on the Hub, or give private=False."
            )
        if wanted is False and info.private:
            raise HubError(
                f"{self.repo_id} is private, and was to be public: nothing was sent. Make it public in its settings on "
                "the Hub, or leave out private=False."
            )
        if self.revision not in (None, "main") and not str(self.revision).startswith("refs/"):
            branch = partial(self.api.create_branch, branch=str(self.revision), exist_ok=True)
            self._do(f"Creating the branch {self.revision} of {self.repo_id}", lambda: branch(self.repo_id))

    def head(self) -> str:
        """The latest commit of the branch."""
        return str(self._info(self.revision).sha)

    def commit(self, parent: str, message: str, pull_request: bool) -> Published:
        """Commit the files that differ, if any do. The Hub refuses the commit if the branch is no longer at `parent`,
        whose card the new one continues."""
        changed, stale = self.difference(parent)
        url = f"{self.api.endpoint}/{self.repo_id}"
        if not changed and not stale:
            return Published(self.repo_id, parent, f"{url}/tree/{parent}", self.sizes)
        operations: list[Any] = [CommitOperationAdd(name, str(self.folder / name)) for name in changed]
        operations += [CommitOperationDelete(name) for name in stale]
        action = f"Sending {', '.join(changed) or 'the commit'} to {self.repo_id}"
        commit, address = self._send(action, operations, parent, message, pull_request)
        return Published(self.repo_id, commit, f"{url}/tree/{commit}", self.sizes, changed, stale, address)

    def _send(
        self, action: str, operations: list[Any], parent: str, message: str, pull_request: bool
    ) -> tuple[str, str | None]:
        """Make exactly one commit, even if the request has to be repeated.

        Returns:
            The commit, and the address of the pull request if there is one.
        """
        before = self._pull_requests() if pull_request else set()
        for wait in (*WAITS, None):
            try:
                with patience():
                    info = self.api.create_commit(
                        self.repo_id,
                        operations,
                        commit_message=message,
                        revision=self.revision,
                        parent_commit=parent,
                        create_pr=pull_request,
                    )
                return str(info.oid), info.pr_url
            except Exception as error:
                landed = self._landed(parent, before, pull_request)
                if landed is not None:
                    return landed
                status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
                if status in (409, 412):
                    raise HubError(f"Somebody else committed to {self.repo_id} at the same time: push again.") from None
                if isinstance(error, ValueError) and CARD in str(error):
                    raise ValueError(f"The Hub refuses the card: {' '.join(str(error).split())[:500]}") from None
                if wait is None or not (may_pass(error) or type(error) is RuntimeError):  # raised by xet
                    raise hub_error(action, error, self.token) from None
                if pull_request and is_lost_connection(error) and "/commit/" in _address(error):
                    break
                time.sleep(wait)
        return self._late_pull_request(action, parent, before)

    def _late_pull_request(self, action: str, parent: str, before: set[str]) -> tuple[str, str | None]:
        """The commit and the address of a pull request whose reply was lost, once it appears.

        Raises:
            Unreachable: It does not appear. A second request could make a second pull request if the first came late.
        """
        for wait in WAITS:
            time.sleep(wait)
            landed = self._landed(parent, before, True)
            if landed is not None:
                return landed
        raise Unreachable(
            f"{action} as a pull request was not answered, and it may be open all the same: look at "
            f"{self.api.endpoint}/{self.repo_id}/discussions before you push again."
        )

    def difference(self, revision: str | None) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Names of the files that the Hub lacks or has differently, and of those that it has and this variant lacks."""
        list_tree = partial(self.api.list_repo_tree, self.repo_id, revision=revision, recursive=False)
        tree = {item.path: item for item in self._do(f"Listing {self.repo_id}", lambda: list(list_tree()))}
        same = {name for name in self.sizes if name in tree and _is_same(self.folder / name, tree[name])}
        if TENSORS in same and PICTURE in tree:
            same.add(PICTURE)  # another version of Matplotlib draws the same lambdas with other bytes
        changed = tuple(name for name in self.sizes if name not in same)
        return changed, tuple(name for name in FILES if name in tree and name not in self.sizes)

    def _landed(self, parent: str, before: set[str], pull_request: bool) -> tuple[str, str | None] | None:
        """The commit and the address of the pull request, if they arrived although no reply said so; else None."""
        if pull_request:
            for name in sorted(self._pull_requests() - before):
                if self.difference(name) == ((), ()):
                    number = name.rpartition("/")[2]
                    return str(self._info(name).sha), f"{self.api.endpoint}/{self.repo_id}/discussions/{number}"
            return None
        head = self.head()
        return (head, None) if head != parent and self.difference(self.revision) == ((), ()) else None

    def _pull_requests(self) -> set[str]:
        ask = partial(self.api.list_repo_refs, self.repo_id, include_pull_requests=True)
        refs = self._do(f"Listing {self.repo_id}", ask)
        return {ref.ref for ref in refs.pull_requests or ()}

    def _info(self, revision: str | None) -> Any:
        try:
            ask = partial(self.api.model_info, revision=revision, timeout=limit())  # the default is no limit
            return self._do(f"Looking at {self.repo_id}", lambda: ask(self.repo_id))
        except Unreachable as error:
            raise Unreachable(f"{error} If something was sent, pushing again sends what is missing.") from None

    def _do(self, action: str, call: Any) -> Any:
        return insist(action, call, token=self.token, offline=WITHOUT_NETWORK)


def _address(error: BaseException) -> str:
    """The address of the request whose connection broke; empty if it is not known."""
    try:
        return str(error.request.url)  # type: ignore[attr-defined]
    except (AttributeError, RuntimeError):  # the error holds no request
        return ""


def _is_same(file: Path, item: Any) -> bool:
    """Whether the Hub has the same bytes, by the hash that it reports."""
    if (lfs := getattr(item, "lfs", None)) is not None:
        return bool(lfs.sha256 == sha256_of(file))
    return bool(getattr(item, "blob_id", None) == git_hash(file.read_bytes()))
