"""A Hub that is out of reach: it is told soon, once and with a way out, by every function and every command."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import socket
import ssl
import sys
import threading
import time
from contextlib import contextmanager, suppress

import forked
import pytest
import timm
from hub_cache import hub_cache
from hub_server import Fault
from hub_worker import Failed, Worker
from hub_worker import hub as hub
from hub_worker import repo as repo
from huggingface_hub import get_session

from timm_nrpm.models import network
from timm_nrpm.models.network import patience

http = sys.modules.get("httpx2") or sys.modules["httpx"]  # whichever the Hub's client uses

PROGRAM = """
import contextlib, io, json, sys, threading, time, traceback
sleep, waited = time.sleep, []
time.sleep = waited.append
import timm, timm_nrpm
from timm_nrpm.cli.program import main
from timm_nrpm.models import network
small = timm_nrpm.create_model("resnet8_digits", pretrained=True, lam=0.5)
timm_nrpm.cost(small)  # which may wait for a compiler
waited.clear()

def command(*words):
    with contextlib.redirect_stderr(io.StringIO()) as said:
        code = main(list(words))
    return f"exit {code}", said.getvalue(), 0

def outcome(call):
    network._unreachable.clear()  # each is the first that asks
    start = time.monotonic()
    try:
        found = call()
        found = found if isinstance(found, tuple) else ("nothing was raised", "", 0)
    except Exception as error:
        found = type(error).__name__, str(error), len(traceback.format_exc().splitlines())
    return *found, time.monotonic() - start
"""

CALLS = """
network.CONTACT, network.SILENCE = 0.25, 0.1
functions = {
    "weights": lambda: timm_nrpm.create_model("resnet10t", pretrained=True),
    "weights in a repository": lambda: timm_nrpm.create_model("hf-hub:me/base", pretrained=True),
    "a base": lambda: timm_nrpm.base.Base("resnet10t", "resnet10t.c3_in1k", "0" * 64, hub_id="timm/resnet10t").build(),
    "timm's name of a reprogrammed model": lambda: timm.create_model("nrpm_resnet10t", pretrained=True),
    "a variant": lambda: timm_nrpm.from_pretrained("me/x"),
    "inspect": lambda: timm_nrpm.inspect("me/x"),
    "pull": lambda: timm_nrpm.pull("me/x", "pulled"),
    "list": lambda: timm_nrpm.list_variants("me"),
    "push": lambda: timm_nrpm.push_to_hub(small, "me/x", token="hf_none"),
}
folder = str(timm_nrpm.save_pretrained(small, "variant"))
few = ["--samples", "4", "--calibrate", "0"]
commands = {" ".join(words): lambda words=words: command(*words) for words in (
    ["pull", "--variant", "me/x"],
    ["inspect", "--variant", "me/x"],
    ["list", "me"],
    ["push", "--variant", folder, "me/x"],
    ["plot", "--variant", "me/x"],
    ["create", "--model", "resnet10t", "--output", "new"],
    ["calibrate", "--variant", "me/x", "--output", "new"],
    ["evaluate", "--model", "resnet10t", *few],
    ["evaluate", "--variant", "me/x"],
    ["certify", "--variant", "me/x"],
    ["corrupt", "--variant", "me/x"],
    ["search", "--variant", "me/x", "--output", "new"],
    ["tune", "--model", "resnet10t", "--output", "new"],
)}
found = [{name: outcome(call) for name, call in calls.items()} for calls in (functions, commands)]
network.CONTACT = float(sys.argv[2])
seconds = outcome(commands["inspect --variant me/x"])[-1]
print(json.dumps([*found, seconds, waited]))
"""

WEIGHTS = ("weights", "weights in a repository", "a base", "timm's name of a reprogrammed model")


@contextmanager
def out_of_reach(kind):
    """The address of a Hub that is out of reach, and the connections that it has had, of which it answers none."""
    if kind == "unknown":
        yield "http://no.such.host.invalid", []
        return
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        address, connections = server.getsockname(), []
        if kind != "refused":
            server.listen(0 if kind == "full" else 128)
        if kind == "full":  # what the queue has no place for hears nothing
            for _ in range(2):
                connections.append(socket.socket())
                connections[-1].setblocking(False)
                connections[-1].connect_ex(address)

        def accept():
            with suppress(OSError):
                while True:
                    connections.append(server.accept()[0])

        if kind == "silent":
            threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{address[1]}", connections
        with suppress(OSError):
            server.shutdown(socket.SHUT_RDWR)  # which ends the thread
        for connection in connections:
            connection.close()


def without_network(endpoint, home, program, *arguments, **settings):
    """What a process prints as its last line, parsed, and what it says."""
    ours = {"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "NO_PROXY": "*"}
    ours |= {"HF_HOME": str(home), "TORCH_HOME": str(home)}
    command = [sys.executable, "-c", program, endpoint, *arguments]
    done = forked.run(
        command, env={**os.environ, **ours, **settings}, capture_output=True, text=True, check=True, cwd=home
    )
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


REASONS = {
    "refused": "Connection refused",
    "unknown": r"[Nn]ame.*",
    "full": r"no (connection|answer) within 0.25 seconds",
    "silent": r"no answer within 0.25 seconds \(TIMM_NRPM_TIMEOUT=60 waits longer\)",
}


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.slow) if "0.25" in why else kind for kind, why in REASONS.items()]
)
def test_it_is_told_at_once_and_in_short(tmp_path, kind):
    """A quarter of a second stands for the real patience, so that all can be tried; at last one has the real one."""
    with out_of_reach(kind) as (endpoint, connections):
        (functions, commands, seconds, waited), said = without_network(
            endpoint, tmp_path, PROGRAM + CALLS, str(network.CONTACT)
        )
        if kind == "silent":  # nobody asked twice
            assert len(connections) == len(functions) + len(commands) + 1
    assert (waited, said) == ([], "")
    assert seconds < 10
    host = endpoint.rpartition("/")[2].partition(":")[0]
    for name, (outcome, message, lines, seconds) in {**functions, **commands}.items():
        weights = name in WEIGHTS or "--model" in name
        if name in commands:
            assert outcome == "exit 1", name
        else:
            assert outcome == ("WeightsUnavailable" if weights else "Unreachable"), name
        assert message.count("\n") == (name in commands), name
        assert re.search(f"{host} cannot be reached: {REASONS[kind]}", message), message
        if weights:
            assert message.count("can be neither downloaded nor found in the cache") == 1
            assert "Connect to the network once, or point to a copy" in message
        assert advice(name) in message
        assert lines < 40, name
        assert seconds < 10, name


def advice(name):
    """How to do without the network, in the terms of a function or a command."""
    command, _, options = name.partition(" ")
    if command == "push":
        return "--dry-run completes the folder" if options else "dry_run=True completes the folder"
    if "--variant me/x" in name:
        return "--offline, or HF_HUB_OFFLINE=1 in the environment reads the cache alone"
    if name in ("a variant", "inspect", "pull"):
        return "local_files_only=True, or HF_HUB_OFFLINE=1 in the environment reads the cache alone"
    return "HF_HUB_OFFLINE=1 in the environment reads the cache alone"


def test_silence_counts_from_the_first_question(monkeypatch):
    """The client asks some questions with a limit of its own, after which it asks the next one."""
    for name in ("_answered", "_unreachable", "_silent_since"):
        monkeypatch.setattr(network, name, type(getattr(network, name))())
    monkeypatch.setattr(network, "CONTACT", 3.0)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.delenv("TIMM_NRPM_TIMEOUT", raising=False)
    with out_of_reach("silent") as (endpoint, connections), patience():
        start = time.monotonic()
        with pytest.raises(http.ReadTimeout):
            get_session().get(endpoint, timeout=1.5)
        with pytest.raises(network.NoNetwork, match="no answer within 3 seconds"):
            get_session().get(endpoint)
        assert 2.9 < time.monotonic() - start < 4.4
        with pytest.raises(network.NoNetwork):  # at once
            get_session().get(endpoint)
        assert len(connections) == 2


def test_without_network_the_cache_is_taken_at_once(tmp_path):
    state = timm.create_model("resnet10t").state_dict()
    hub_cache(tmp_path / "hub", "timm/resnet10t.c3_in1k", {"model.safetensors": state})
    program = (
        PROGRAM
        + """
model = timm_nrpm.create_model("resnet10t", pretrained=True)
print(json.dumps([float(model.fc.bias.detach().double().sum()), waited]))
"""
    )
    (found, waited), said = without_network("http://127.0.0.1:9", tmp_path, program)
    assert (found, waited, said) == (float(state["fc.bias"].double().sum()), [], "")


def test_who_has_all_in_the_cache_waits_once(tmp_path):
    """For a Hub that is silent, which would have to be asked for the variant and for its base."""
    hub_cache(
        tmp_path / "hub", "timm/resnet10t.c3_in1k", {"model.safetensors": timm.create_model("resnet10t").state_dict()}
    )
    save = """
model = timm_nrpm.create_model("resnet10t", pretrained=True, lam=0.5)
print(json.dumps(str(timm_nrpm.save_pretrained(model, "variant"))))
"""
    without_network("http://127.0.0.1:9", tmp_path, PROGRAM + save)
    hub_cache(tmp_path / "hub", "me/x", {file.name: file.read_bytes() for file in (tmp_path / "variant").iterdir()})
    load = """
network.CONTACT, network.SILENCE = 0.25, 0.1
model = timm_nrpm.from_pretrained("me/x")
print(json.dumps([timm_nrpm.lambdas(model)["fc"], waited]))
"""
    with out_of_reach("silent") as (endpoint, connections):
        found, said = without_network(endpoint, tmp_path, PROGRAM + load)
        assert (found, said, len(connections)) == ([0.5, []], "", 1)


@pytest.fixture(scope="module")
def hasty(hub, tmp_path_factory):
    """A worker that gives a server a third of a second for its first answer, and the usual time for the next."""
    worker = Worker(hub, tmp_path_factory.mktemp("hasty"), WITHOUT="matplotlib")
    worker("[setattr(network, 'CONTACT', 0.33), setattr(network, 'SILENCE', 0.1)]")
    worker("os.environ.pop('TIMM_NRPM_TIMEOUT')")
    yield worker
    worker.kill()


def test_only_the_first_answer_has_to_come_soon(hub, hasty, repo):
    hub.fault(Fault("slow", "GET", f"/api/models/{repo}", seconds=1))
    with pytest.raises(Failed, match=r"no answer within 0.33 seconds \(TIMM_NRPM_TIMEOUT=60 waits longer\); check"):
        hasty.push(repo)
    with pytest.raises(Failed, match=r"no answer within 0.33 seconds"):  # at once, without another question
        hasty.push(repo)
    hasty("network._unreachable.clear()")
    hub.create("me/else").commit({"README.md": b"---\ntags: [timm_nrpm]\n---\n"})
    assert hasty("len(nrpm.list_variants('me'))") == 1
    faults = [Fault("slow", *what.split(), seconds=1) for what in (
        f"GET /api/models/{repo}", "POST /api/repos/create", f"POST {repo}/preupload/", f"POST {repo}/commit/"
    )]  # fmt: skip
    for fault in faults:
        hub.fault(fault)
    assert hasty.push(repo)["commit"]
    assert [fault.times for fault in faults] == [0, 0, 0, 0]


def test_who_sets_a_timeout_waits_that_long_for_the_first_answer(hub, hasty, repo):
    hub.fault(Fault("slow", "GET", f"/api/models/{repo}", seconds=1))
    hasty("[network._answered.clear(), os.environ.update(TIMM_NRPM_TIMEOUT='20')]")
    assert hasty.push(repo)["commit"]
    hasty("os.environ.pop('TIMM_NRPM_TIMEOUT')")


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
        assert request.extensions["timeout"]["connect"] == network.CONTACT
        raise error

    request = http.Request("GET", "http://example.invalid/x", extensions={"timeout": {"connect": 60.0, "read": 60.0}})
    with pytest.raises(network.NoNetwork if told_as else http.ConnectError):
        network._send(send, request)


def test_a_connection_that_takes_too_long_is_no_network():
    assert network.why_no_network(http.ConnectTimeout("x")) == "no connection within 5 seconds"
    assert network.why_no_network(http.ReadTimeout("x")) is None


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
