"""One push to the Hub: what differs is sent in exactly one commit, even if requests have to be repeated."""

from __future__ import annotations

import time
from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.hf_api import RepoFile, RepoFolder  # version 1.0 has them here alone
from huggingface_hub.utils.sha import git_hash

from timm_nrpm.errors import HubError, NotOnHub, Unreachable
from timm_nrpm.hub.cards import PICTURE
from timm_nrpm.hub.published import Published
from timm_nrpm.hub.remote import Remote
from timm_nrpm.hub.templates import CARD
from timm_nrpm.models.downloads import WAITS, hub_error, is_lost_connection, may_pass, sha256_of
from timm_nrpm.models.format import TENSORS
from timm_nrpm.models.network import patience


@dataclass
class Push(Remote):
    """One push of a folder that is complete.

    Attributes:
        revision: The branch; None for `main`.
        folder: Folder that holds the files.
        sizes: Size in bytes of each file to send, by name.
        owned: Names of files that belong to an earlier model, and go if none of that name is sent.
        is_new: Whether the branch does not exist yet.
    """

    revision: str | None
    folder: Path
    sizes: dict[str, int] = field(default_factory=dict)
    owned: Set[str] = frozenset()
    is_new: bool = False

    def head(self) -> str:
        """The latest commit of the branch; that of `main` for a branch that does not exist yet."""
        try:
            return str(self.info(self.revision).sha)
        except NotOnHub:
            if self.revision is None or self.revision.startswith("refs/"):
                raise
            self.is_new = True
            return str(self.info().sha)

    def tree(self, revision: str | None) -> dict[str, RepoFile | RepoFolder]:
        """The files and folders at the top of the repository, by name."""
        listing = partial(self.api.list_repo_tree, self.repo_id, revision=revision, recursive=False)
        return {item.path: item for item in self.do(f"Listing {self.repo_id}", lambda: list(listing()))}

    def difference(self, tree: Mapping[str, RepoFile | RepoFolder]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Names of the files that the Hub lacks or has differently, and of those that it has and this model lacks."""
        same = {name for name in self.sizes if name in tree and _is_same(self.folder / name, tree[name])}
        if TENSORS in same and PICTURE in tree:
            same.add(PICTURE)  # another version of Matplotlib draws the same lambdas with other bytes
        changed = tuple(name for name in self.sizes if name not in same)
        return changed, tuple(name for name in tree if name in self.owned and name not in self.sizes)

    def commit(
        self, parent: str, changed: tuple[str, ...], stale: tuple[str, ...], message: str, pull_request: bool
    ) -> Published:
        """Commit the files that differ, if any do, and make the branch if it does not exist.

        Args:
            parent: The commit that the new one continues, whose card it continues too. The Hub refuses the commit if
                the branch is no longer there.
            changed, stale: Names of the files to send and to delete, see :meth:`difference`.
            message: Title of the commit.
            pull_request: Whether to open a pull request.
        """
        if self.is_new:
            branch = partial(self.api.create_branch, branch=str(self.revision), revision=parent, exist_ok=True)
            self.do(f"Creating the branch {self.revision} of {self.repo_id}", lambda: branch(self.repo_id))
        if not changed and not stale:
            return Published(self.repo_id, parent, f"{self.url}/tree/{parent}", self.sizes)
        operations: list[Any] = [CommitOperationAdd(name, str(self.folder / name)) for name in changed]
        operations += [CommitOperationDelete(name) for name in stale]
        action = f"Sending {', '.join(changed) or 'the commit'} to {self.repo_id}"
        commit, address = self._send(action, operations, parent, message, pull_request)
        return Published(self.repo_id, commit, f"{self.url}/tree/{commit}", self.sizes, changed, stale, address)

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
            f"{self.url}/discussions before you push again."
        )

    def _landed(self, parent: str, before: set[str], pull_request: bool) -> tuple[str, str | None] | None:
        """The commit and the address of the pull request, if they arrived although no reply said so; else None."""
        if pull_request:
            for name in sorted(self._pull_requests() - before):
                if self.difference(self.tree(name)) == ((), ()):
                    number = name.rpartition("/")[2]
                    return str(self.info(name).sha), f"{self.url}/discussions/{number}"
            return None
        head = self.head()
        return (head, None) if head != parent and self.difference(self.tree(self.revision)) == ((), ()) else None

    def _pull_requests(self) -> set[str]:
        ask = partial(self.api.list_repo_refs, self.repo_id, include_pull_requests=True)
        refs = self.do(f"Listing {self.repo_id}", ask)
        return {ref.ref for ref in refs.pull_requests or ()}


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
