"""Calls to the Hub that wait, try again and end in one clear error, and downloads that are verified.

The Hub's client gives up at once on some failures, and does not compare what it downloads with its hash.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    FileMetadataError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils.sha import git_hash

from timm_nrpm.errors import HubError, NotOnHub, Unreachable
from timm_nrpm.models.network import HTTP, OFFLINE, NoNetwork, network_error_of, patience, say

Result = TypeVar("Result")

WAITS = (1.0, 2.0, 4.0)
"""Seconds between attempts."""

PASSING = (408, 429, 500, 502, 503, 504)
"""HTTP status codes of failures that may pass, so that the call is tried again."""

REPO_ID = re.compile(r"\w[\w.-]{0,99}/\w[\w.-]{0,99}")
COMMIT = re.compile(r"[0-9a-f]{40}")


def is_lost_connection(error: BaseException) -> bool:
    """Whether a request failed before its answer was complete, so that its effect is unknown."""
    return isinstance(error, (HTTP.TransportError, HTTP.StreamError, ConnectionError, TimeoutError))


def is_garbled(error: BaseException) -> bool:
    """Whether the client failed on an answer that arrived damaged."""
    # The client has no error class for this: it raises a ValueError with these words.
    if isinstance(error, ValueError) and re.search("improperly formatted|[Mm]alformed response", str(error)):
        return True
    return isinstance(error, (LookupError, TypeError, AttributeError, json.JSONDecodeError))


def is_upload(error: BaseException) -> bool:
    """Whether the client failed to upload a large file; the reason is the error's `__cause__`."""
    return type(error) is RuntimeError and error.__cause__ is not None


def is_closed(error: BaseException) -> bool:
    """Whether another thread lost its connection and closed the client that all threads share."""
    # The HTTP library has no error class for this.
    return type(error) is RuntimeError and "client has been closed" in str(error)


def may_pass(error: BaseException) -> bool:
    """Whether the same call may succeed a moment later."""
    if isinstance(error, OfflineModeIsEnabled):
        return False  # it is a ConnectionError, but one that stays
    if is_upload(error) or is_closed(error):
        return True  # whatever the reason is: the address of an upload may arrive damaged, or expire
    if isinstance(error, HfHubHTTPError):
        return getattr(error.response, "status_code", None) in PASSING
    return is_lost_connection(error) or is_garbled(error)


def insist(what: str, call: Callable[[], Result], *, token: str | bool | None = None, offline: str = OFFLINE) -> Result:
    """Return what `call` returns, after up to four attempts while its failure may pass.

    Args:
        what: The action named in messages, such as "Downloading me/x".
        call: Function that talks to the Hub and can be repeated without harm.
        token: Token that is removed from messages, in case a server repeats it.
        offline: Advice on how to do without the network, which the message gives if there is none.

    Raises:
        NotOnHub: The Hub has no such repository, revision or file, or does not show it.
        Unreachable: The Hub does not answer, or not at the moment.
        HubError: The call failed for another reason.
    """
    for wait in (*WAITS, None):
        try:
            with patience():
                return call()
        except (HfHubHTTPError, EntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
            if wait is None or not may_pass(error):
                raise hub_error(what, error, token, offline) from None  # the client's text may be long and hold secrets
        except Exception as error:
            if not may_pass(error):
                raise
            if wait is None:
                raise hub_error(what, error, token, offline) from None
        say(f"{what} failed, and is tried again in {wait:g} s.")
        time.sleep(wait)
    raise AssertionError("unreachable")


def hub_error(what: str, error: BaseException, token: str | bool | None = None, offline: str = OFFLINE) -> HubError:
    """The HubError that describes a failure of the Hub's client in one line.

    Args:
        what, token, offline: The same as in :func:`insist`.
        error: The error that the client raised.
    """
    if is_upload(error) and error.__cause__ is not None:
        error = error.__cause__
    status = getattr(getattr(error, "response", None), "status_code", None)
    kind: type[HubError] = HubError
    if isinstance(error, GatedRepoError):
        kind, why = NotOnHub, "its owner grants access on request: accept the conditions on its page, and give a token"
    elif isinstance(error, RevisionNotFoundError):
        kind, why = NotOnHub, "there is no such revision: give a branch, a tag, a commit or refs/pr/1"
    elif isinstance(error, RepositoryNotFoundError):
        kind, why = NotOnHub, "there is no such repository, or it is private: give token=, or run `hf auth login`"
    elif isinstance(error, (LocalEntryNotFoundError, OfflineModeIsEnabled)):
        kind = Unreachable
        network = network_error_of(error)
        if isinstance(error, NoNetwork):
            why = f"{error}; check the network ({offline})"
        elif network is not None:
            why = f"{network}, and the cache does not hold it: connect to the network once ({offline})"
        elif isinstance(error.__cause__, FileMetadataError):
            why = "the server that HF_ENDPOINT names does not answer like the Hub"
        else:
            why = "the Hub cannot be reached, and the cache does not hold it: connect to the network once"
    elif isinstance(error, EntryNotFoundError):
        kind, why = NotOnHub, "there is no such file"
    elif status == 401:
        why = "the token is not valid: give another, or run `hf auth login`"
    elif status == 403:
        why = f"this token may not do that ({_server_message(error)}): give one that may write there"
    elif isinstance(error, HfHubHTTPError):
        why = f"the Hub answered {status} ({_server_message(error)})"
        if may_pass(error):
            kind, why = Unreachable, f"{why}: try again later"
    elif is_lost_connection(error) or is_closed(error):
        kind, why = Unreachable, f"the connection broke or no answer came ({type(error).__name__}): try again later"
    elif is_garbled(error):
        kind, why = Unreachable, "the Hub's answer arrived damaged: try again later"
    else:
        why = _server_message(error)
    text = f"{what} failed: {why}."
    for secret in (token if isinstance(token, str) else None, *re.findall(r"hf_\w{8,}", text)):
        text = text.replace(secret, "***") if secret else text
    return kind(text)


def _server_message(error: BaseException) -> str:
    """What the server answered, or else the error's own text, in one line of at most 200 characters."""
    text = str(getattr(error, "server_message", None) or error)
    text = re.sub(r"(https?://[^\s?'\"]*)\?[^\s'\"]*", r"\1", text)  # the query of a storage address grants access
    return " ".join(str(text).split())[:200].rstrip(". ") or type(error).__name__


@dataclass(frozen=True)
class Repository:
    """A repository on the Hub from which files are read.

    Args:
        repo_id: Id of the repository, `owner/name`.
        revision: Branch, tag, commit or `refs/pr/1`; the default is `main`.
        cache_dir: Folder for downloads; the default is the Hub's own cache.
        token: Token that can read the repository if it is private; the default is the one that is logged in.
        local_files_only: Whether to read only from the cache, without any request.

    Example:
        >>> path = Repository("timm/resnet18.a1_in1k").fetch("config.json", at_most=1 << 20)
    """

    repo_id: str
    revision: str | None = None
    cache_dir: str | Path | None = None
    token: str | bool | None = field(default=None, repr=False)
    local_files_only: bool = False

    def __str__(self) -> str:
        return f"{self.repo_id}@{self.revision}" if self.revision else self.repo_id

    def fetch(self, name: str, at_most: int | None = None) -> Path:
        """Path of a file in the cache, to which it is downloaded if it is not there.

        A cached file that is named by its hash is compared with that, and downloaded once more if it differs.

        Args:
            name: Path of the file in the repository.
            at_most: Largest size in bytes; a larger file is refused before it is downloaded. None allows any size.

        Raises:
            NotOnHub: The file is not in the repository.
            HubError: The file cannot be downloaded, or is too large.
        """
        local, size, unreachable = self.local_files_only or self._is_cached(name), None, None
        if at_most is not None and not local:
            try:
                size = self._size(name)
            except Unreachable as error:
                local, unreachable = True, error  # it may be in the cache
        self._check_size(name, size, at_most)
        try:
            path = self._get(name, local, False)
        except Unreachable as error:
            raise unreachable or error from None
        if not self.local_files_only and not is_intact(path):
            path = self._get(name, local, True)
            if not is_intact(path):
                raise Unreachable(f"{name} of {self} arrived damaged twice: try again later.")
        self._check_size(name, path.stat().st_size, at_most)
        return path

    def at(self, path: Path, name: str) -> Repository:
        """This repository at the commit that a file was fetched from, so that all further files are of that commit.

        Args:
            path: Path that :meth:`fetch` returned.
            name: Path of that file in the repository.
        """
        commit = path.parts[-1 - len(Path(name).parts)]
        return replace(self, revision=commit) if COMMIT.fullmatch(commit) else self

    def _get(self, name: str, local: bool, force: bool) -> Path:
        def download() -> str:
            try:
                return hf_hub_download(
                    self.repo_id,
                    name,
                    revision=self.revision,
                    cache_dir=self.cache_dir,
                    token=self.token,
                    local_files_only=local,
                    force_download=force,
                )
            except RuntimeError as error:
                if is_closed(error):
                    raise
                raise ConnectionError(str(error)) from error  # xet raises it for any failure
            except ValueError as error:
                if not force:
                    raise
                raise error.__cause__ or ConnectionError(str(error)) from None  # the client raises it for any failure

        return Path(self._do(f"Downloading {name} of {self}", download))

    def _is_cached(self, name: str) -> bool:
        """Whether the revision is a commit and its file is in the cache, so that no request is needed."""
        if not COMMIT.fullmatch(self.revision or ""):
            return False
        return isinstance(try_to_load_from_cache(self.repo_id, name, self.cache_dir, self.revision), str)

    def _size(self, name: str) -> int | None:
        url = hf_hub_url(self.repo_id, name, revision=self.revision)
        return self._do(f"Looking for {name} in {self}", lambda: get_hf_file_metadata(url, token=self.token)).size

    def _do(self, action: str, call: Callable[[], Result]) -> Result:
        return insist(action, call, token=self.token, offline=f"local_files_only=True, or {OFFLINE}")

    def _check_size(self, name: str, size: int | None, at_most: int | None) -> None:
        if at_most is not None and size is not None and size > at_most:
            raise HubError(f"{name} of {self} has {size} bytes, and a file of that kind has {at_most} at most.")


def is_intact(path: Path) -> bool:
    """Whether a file of the Hub's cache matches its name there, the hash of git or LFS; True if its name is no hash."""
    # Only one link is followed: its target may be a link to a shared file, which is named by another hash.
    expected = Path(os.readlink(path)).name if path.is_symlink() else ""
    if len(expected) == 64:
        return sha256_of(path) == expected
    if len(expected) == 40:
        return git_hash(path.read_bytes()) == expected
    return True


def sha256_of(file: Path) -> str:
    """SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
