"""Who may see a repository: it is made, looked at, and changed where that is asked for."""

from __future__ import annotations

from functools import partial

from timm_nrpm.errors import HubError, NotOnHub
from timm_nrpm.hub.remote import Remote

PUBLIC, PRIVATE = VISIBILITIES = ("public", "private")
"""Who may read a repository: everybody; or its owner, and an organization's members."""

SHOWN = "It was private, and is public now, with all its earlier commits."
HIDDEN = "It was public, and is private now."


def found_or_made(remote: Remote, visibility: str | None) -> str:
    """The visibility of a repository, which is made if it does not exist.

    Args:
        remote: The repository.
        visibility: That of a new one, one of VISIBILITIES; None for a private one.

    Raises:
        timm_nrpm.errors.HubError: The Hub made a repository that others see, though it was to be private.
    """
    try:
        return _of(remote)
    except NotOnHub:
        wanted = visibility or PRIVATE
    make = partial(remote.api.create_repo, remote.repo_id, private=wanted == PRIVATE, exist_ok=True)
    remote.do(f"Creating {remote.repo_id}", make)
    return _checked(remote, wanted, "nothing was sent")


def change(remote: Remote, visibility: str) -> None:
    """Change who may see a repository, and check that the Hub did so."""
    action = f"Making {remote.repo_id} {visibility}"
    # Version 1 of the client knows no `visibility`.
    update = partial(remote.api.update_repo_settings, remote.repo_id, private=visibility == PRIVATE)
    remote.do(action, update)
    _checked(remote, visibility, "change it in its settings on the Hub")


def _of(remote: Remote) -> str:
    return PRIVATE if remote.info().private else PUBLIC


def _checked(remote: Remote, wanted: str, otherwise: str) -> str:
    """The visibility of a repository, which has to be the one that was asked for."""
    found = _of(remote)
    if found != wanted:
        raise HubError(f"{remote.repo_id} is {found}, and was to be {wanted}: {otherwise}.")
    return found
