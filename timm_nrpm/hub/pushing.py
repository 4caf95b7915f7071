"""One push to the Hub: what differs is sent in exactly one commit, even if requests have to be repeated."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils.sha import git_hash

from timm_nrpm.errors import HubError, NotOnHub, Unreachable
from timm_nrpm.hub.cards import PICTURE
from timm_nrpm.hub.published import Published
from timm_nrpm.hub.templates import CARD
from timm_nrpm.models.downloads import WAITS, hub_error, insist, is_lost_connection, may_pass, sha256_of
from timm_nrpm.models.format import TENSORS
from timm_nrpm.models.network import limit, patience

WITHOUT_NETWORK = "dry_run=True completes the folder without the network"
"""Advice on working offline: HF_HUB_OFFLINE does not help to send anything."""


@dataclass
class Push:
    """One push of a folder that is complete.

    Attributes:
        api: Client of the Hub.
        repo_id: The repository, `owner/name`.
        revision: The branch; None for `main`.
        folder: Folder that holds the files.
        sizes: Size in bytes of each file to send, by name.
        known: Names of files that belong to an earlier model, and go if none of that name is sent.
        token: An access token, or whether to use the one that is logged in.
    """

    api: HfApi
    repo_id: str
    revision: str | None
    folder: Path
    sizes: dict[str, int]
    known: tuple[str, ...]
    token: str | bool | None = field(repr=False)

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
        return changed, tuple(name for name in tree if name in self.known and name not in self.sizes)

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
