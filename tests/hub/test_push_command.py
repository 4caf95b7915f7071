"""What `timm-nrpm push` asks before it takes something away: at a terminal, and where there is none."""

from __future__ import annotations

import json
import os
import pty
import sys
import threading

import forked
import pytest
import torch
from hub_server import Hub

import timm_nrpm
from timm_nrpm.hub.latency import estimated, write_cost
from timm_nrpm.models.reprogramming import model_sha256

TOKEN = "hf_pushing0123456789"


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    with Hub(tmp_path_factory.mktemp("hub")) as server:
        server.user("me", TOKEN)
        yield server
        assert server.unexpected == []


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with a variant without its weights, and one with them."""
    folder = tmp_path_factory.mktemp("work")
    torch.manual_seed(0)
    model = timm_nrpm.create_model("resnet8_digits", pretrained=True, lam=0.5).eval()
    timm_nrpm.save_pretrained(model, folder / "small")
    timm_nrpm.save_pretrained(model, folder / "full", full=True)
    for name in ("small", "full"):  # which no command has to estimate then
        write_cost(estimated(model), model_sha256(model), folder / name)
    return folder


@pytest.fixture
def repo(request):
    return "me/" + "".join(c if c.isalnum() else "-" for c in request.node.name).strip("-")[:80]


def command(hub, folder, *arguments, typed=None):
    """Status, stdout and stderr of `timm-nrpm push`; with `typed`, at a terminal where somebody types that."""
    kept = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_OFFLINE", "HF_TOKEN")}
    ours = {"HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "home"), "HF_TOKEN": TOKEN, "NO_PROXY": "127.0.0.1"}
    ours |= dict.fromkeys(("HF_HUB_DISABLE_XET", "HF_HUB_DISABLE_TELEMETRY"), "1")
    line = [sys.executable, "-m", "timm_nrpm.cli", "push", *map(str, arguments)]
    about = {"env": {**kept, **ours}, "cwd": folder, "text": True}
    if typed is None:
        done = forked.run(line, capture_output=True, timeout=120, stdin=forked.subprocess.DEVNULL, **about)
        return done.returncode, done.stdout, done.stderr
    ours_end, theirs = pty.openpty()
    shown = []
    with forked.Popen(line, stdin=theirs, stderr=theirs, stdout=forked.subprocess.PIPE, **about) as process:
        os.close(theirs)
        listening = threading.Thread(target=listen, args=(ours_end, shown))
        listening.start()
        os.write(ours_end, typed.encode())
        out = process.communicate(timeout=120)[0]
    listening.join(timeout=10)
    os.close(ours_end)
    return process.returncode, out, b"".join(shown).decode().replace("\r\n", "\n")


def listen(end, shown):
    """Keep what a terminal shows until the process that has it ends."""
    try:
        while text := os.read(end, 1 << 12):
            shown.append(text)
    except OSError:  # nobody has the other end any more
        pass


def stocked(hub, repo):
    """A repository that holds a full variant, put there without a command."""
    folder = hub.folder / "variant"
    model = timm_nrpm.create_model("resnet8_digits", pretrained=True, lam=0.5).eval()
    timm_nrpm.save_pretrained(model, folder, full=True)
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    hub.create(repo, private=True).commit(files, lfs=[name for name in files if name.endswith(".safetensors")])
    return len(files["model.safetensors"])


def sent(hub, start):
    return [r for r in hub.requests[start:] if r.method not in ("GET", "HEAD")]


def test_without_a_terminal_it_is_refused_and_names_the_flag(hub, work, repo):
    size, start = stocked(hub, repo), len(hub.requests)
    status, out, error = command(hub, work, "--variant", "small", repo)
    assert (status, out) == (2, "")
    lost = f"model.safetensors ({size:,} bytes)"
    assert error == f"timm-nrpm: {repo} would lose {lost}. Nothing was sent: give --yes if that may go.\n"
    assert sent(hub, start) == []
    status, out, _ = command(hub, work, "--variant", "small", repo, "--yes")
    assert status == 0
    assert "  model.safetensors      deleted\n" in out
    assert "model.safetensors" not in hub.repo(repo).files()


@pytest.mark.parametrize("answer", ["n\n", "\n", "nonsense\n", "\x04"], ids=["no", "enter", "nonsense", "end"])
def test_at_a_terminal_the_answer_no_sends_nothing(hub, work, repo, answer):
    size, start = stocked(hub, repo), len(hub.requests)
    status, out, shown = command(hub, work, "--variant", "small", repo, typed=answer)
    assert (status, out) == (2, "")
    question = f"{repo} would lose:\n  - model.safetensors ({size:,} bytes)\nPush all the same? [y/N] "
    assert question in shown
    assert shown.rstrip().endswith(f"timm-nrpm: nothing was sent to {repo}.")
    assert sent(hub, start) == []


@pytest.mark.parametrize("answer", ["y\n", "YES\n"])
def test_at_a_terminal_the_answer_yes_pushes(hub, work, repo, answer):
    stocked(hub, repo)
    status, out, shown = command(hub, work, "--variant", "small", repo, "--json", typed=answer)
    assert status == 0
    assert "Push all the same? [y/N] " in shown
    assert json.loads(out)["deleted"] == ["model.safetensors"]
    assert "model.safetensors" not in hub.repo(repo).files()


def test_nothing_is_asked_where_nothing_goes(hub, work, repo):
    stocked(hub, repo)
    status, _, shown = command(hub, work, "--variant", "full", repo, typed="n\n")
    assert status == 0
    assert "would lose" not in shown


def test_tags_collection_and_visibility(hub, work, repo):
    arguments = ["--variant", "small", repo, "--tag", "scans", "digits", "--collection", "My robust models"]
    status, out, _ = command(hub, work, *arguments, "--visibility", "public")
    assert status == 0
    assert not hub.repo(repo).private
    (found,) = hub.collections.values()
    assert [item["id"] for item in found.items] == [repo]
    assert f"\nIn the collection {hub.url}/collections/{found.slug}\n" in out
    card = hub.repo(repo).files()["README.md"].decode()
    for tag in ("scans", "digits", "timm_nrpm"):
        assert f"\n- {tag}\n" in card
    status, _, error = command(hub, work, "--variant", "small", repo, "--visibility", "private")
    assert status == 2
    assert f"{repo} would lose its readers, since it is public and would be private." in error
    status, out, _ = command(hub, work, "--variant", "small", repo, "--visibility", "private", "--yes")
    assert status == 0
    assert "It was public, and is private now." in out
    assert hub.repo(repo).private
    assert command(hub, work, "--variant", "small", repo, "--visibility", "secret")[0] == 2
    status, _, error = command(hub, work, "--variant", "small", repo, "--collection", "me/typo")
    assert status == 2
    assert "--collection me/typo is not allowed: give the slug in the address of a collection" in error


def test_a_dry_run_says_that_it_does_not_know(hub, work, repo):
    stocked(hub, repo)
    start = len(hub.requests)
    status, out, _ = command(hub, work, "--variant", "small", repo, "--dry-run", "--tag", "scans")
    assert status == 0
    assert "What the repository would lose is not known without the Hub; a push asks first, or is refused." in out
    assert hub.requests[start:] == []
