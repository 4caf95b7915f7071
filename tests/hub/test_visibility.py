"""Who may see a repository, and the collection it is in: what is asked for is done, and said where it cannot be."""

from __future__ import annotations

import hub_worker
import pytest
from hub_server import Fault
from hub_worker import Failed

hub, repo, worker = (getattr(hub_worker, name) for name in ("hub", "repo", "worker"))
SLUG = "me/robust-0123456789abcdef01234567"


def asked(hub, start):
    return [(r.method, r.path.partition("?")[0]) for r in hub.requests[start:] if r.method not in ("GET", "HEAD")]


def test_private_unless_asked_otherwise(hub, worker, repo):
    worker.push(repo)
    assert hub.repo(repo).private
    worker.push(repo, "variant(0.9)")
    assert hub.repo(repo).private
    hub.repo(repo).private = False
    worker.push(repo)
    assert not hub.repo(repo).private


def test_a_private_repository_is_made_public_after_the_commit(hub, worker, repo):
    worker.push(repo)
    hub.repo(repo).gated = "manual"
    start = len(hub.requests)
    done = worker.push(repo, "variant(0.9)", visibility="public")
    assert not hub.repo(repo).private
    assert hub.repo(repo).gated == "manual"  # which is another setting
    assert done["notes"] == ["It was private, and is public now, with all its earlier commits."]
    steps = [path for _, path in asked(hub, start) if "/commit/" in path or "/settings" in path]
    assert steps == [f"/api/models/{repo}/commit/main", f"/api/models/{repo}/settings"]
    start = len(hub.requests)
    assert worker.push(repo, "variant(0.9)", visibility="public")["notes"] == []
    assert asked(hub, start) == []


def test_a_public_repository_becomes_private_before_the_commit_and_not_unasked(hub, worker, repo):
    worker.push(repo, visibility="public")
    start = len(hub.requests)
    with pytest.raises(
        Failed, match=r"would lose its readers, since it is public and would be private\. Nothing was sent"
    ):
        worker.push(repo, "variant(0.9)", visibility="private")
    assert asked(hub, start) == []
    done = worker.push(repo, "variant(0.9)", visibility="private", allow_removal=True)
    assert done["notes"] == ["It was public, and is private now."]
    assert hub.repo(repo).private
    steps = [path for _, path in asked(hub, start) if "/commit/" in path or "/settings" in path]
    assert steps == [f"/api/models/{repo}/settings", f"/api/models/{repo}/commit/main"]


def test_a_hub_that_does_not_do_it(hub, worker, repo):
    worker.push(repo)
    hub.lying_visibility = True
    left = r"one thing is left to do: .* is private, and was to be public: change it in its settings on the Hub"
    with pytest.raises(Failed, match=rf"^HubError: .* holds all of it, at commit \w+, and {left}"):
        worker.push(repo, "variant(0.9)", visibility="public")
    hub.lying_visibility = False
    done = worker.push(repo, "variant(0.9)", visibility="public")
    assert done["uploaded"] == []
    assert not hub.repo(repo).private


@pytest.mark.parametrize("kind", ["status", "reset"])
def test_making_it_public_fails_after_the_commit(hub, worker, repo, kind):
    worker.push(repo)
    hub.fault(fault := Fault(kind, "PUT", f"{repo}/settings", times=-1))
    left = rf"one thing is left to do: Making {repo} public failed"
    with pytest.raises(Failed, match=rf"^Unreachable: {repo} holds all of it, at commit \w+, and {left}"):
        worker.push(repo, "variant(0.9)", visibility="public")
    assert len(hub.repo(repo).commits()) == 3
    hub.faults.remove(fault)
    assert worker.push(repo, "variant(0.9)", visibility="public")["uploaded"] == []
    assert len(hub.repo(repo).commits()) == 3
    assert not hub.repo(repo).private


def test_a_collection_by_its_title_is_made_once(hub, worker, repo):
    title = f"Robust, {repo[-40:]}"
    done = worker.push(repo, collection=title)
    (slug,) = [slug for slug, each in hub.collections.items() if each.title == title]
    assert done["collection"] == f"{hub.url}/collections/{slug}"
    assert hub.collections[slug].private
    start = len(hub.requests)
    assert worker.push(repo, collection=title)["collection"] == done["collection"]
    assert asked(hub, start) == [("POST", "/api/collections")]  # which answers that it is there
    worker.push(f"{repo}-2", visibility="public", collection=slug)
    assert [item["id"] for item in hub.collections[slug].items] == [repo, f"{repo}-2"]
    assert f"In the collection {hub.url}/collections/{slug}" in worker(
        f"str(nrpm.push_to_hub(small, {repo!r}, collection={slug!r}))"
    )


def test_a_collection_of_a_public_repository_is_public(hub, worker, repo):
    worker.push(repo, visibility="public", collection="Seen by all")
    assert not next(each for each in hub.collections.values() if each.title == "Seen by all").private


def test_a_slug_that_is_wrong_is_noticed_before_anything_is_sent(hub, worker, repo):
    start = len(hub.requests)
    with pytest.raises(Failed, match=rf"^HubError: Looking at the collection {SLUG} failed: the Hub answered 404"):
        worker.push(repo, collection=SLUG)
    assert asked(hub, start) == []
    assert repo not in hub.repos


@pytest.mark.parametrize("given", ["", " ", "me/robust", "me/robust-0123"])
def test_what_is_neither_slug_nor_title(hub, worker, given):
    start = len(hub.requests)
    with pytest.raises(Failed, match=r"^ValueError: collection=.* is not allowed: give the slug in the address"):
        worker.push("me/x", collection=given)
    assert hub.requests[start:] == []


FAILING = {"make": "/api/collections$", "add": "/api/collections/.*/items"}


@pytest.mark.parametrize("kind", ["status", "reset", "lost"])
@pytest.mark.parametrize("step", FAILING)
def test_a_collection_that_fails_after_the_commit(hub, worker, repo, step, kind):
    title = f"{step} {kind}"
    hub.fault(fault := Fault(kind, "POST", FAILING[step], times=-1))
    with pytest.raises(
        Failed, match=rf"^Unreachable: {repo} holds all of it, at commit \w+, and one thing is left"
    ) as no:
        worker.push(repo, collection=title)
    done = {"make": "Making the collection ", "add": f"Adding {repo} to the collection "}[step]
    assert done in str(no.value)
    assert "The same call again does it, and sends nothing else." in str(no.value)
    assert len(hub.repo(repo).commits()) == 2
    hub.faults.remove(fault)
    again = worker.push(repo, collection=title)
    assert (again["uploaded"], len(hub.repo(repo).commits())) == ([], 2)
    (found,) = [each for each in hub.collections.values() if each.title == title]
    assert [item["id"] for item in found.items] == [repo]


@pytest.mark.parametrize("kind", ["status", "reset", "lost"])
def test_a_collection_that_fails_for_a_moment(hub, worker, repo, kind):
    title = f"moment {kind}"
    for path in FAILING.values():
        hub.fault(Fault(kind, "POST", path, times=1))
    worker.push(repo, collection=title)
    (found,) = [each for each in hub.collections.values() if each.title == title]
    assert [item["id"] for item in found.items] == [repo]


def test_a_collection_of_somebody_else(hub, worker, repo):
    with hub.lock:
        made = type(next(iter(hub.collections.values())))("you/theirs-" + "0" * 24, "theirs", "you", False)
        hub.collections[made.slug] = made
    with pytest.raises(Failed, match=r"^HubError: .* holds all of it.*this token may not do that"):
        worker.push(repo, collection=made.slug)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("visibility='secret'", "visibility='secret' is not known: choose one of public, private"),
        ("tags='digits'", "tags='digits' is not allowed: give a list of names"),
        ("datasets='me/digits'", "datasets='me/digits' is not allowed: give a list of names"),
        ("tags=['a\\nb']", "is not allowed: give a list of names, each one line of text"),
    ],
)
def test_refused_before_any_request(hub, worker, arguments, message):
    start = len(hub.requests)
    with pytest.raises(Failed, match=f"^ValueError: .*{message}"):
        worker(f"push(small, 'me/x', {arguments})")
    assert hub.requests[start:] == []
