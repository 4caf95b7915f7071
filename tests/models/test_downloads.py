"""What goes wrong on the way: every request of a push and of a pull fails in every way, for a moment and for good."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import re
import socket
import ssl
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import hub_worker
import pytest
import timm
from hub_cache import hub_cache
from hub_server import Fault, git_oid
from hub_worker import OURS, TOKEN, Failed, Worker
from huggingface_hub import errors, get_session

from timm_nrpm.errors import HubError, NotOnHub, Unreachable
from timm_nrpm.models import downloads as transfers
from timm_nrpm.models import network
from timm_nrpm.models.downloads import hub_error, insist, is_intact
from timm_nrpm.models.network import patience

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
    push = f"push('whole', {repo!r}, private=False, **{OPTIONS.get(step, {})})"
    asked = worker.start(pull if step in PULL else push)
    if where == path:  # which names no repository, so that the fault would hit others
        asked.exception(timeout=100)
        hub.faults.remove(fault)
    return repo, asked


@pytest.fixture(scope="module")
def outcomes(hub, worker):
    """Of all cases, which take their time side by side."""
    worker.push("me/source", full=True, private=False)
    cases = [(*case, -1) for case in ALWAYS] + [(*case, KINDS.get(case[0], 1)) for case in ONCE]
    cases.sort(key=lambda case: case[1] not in ("make", "check the card"))
    return {(kind, step, times < 0): set_out(hub, worker, kind, step, times) for kind, step, times in cases}


def pushed(hub, repo, branch="main"):
    """How many commits of ours a branch has."""
    return [commit.title for commit in hub.repo(repo).commits(branch)].count(MESSAGE) if repo in hub.repos else 0


@pytest.mark.parametrize(("kind", "step"), ONCE)
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
    worker.push(repo, "variant(0.9)", full=False)
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
    push, start = f"push('whole', {repo!r})", len(hub.requests)
    hub.fault(Fault("stall", "PUT", weights))
    mortal.start(push)
    until(lambda: len(hub.repos[repo].objects) == 1 if repo in hub.repos else False)
    until(lambda: any(r.status == 0 and weights in r.path for r in hub.requests[start:]))
    mortal.kill()
    assert pushed(hub, repo) == 0
    start = len(hub.requests)
    worker(push)
    assert [weights in r.path for r in hub.requests[start:] if r.method == "PUT"] == [True]
    assert pushed(hub, repo) == 1
    assert worker.load(repo) == small


def test_killed_while_pulling(hub, worker, small, repo, tmp_path):
    mortal = Worker(hub, tmp_path / "mortal", WITHOUT="matplotlib")
    mortal("1")  # it has started, which takes a while beside the others
    worker.push(repo, full=True)
    pull, start = f"str(nrpm.pull({repo!r}, {str(tmp_path / 'copies' / 'v')!r}, cache_dir='cache'))", len(hub.requests)
    hub.fault(Fault("stall", "GET", f"/lfs/{hashlib.sha1(repo.encode()).hexdigest()}/.*name=model.safetensors"))
    mortal.start(pull)
    until(lambda: any(r.status == 0 and "name=model" in r.path for r in hub.requests[start:]))
    mortal.kill()
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


WITHOUT_NETWORK = """
import json, sys, time, traceback
waited = []
time.sleep = waited.append
import timm_nrpm

def outcome(call):
    try:
        return type(call()).__name__, "", 0
    except Exception as error:
        return type(error).__name__, str(error), len(traceback.format_exc().splitlines())

small = timm_nrpm.create_model("resnet8_digits", pretrained=True, lam=0.5)
calls = {
    "weights": lambda: timm_nrpm.create_model("resnet10t", pretrained=True),
    "weights in a repository": lambda: timm_nrpm.create_model("hf-hub:me/base", pretrained=True),
    "weights at an address": lambda: timm_nrpm.create_model(
        "resnet10t", pretrained=True, pretrained_cfg_overlay={"hf_hub_id": None, "url": sys.argv[1] + "/weights.pth"}
    ),
    "a base": lambda: timm_nrpm.base.Base("resnet10t", "resnet10t.c3_in1k", "0" * 64, hub_id="timm/resnet10t").build(),
    "a variant": lambda: timm_nrpm.from_pretrained("me/x"),
    "inspect": lambda: timm_nrpm.inspect("me/x"),
    "pull": lambda: timm_nrpm.pull("me/x", "pulled"),
    "list": lambda: timm_nrpm.list_variants("me"),
    "push": lambda: timm_nrpm.push_to_hub(small, "me/x", token="hf_none"),
}
found = {name: outcome(call) for name, call in calls.items()}
print(json.dumps([found, waited]))
"""


def without_network(endpoint, home, program=WITHOUT_NETWORK):
    ours = {
        "HF_ENDPOINT": endpoint,
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(home),
        "NO_PROXY": "*",
        "TORCH_HOME": str(home),
    }
    command = [sys.executable, "-c", program, endpoint]
    done = subprocess.run(command, env={**os.environ, **ours}, capture_output=True, text=True, check=True, cwd=home)
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:9", "http://no.such.host.invalid"])
def test_without_network_it_is_said_at_once_and_in_short(tmp_path, endpoint):
    (found, waited), said = without_network(endpoint, tmp_path)
    assert waited == []
    assert said == ""
    unavailable = ["weights", "weights in a repository", "weights at an address", "a base"]
    assert [name for name, (kind, *_) in found.items() if kind == "WeightsUnavailable"] == unavailable
    assert {kind for name, (kind, *_) in found.items() if name not in unavailable} == {"Unreachable"}
    for name, (_, message, lines) in found.items():
        assert lines < 40, name
        assert "\n" not in message
        if name in unavailable:
            assert message.count("can be neither downloaded nor found in the cache") == 1
            assert "Connect to the network once, or point to a copy" in message
    for name in ("weights", "weights in a repository", "list", "push"):
        host = endpoint.rpartition("/")[2].partition(":")[0]
        assert f"{host} cannot be reached: " in found[name][1]


def test_without_network_the_cache_is_taken_at_once(tmp_path):
    state = timm.create_model("resnet10t").state_dict()
    hub_cache(tmp_path / "hub", "timm/resnet10t.c3_in1k", {"model.safetensors": state})
    program = (
        WITHOUT_NETWORK.partition("calls = {")[0]
        + """
model = timm_nrpm.create_model("resnet10t", pretrained=True)
print(json.dumps([float(model.fc.bias.detach().double().sum()), waited]))
"""
    )
    (found, waited), said = without_network("http://127.0.0.1:9", tmp_path, program)
    assert (found, waited, said) == (float(state["fc.bias"].double().sum()), [], "")


def test_a_long_wait_is_not_silent(hub, tmp_path):
    patient = Worker(hub, tmp_path / "patient", WITHOUT="matplotlib")
    patient("[setattr(network, 'SILENCE', 0.05), logging.basicConfig(level=logging.INFO, force=True)]")
    hub.create("me/slow")
    hub.fault(Fault("stall", "GET", "/api/models/me/slow$", seconds=1))
    hub.fault(Fault("status", "GET", "/api/models/me/slow/tree", status=503, times=1))
    patient.push("me/slow")
    patient.kill()
    log = (tmp_path / "patient" / "log").read_text()
    assert "INFO:timm_nrpm:Waiting for an answer from 127.0.0.1 ..." in log


def test_who_sits_at_a_terminal_reads_it_and_a_file_does_not(monkeypatch, caplog):
    caplog.set_level("INFO", "timm_nrpm")
    for terminal in (True, False):
        stream = io.StringIO()
        stream.isatty = lambda terminal=terminal: terminal
        monkeypatch.setattr(sys, "stderr", stream)
        network.say("Waiting")
        assert ("Waiting" in stream.getvalue()) is terminal
        assert [record.getMessage() for record in caplog.records] == ["Waiting"] * (not terminal)


def test_a_second_try_is_announced(monkeypatch, caplog):
    caplog.set_level("INFO", "timm_nrpm")
    monkeypatch.setattr(transfers, "WAITS", (0.0,))
    with pytest.raises(HubError):
        insist("Sending it", lambda: (_ for _ in ()).throw(answered(503)))
    assert [r.getMessage() for r in caplog.records] == ["Sending it failed, and is tried again in 0 s."]


@pytest.mark.parametrize(
    ("cause", "told_as"),
    [
        (socket.gaierror(-3, "Temporary failure in name resolution"), "Temporary failure in name resolution"),
        (ConnectionRefusedError(111, "Connection refused"), "Connection refused"),
        (OSError(errno.ENETUNREACH, "Network is unreachable"), "Network is unreachable"),
        (ssl.SSLCertVerificationError(1, "certificate verify failed"), "certificate verify failed"),
        (ConnectionResetError(104, "Connection reset by peer"), None),
        (BrokenPipeError(32, "Broken pipe"), None),
    ],
)
def test_what_is_no_network_and_what_may_pass(cause, told_as):
    error = http.ConnectError("x")
    error.__cause__ = http.ConnectError("y")
    error.__cause__.__context__ = cause
    assert network.why_no_network(error) == told_as

    def send(request, **options):
        assert request.extensions["timeout"]["connect"] == network.CONNECT
        raise error

    request = http.Request("GET", "http://example.invalid/x", extensions={"timeout": {"connect": 60.0, "read": 60.0}})
    with pytest.raises(network.NoNetwork if told_as else http.ConnectError):
        network._send(send, request)


def test_a_connection_that_takes_too_long_is_no_network():
    assert network.why_no_network(http.ConnectTimeout("x")) == "no connection within 10 seconds"
    assert network.why_no_network(http.ReadTimeout("x")) is None


def test_what_is_no_failure_of_the_hub_is_passed_on():
    for error in (ValueError("x"), KeyboardInterrupt()):
        with pytest.raises(type(error)):
            insist("It", lambda error=error: (_ for _ in ()).throw(error))


def test_patience_gives_back_what_was_there(monkeypatch):
    monkeypatch.setenv("TIMM_NRPM_TIMEOUT", "7")
    before, entered, leave = get_session().timeout, threading.Barrier(9), threading.Event()

    def wait():
        with patience():
            entered.wait(10)
            leave.wait(10)

    threads = [threading.Thread(target=wait) for _ in range(8)]
    for thread in threads:
        thread.start()
    with patience(), suppress(ValueError), patience():
        entered.wait(10)
        assert get_session().timeout == http.Timeout(7)
        assert "send" in vars(get_session())
        raise ValueError
    assert get_session().timeout == http.Timeout(7)
    leave.set()
    for thread in threads:
        thread.join()
    assert get_session().timeout == before != http.Timeout(7)
    assert "send" not in vars(get_session())


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


@pytest.mark.parametrize(("kind", "step"), ALWAYS)
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
