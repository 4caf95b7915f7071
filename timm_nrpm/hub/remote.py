"""A repository on the Hub that is written to: requests that are repeated while their failure may pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from huggingface_hub import HfApi

from timm_nrpm.errors import HubError, Unreachable
from timm_nrpm.models.downloads import insist
from timm_nrpm.models.network import limit

WITHOUT_NETWORK = "dry_run=True completes the folder without the network"
"""Advice on working offline: HF_HUB_OFFLINE does not help to send anything."""

Result = TypeVar("Result")


@dataclass
class Remote:
    """A repository that is written to.

    Attributes:
        api: Client of the Hub.
        repo_id: The repository, `owner/name`.
        token: An access token, or whether to use the one that is logged in.
    """

    api: HfApi
    repo_id: str
    token: str | bool | None = field(repr=False)

    @property
    def url(self) -> str:
        """Address of the repository's page."""
        return f"{self.api.endpoint}/{self.repo_id}"

    def info(self, revision: str | None = None) -> Any:
        """What the Hub says of the repository at a revision; None is `main`."""
        try:
            ask = partial(self.api.model_info, revision=revision, timeout=limit())  # the default is no limit
            return self.do(f"Looking at {self.repo_id}", lambda: ask(self.repo_id))
        except Unreachable as error:
            raise Unreachable(f"{error} If something was sent, pushing again sends what is missing.") from None

    def do(self, action: str, call: Callable[[], Result]) -> Result:
        """Return what `call` returns; `action` names it in messages."""
        return insist(action, call, token=self.token, offline=WITHOUT_NETWORK)

    @contextmanager
    def after(self, commit: str) -> Iterator[None]:
        """Let a failure inside say that the commit was made before it, and that a second call does the rest."""
        try:
            yield
        except HubError as error:
            raise type(error)(
                f"{self.repo_id} holds all of it, at commit {commit[:12]}, and one thing is left to do: {error} "
                "The same call again does it, and sends nothing else."
            ) from None
