"""A collection on the Hub, to which a repository is added."""

from __future__ import annotations

import re
from functools import partial

from huggingface_hub import Collection

from timm_nrpm.hub.remote import Remote
from timm_nrpm.models.downloads import REPO_ID

SLUG = re.compile(rf"{REPO_ID.pattern}-[0-9a-f]{{24}}")
"""Pattern of the name of a collection in its address: `owner/title-` and 24 hexadecimal digits."""


def check_collection(collection: str | None) -> str | None:
    """Return the slug or the title of a collection, or raise a ValueError that says what is allowed."""
    if collection is None or SLUG.fullmatch(collection):
        return collection
    if not collection.strip() or REPO_ID.fullmatch(collection):
        raise ValueError(
            f"collection={collection!r} is not allowed: give the slug in the address of a collection, which ends in 24 "
            "hexadecimal digits, or the title of one of the owner's, which is made if there is none."
        )
    return collection


def existing(remote: Remote, collection: str | None) -> Collection | None:
    """The collection of a slug; None for a title or nothing.

    Raises:
        timm_nrpm.errors.HubError: There is no such collection, or the Hub does not answer.
    """
    if collection is None or not SLUG.fullmatch(collection):
        return None
    return remote.do(f"Looking at the collection {collection}", partial(remote.api.get_collection, collection))


def added(remote: Remote, collection: str, private: bool) -> str:
    """Add the repository to a collection, unless it is in it.

    Args:
        remote: The repository.
        collection: A slug; or the title of a collection of the repository's owner, which is made if there is none.
        private: Whether a collection that is made is private.

    Returns:
        Address of the collection.
    """
    found = existing(remote, collection)
    if found is None:
        owner = remote.repo_id.partition("/")[0]
        make = partial(remote.api.create_collection, collection, namespace=owner, private=private, exists_ok=True)
        found = remote.do(f"Making the collection {collection!r} of {owner}", make)
    if remote.repo_id not in {item.item_id for item in found.items}:
        add = partial(remote.api.add_collection_item, found.slug, remote.repo_id, "model", exists_ok=True)
        remote.do(f"Adding {remote.repo_id} to the collection {found.slug}", add)
    return f"{remote.api.endpoint}/collections/{found.slug}"
