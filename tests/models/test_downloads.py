"""What goes wrong on the way: every request of a push and of a pull fails in every way, for a moment and for good."""

from __future__ import annotations

import hashlib
import re
import sys
import time
from pathlib import Path

import hub_worker
import pytest
from hub_server import Fault, git_oid
from hub_worker import OURS, TOKEN, Failed, Worker
from huggingface_hub import errors

from timm_nrpm.errors import HubError, NotOnHub, Unreachable
from timm_nrpm.models import downloads as transfers
from timm_nrpm.models.downloads import hub_error, insist, is_intact

http = sys.modules.get("httpx2") or sys.modules["httpx"]  # whichever the Hub's client uses
hub, repo, small = (getattr(hub_worker, name) for name in ("hub", "repo", "small"))
FILES = OURS - {"lambdas.png"}

PUSH = {  # the requests of a push, in their order
    "look": ("GET", "/api/models/{repo}$"),
    "make": ("POST", "/api/repos/create"),
    "branch": ("POST", "/api/models/{repo}/branch/work"),
    "ask for the card": ("HEAD", "/{repo}/resolve/.*README.md"),
    "get the card": ("GET", "/{repo}/resolve/.*README.md"),
    "look at the branch": ("GET", "/api/models/{repo}/revision/work"),
    "list": ("GET", "/api/models/{repo}/tree/"),
    "check the card": ("POST", "/api/validate-yaml"),
    "announce": ("POST", "/api/models/{repo}/preupload/"),
    "announce large": ("POST", "/{repo}.git/info/lfs/objects/batch"),
    "upload": ("PUT", "/lfs/{sha1}/"),
    "verify": ("POST", "/{repo}.git/info/lfs/objects/verify"),
    "commit": ("POST", "/api/models/{repo}/commit/"),
    "list pull requests": ("GET", "/api/models/{repo}/refs"),
    "propose": ("POST", "/api/models/{repo}/commit/"),
}
PULL = {
    f"{word} {name}": (method, f"/{{repo}}/resolve/.*/{name}|/lfs/{{sha1}}/.*name={name}&")
    for name in ("nrpm_config.json", "nrpm.safetensors", "model.safetensors")
    for word, method in (("ask for", "HEAD"), ("get", "GET"))
}
BODILESS = ("branch", "upload", *(step for step in (*PUSH, *PULL) if step.startswith("ask for")))
OPTIONS = {"branch": {"revision": "work"}, "look at the branch": {"revision": "work"}}
OPTIONS |= {step: {"pull_request": True} for step in ("propose", "list pull requests")}
KINDS = {"status": 2, "reset": 1, "lost": 1, "stall": 1, "cut": 1, "flip": 1}
ONCE = [
    (kind, step) for kind in KINDS for step in (*PUSH, *PULL) if kind not in ("cut", "flip") or step not in BODILESS
]
ONCE += [("lost-stall", step) for step in ("upload", "commit", "propose")]
ALWAYS = [(kind, step) for kind, step in ONCE if kind in ("status", "reset", "cut", "flip")]
MESSAGE = "Publish a reprogrammed model"
WAITS = ("reset", "lost", "stall", "lost-stall")
"""Kinds of faults after which a push or a pull waits until it tries again."""


def cases(chosen, waits):
    """Parameters of a test; faults that are waited for are slow."""
    return [pytest.param(*case, marks=[pytest.mark.slow] * (case[0] in waits)) for case in chosen]


@pytest.fixture(scope="module")
def worker(hub, tmp_path_factory):
    """One that has no Matplotlib, which takes longer to draw the picture than all else."""
    worker = Worker(hub, tmp_path_factory.mktemp("work"), WITHOUT="matplotlib")
    yield worker
    worker.kill()


def set_out(hub, worker, kind, step, times):
    """A push to a new repository, or a pull, that meets a fault: the repository, and what comes of it."""
    repo = "me/" + re.sub(r"\W", "-", f"{kind} {step} {'always' if times < 0 else 'once'}")
    if step in PULL:
        source = hub.repo("me/source")
        files, large = source.files(), [name for name, blob in source.commits()[0].files.items() if blob.lfs]
        hub.create(repo).commit(files, lfs=large)
    elif step.endswith("the card"):
        hub.create(repo).commit({"README.md": b"---\nlicense: mit\n---\nMine.\n"})
    method, path = {**PUSH, **PULL}[step]
    where = path.replace("{repo}", re.escape(repo)).replace("{sha1}", hashlib.sha1(repo.encode()).hexdigest())
    hub.fault(fault := Fault(kind, method, where, times))
    copy = str(worker.folder / repo[3:])
    pull = f"[nrpm.pull({repo!r}, {copy!r}, cache_dir=fresh()), load({copy!r})][1]"
    push = f"push('whole', {repo!r}, visibility='public', **{OPTIONS.get(step, {})})"
    asked = worker.start(pull if step in PULL else push)
    if where == path:  # which names no repository, so that the fault would hit others
        asked.exception(timeout=100)
        hub.faults.remove(fault)
    return repo, asked


@pytest.fixture(scope="module")
def outcomes(hub, worker, request):
    """Of all cases that this run asks for, which take their time side by side."""
    worker.push("me/source", full=True, visibility="public")
    asked = {-1: set(), 1: set()}
    for item in request.session.items:
        for times, test in ((-1, test_what_fails_for_good_is_told), (1, test_what_fails_for_a_moment_succeeds)):
            if item.function is test:
                asked[times].add((item.callspec.params["kind"], item.callspec.params["step"]))
    chosen = [(*case, -1) for case in ALWAYS if case in asked[-1]]
    chosen += [(*case, KINDS.get(case[0], 1)) for case in ONCE if case in asked[1]]
    chosen.sort(key=lambda case: case[1] not in ("make", "check the card"))
    return {(kind, step, times < 0): set_out(hub, worker, kind, step, times) for kind, step, times in chosen}


def pushed(hub, repo, branch="main"):
    """How many commits of ours a branch has."""
    return [commit.title for commit in hub.repo(repo).commits(branch)].count(MESSAGE) if repo in hub.repos else 0


@pytest.mark.parametrize(("kind", "step"), cases(ONCE, WAITS))
def test_what_fails_for_a_moment_succeeds(hub, worker, outcomes, small, kind, step):
    repo, asked = outcomes[kind, step, False]
    if step == "propose" and kind in (
        "reset",
        "stall",
    ):  # nobody knows whether it comes through: another could be a second
        with pytest.raises(Failed, match=r"it may be open all the same: look at .*/discussions before you push again"):
            asked.result(timeout=150)
        assert hub.repo(repo).pull_requests == []
        return
    done = asked.result(timeout=150)
    if step in PULL:
        assert done == small
        return
    options = OPTIONS.get(step, {})
    branch = options.get("revision") or ("refs/pr/1" if "pull_request" in options else "main")
    assert pushed(hub, repo, branch) == 1
    assert pushed(hub, repo) == (branch == "main")
    assert hub.repo(repo).pull_requests == ["refs/pr/1"] * (branch == "refs/pr/1")
    assert done["commit"] == hub.repo(repo).commits(branch)[0].oid
    assert (done["pull_request"] or "").rpartition("/")[2] == ("1" if branch == "refs/pr/1" else "")
    assert worker.load(repo, revision=branch) == small


def test_the_folder_is_whole_before_the_first_request(hub, worker, small, repo, tmp_path):
    hub.fault(Fault("reset", "*", repo, times=-1))
    with pytest.raises(Failed, match=r"^Unreachable: "):
        worker.push(repo, folder=str(tmp_path / "v"))
    assert {file.name for file in (tmp_path / "v").iterdir()} == FILES
    assert worker.load(str(tmp_path / "v")) == small


def test_somebody_else_commits_meanwhile(hub, worker, repo):
    worker.push(repo)
    hub.fault(Fault("stall", "POST", f"{repo}/preupload/", seconds=1))
    asked = worker.start(f"push(variant(0.9), {repo!r})")
    until(lambda: any(r.status == 0 and f"{repo}/preupload/" in r.path for r in hub.requests))
    hub.repo(repo).commit({"theirs.txt": b"theirs"})
    with pytest.raises(Failed, match=r"^HubError: Somebody else committed to .* at the same time: push again"):
        asked.result(timeout=60)
    assert pushed(hub, repo) == 1
    worker.push(repo, "variant(0.9)")
    assert pushed(hub, repo) == 2
    assert hub.repo(repo).files()["theirs.txt"] == b"theirs"


def test_a_pull_that_fails_leaves_what_was_there(hub, worker, small, repo, tmp_path):
    pull = f"str(nrpm.pull({repo!r}, {str(tmp_path / 'v')!r}, cache_dir=fresh()))"
    worker.push(repo, full=True)
    worker(pull)
    old = {file.name: file.read_bytes() for file in (tmp_path / "v").iterdir()}
    worker.push(repo, "variant(0.9)", full=False, allow_removal=True)
    hub.fault(fault := Fault("flip", "GET", f"/lfs/{hashlib.sha1(repo.encode()).hexdigest()}/", times=-1))
    with pytest.raises(Failed, match=r"^(Unreachable|BrokenVariant): nrpm.safetensors of"):
        worker(pull)
    assert {file.name: file.read_bytes() for file in (tmp_path / "v").iterdir()} == old
    hub.faults.remove(fault)
    worker(pull)
    assert worker.load(str(tmp_path / "v")) == worker("seen(variant(0.9))")
    assert {file.name for file in (tmp_path / "v").iterdir()} == FILES


def until(true):
    for _ in range(2400):
        if true():
            return
        time.sleep(0.05)
    raise AssertionError("it did not happen within two minutes")


def test_killed_while_uploading(hub, worker, small, repo, tmp_path):
    mortal = Worker(hub, tmp_path / "mortal", WITHOUT="matplotlib")
    mortal("1")  # it has started, which takes a while beside the others
    weights = hashlib.sha256((worker.folder / "whole" / "model.safetensors").read_bytes()).hexdigest()
    place = f"/lfs/{hashlib.sha1(repo.encode()).hexdigest()}/"  # others upload the same weights meanwhile
    push, start = f"push('whole', {repo!r})", len(hub.requests)
    hub.fault(fault := Fault("stall", "PUT", place + weights, times=-1))  # also when it is tried again before the kill
    mortal.start(push)
    until(lambda: len(hub.repos[repo].objects) == 1 if repo in hub.repos else False)
    until(lambda: any(r.status == 0 and place + weights in r.path for r in hub.requests[start:]))
    mortal.kill()
    hub.faults.remove(fault)
    assert pushed(hub, repo) == 0
    start = len(hub.requests)
    worker(push)
    assert [weights in r.path for r in hub.requests[start:] if r.method == "PUT" and place in r.path] == [True]
    assert pushed(hub, repo) == 1
    assert worker.load(repo) == small


def test_killed_while_pulling(hub, worker, small, repo, tmp_path):
    mortal = Worker(hub, tmp_path / "mortal", WITHOUT="matplotlib")
    mortal("1")  # it has started, which takes a while beside the others
    worker.push(repo, full=True)
    pull, start = f"str(nrpm.pull({repo!r}, {str(tmp_path / 'copies' / 'v')!r}, cache_dir='cache'))", len(hub.requests)
    place = f"/lfs/{hashlib.sha1(repo.encode()).hexdigest()}/"
    hub.fault(fault := Fault("stall", "GET", f"{place}.*name=model.safetensors", times=-1))
    mortal.start(pull)
    until(lambda: any(r.status == 0 and re.search(fault.path, r.path) for r in hub.requests[start:]))
    mortal.kill()
    hub.faults.remove(fault)
    assert not (tmp_path / "copies" / "v").exists()
    worker(pull)
    assert [file.name for file in (tmp_path / "copies").iterdir()] == ["v"]
    assert worker.load(str(tmp_path / "copies" / "v")) == small


def answered(status, kind=errors.HfHubHTTPError, message="it says"):
    return kind(message, response=http.Response(status, request=http.Request("GET", "http://127.0.0.1/x")))


TOLD = {
    "gated": (answered(403, errors.GatedRepoError), NotOnHub, "its owner grants access on request"),
    "no revision": (answered(404, errors.RevisionNotFoundError), NotOnHub, "there is no such revision"),
    "no repository": (answered(404, errors.RepositoryNotFoundError), NotOnHub, "there is no such repository, or it is"),
    "no file": (answered(404, errors.RemoteEntryNotFoundError), NotOnHub, "there is no such file"),
    "not in the cache": (errors.LocalEntryNotFoundError("x"), Unreachable, "the cache does not hold it"),
    "offline": (errors.OfflineModeIsEnabled("x"), Unreachable, "the cache does not hold it"),
    "wrong token": (answered(401), HubError, "the token is not valid"),
    "weak token": (answered(403), HubError, r"this token may not do that \(it says\)"),
    "another status": (answered(418), HubError, r"the Hub answered 418 \(it says\)\.$"),
    "too many": (answered(429), Unreachable, r"the Hub answered 429 \(it says\): try again later"),
    "unwell": (answered(503), Unreachable, r"the Hub answered 503 \(it says\): try again later"),
    "broken off": (http.ReadError("x"), Unreachable, r"the connection broke or no answer came \(ReadError\)"),
    "silent": (http.ReadTimeout("x"), Unreachable, r"the connection broke or no answer came \(ReadTimeout\)"),
    "reset": (ConnectionResetError(), Unreachable, r"the connection broke .* \(ConnectionResetError\)"),
    "garbled": (KeyError("sha"), Unreachable, "the Hub's answer arrived damaged"),
    "malformed": (ValueError("preupload_info is improperly formatted"), Unreachable, "Hub's answer arrived damaged"),
    "full disk": (OSError(28, "No space left on device"), HubError, r"failed: \[Errno 28\] No space left on device\.$"),
}


@pytest.mark.parametrize(("error", "kind", "message"), TOLD.values(), ids=TOLD)
def test_each_error_is_told_in_one_line(error, kind, message):
    found = hub_error("Sending it", error)
    assert type(found) is kind
    assert re.match(
        f"Sending it failed: .*{message}" if "failed" not in message else f"Sending it {message}", str(found)
    )
    assert "\n" not in str(found)


def test_secrets_are_cut_out():
    for secret, token in (
        ("my-own-secret", "my-own-secret"),
        ("hf_abcdefgh12345678", None),
        ("hf_abcdefgh12345678", True),
    ):
        found = str(hub_error(f"Sending {secret}", answered(500, message=f"no {secret} here\nand {secret}"), token))
        assert secret not in found
        assert found.count("***") == 3
    assert len(str(hub_error("Sending it", answered(500, message="x" * 10_000)))) < 400


CALLS = {  # and how often they are made
    "status 503": (answered(503), 4),
    "status 429": (answered(429), 4),
    "status 403": (answered(403), 1),
    "no repository": (answered(404, errors.RepositoryNotFoundError), 1),
    "broken off": (http.RemoteProtocolError("x"), 4),
    "garbled": (AttributeError("x"), 4),
    "offline": (errors.OfflineModeIsEnabled("x"), 1),
    "not in the cache": (errors.LocalEntryNotFoundError("x"), 1),
    "full disk": (OSError(28, "No space left on device"), 1),
}


@pytest.mark.parametrize(("error", "expected"), CALLS.values(), ids=CALLS)
def test_only_what_may_pass_is_tried_again(monkeypatch, error, expected):
    monkeypatch.setattr(transfers, "WAITS", (0.0, 0.0, 0.0))
    calls = []

    def call(succeeds=False):
        calls.append(1)
        if succeeds and len(calls) == 4:
            return "done"
        raise error

    with pytest.raises(HubError):
        insist("It", call)
    assert len(calls) == expected
    calls.clear()
    if expected > 1:
        assert insist("It", lambda: call(True)) == "done"


def test_nobody_listens(worker):
    for _ in range(2):
        with pytest.raises(
            Failed, match=r"^Unreachable: Asking failed: 127.0.0.1 cannot be reached: Connection refused;"
        ):
            worker("transfers.insist('Asking', lambda: publishing.HfApi('http://127.0.0.1:9').model_info('me/x'))")


def test_a_second_try_is_announced(monkeypatch, caplog):
    caplog.set_level("INFO", "timm_nrpm")
    monkeypatch.setattr(transfers, "WAITS", (0.0,))
    with pytest.raises(HubError):
        insist("Sending it", lambda: (_ for _ in ()).throw(answered(503)))
    assert [r.getMessage() for r in caplog.records] == ["Sending it failed, and is tried again in 0 s."]


def test_what_is_no_failure_of_the_hub_is_passed_on():
    for error in (ValueError("x"), KeyboardInterrupt()):
        with pytest.raises(type(error)):
            insist("It", lambda error=error: (_ for _ in ()).throw(error))


def test_what_the_cache_holds_is_what_its_name_says(tmp_path):
    for name in (hashlib.sha256(b"content").hexdigest(), git_oid(b"content")):
        blob, link = tmp_path / name, tmp_path / f"{name[:4]}.json"
        blob.write_bytes(b"content")
        link.symlink_to(blob)
        assert is_intact(link)
        blob.write_bytes(b"contend")
        assert not is_intact(link)
    Path(tmp_path / "other").write_bytes(b"content")
    assert is_intact(tmp_path / "other")
    shared, link = tmp_path / ("a" * 64), tmp_path / "shared.json"  # as xet keeps it, under a hash of another kind
    shared.write_bytes(b"content")
    blob = tmp_path / "blobs" / hashlib.sha256(b"content").hexdigest()
    blob.parent.mkdir()
    blob.symlink_to(shared)
    link.symlink_to(blob)
    assert is_intact(link)
    shared.write_bytes(b"contend")
    assert not is_intact(link)


@pytest.mark.parametrize(("kind", "step"), cases(ALWAYS, KINDS))
def test_what_fails_for_good_is_told(hub, worker, outcomes, small, kind, step):
    repo, asked = outcomes[kind, step, True]
    error = asked.exception(timeout=150)
    if error is None:  # what was damaged, or did not arrive, did not matter
        assert kind in ("cut", "flip")
        assert step in PUSH
        assert sum(pushed(hub, repo, ref) for ref in hub.repo(repo).refs if "work" not in ref) <= 1
        return
    assert re.match(r"(HubError|NotOnHub|Unreachable|BrokenVariant): .{20,500}$", str(error))
    assert "During handling" not in error.trace
    if step in PULL:
        assert not (worker.folder / repo[3:]).exists()
    elif (kind, step) not in (("cut", "propose"), ("flip", "propose")):
        assert not any(pushed(hub, repo, ref) for ref in (hub.repo(repo).refs if repo in hub.repos else ()))


def test_the_process_is_well_afterwards(outcomes, worker, small, repo):
    for _, asked in outcomes.values():
        asked.exception(timeout=150)
    worker.push(repo)
    assert worker.load(repo) == small
    assert worker("[network._patient, not list(Path('.').glob('.draft-*'))]") == [[], True]


def test_the_token_stays_where_it_belongs(hub, worker, repo):
    worker("logging.basicConfig(level=logging.DEBUG, force=True)")
    worker(f"push(small, {repo!r}, token={TOKEN!r})")
    worker(f"load({repo!r}, token={TOKEN!r}, cache_dir=None)")
    for method, name in (("POST", "preupload"), ("GET", "resolve")):
        hub.fault(Fault("status", method, f"{repo}/{name}", status=403, times=9))
        call = "push(variant(0.9), {0!r}, token={1!r})" if method == "POST" else "load({0!r}, token={1!r})"
        with pytest.raises(Failed, match=r"^HubError: .*this token may not do that"):
            worker(call.format(repo, TOKEN))
    worker("logging.disable()")
    assert "HTTP Request: PUT" in (worker.folder / "log").read_text()
    files = [file for file in worker.folder.rglob("*") if file.is_file()]
    assert {"model.safetensors", "README.md", "log"} <= {file.name for file in files}
    assert [file for file in files if TOKEN.encode() in file.read_bytes()] == []
    assert not any(TOKEN in answer for answer in worker.said)
    stored = [request for request in hub.requests if request.path.startswith("/lfs/")]
    assert {"GET", "PUT"} <= {request.method for request in stored}
    assert not any(request.authorized for request in stored)
