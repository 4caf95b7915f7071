"""Pushes beside a run, in real runs against a Hub that works, fails or says nothing."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hub_server import Fault, Hub

import timm_nrpm
from timm_nrpm import TuneConfig

TOKEN = "hf_push0123456789"
PROGRAM = Path(__file__).parents[1] / "tune_digits.py"
FOUND = "import json, sys, timm_nrpm; print(json.dumps(timm_nrpm.lambdas(timm_nrpm.from_pretrained(sys.argv[1]))))"


@pytest.fixture
def hub(tmp_path):
    with Hub(tmp_path / "hub") as server:
        server.user("me", TOKEN)
        yield server


def environment(hub, tmp_path, **more):
    kept = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_OFFLINE", "HF_TOKEN")}
    ours = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": TOKEN}
    ours |= {"NO_PROXY": "127.0.0.1", "HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1"}
    return {**kept, **ours, **more}


def tune(hub, tmp_path, *, processes=1, more=None, **config):
    settings = {"epochs": 2, "steps": 1, "output": str(tmp_path / "run"), "push_to": "me/run", "checkpoint_every": 3}
    given = {"images": 64, "result": str(tmp_path / "state.pt"), "config": {**settings, **config}}
    command = [sys.executable, *(["-m", "torch.distributed.run", "--nproc_per_node", "2"] if processes == 2 else [])]
    variables = environment(hub, tmp_path, **(more or {}), **({"ACCELERATE_USE_CPU": "true"} if processes == 2 else {}))
    start = time.monotonic()
    done = subprocess.run(
        [*command, str(PROGRAM), json.dumps(given)], env=variables, capture_output=True, text=True, timeout=300
    )
    return done, time.monotonic() - start


def on_hub(hub, tmp_path, name="me/run"):
    """Lambdas of what is on the Hub, loaded by a process of its own."""
    variables = environment(hub, tmp_path, HF_HOME=str(tmp_path / "elsewhere"))
    done = subprocess.run([sys.executable, "-c", FOUND, name], env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("processes", [1, 2])
def test_the_last_variant_is_on_the_hub(hub, tmp_path, processes):
    done, _ = tune(hub, tmp_path, processes=processes, lam_lr=0.1)
    assert done.returncode == 0, done.stderr
    assert "PushWarning" not in done.stderr
    assert on_hub(hub, tmp_path) == timm_nrpm.lambdas(timm_nrpm.from_pretrained(tmp_path / "run" / "variant"))
    titles = [commit.title for commit in hub.repo("me/run").commits()[:-1]]
    assert titles[0] == f"Step {2 * 4 // processes}"
    steps = [int(title.removeprefix("Step ")) for title in titles]
    assert steps == sorted(set(steps), reverse=True)  # one commit a push, and one process that pushes
    assert hub.repo("me/run").private
    assert not list((tmp_path / "run").glob("push-*"))
    assert hub.unexpected == []
    assert "Not evaluated" in hub.repo("me/run").files()["README.md"].decode()


def test_paradigm_3_brings_its_weights(hub, tmp_path):
    done, _ = tune(hub, tmp_path, paradigm="all", epochs=1, checkpoint_every=100)
    assert done.returncode == 0, done.stderr
    files = hub.repo("me/run").files()
    assert files["model.safetensors"] == (tmp_path / "run" / "variant" / "model.safetensors").read_bytes()
    assert "The weights were tuned" in files["README.md"].decode()


FAULTS = {
    "down": Fault("status", "*", "/api/", -1, status=503),
    "broken lines": Fault("reset", "*", "", -1),
    "silent": Fault("stall", "*", "/api/", -1, seconds=600),
    "the commit fails": Fault("status", "POST", "/commit/", -1, status=500),
}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What the same run computes when it pushes nothing."""
    folder = tmp_path_factory.mktemp("alone")
    with Hub(folder / "hub") as server:
        done, _ = tune(server, folder, push_to=None)
        assert done.returncode == 0, done.stderr
        assert not server.requests
    return torch.load(folder / "state.pt", weights_only=True)


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_hub_that_is_down_neither_ends_nor_changes_the_run(hub, tmp_path, fault, alone):
    hub.fault(fault)
    done, seconds = tune(hub, tmp_path, more={"TIMM_NRPM_TIMEOUT": "2"})
    assert done.returncode == 0, done.stderr
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert all(torch.equal(state[name], tensor) for name, tensor in alone.items())
    assert "me/run was not updated, and the run goes on" in done.stderr
    assert f"timm-nrpm push --variant {tmp_path}/run/variant me/run" in done.stderr
    assert len(timm_nrpm.lambdas(timm_nrpm.from_pretrained(tmp_path / "run" / "variant"))) == 10
    assert TOKEN not in done.stderr + done.stdout
    assert seconds < 150
    hub.clear()
    command = [sys.executable, "-m", "timm_nrpm.cli", "push", "--variant", str(tmp_path / "run" / "variant"), "me/run"]
    pushed = subprocess.run(command, env=environment(hub, tmp_path), capture_output=True, text=True)
    assert pushed.returncode == 0, pushed.stderr
    assert on_hub(hub, tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"push_to": "me/run", "output": None}, "needs output"),
        ({"push_to": "no owner"}, "is not allowed"),
        ({"push_to": "../run"}, "is not allowed"),
    ],
)
def test_what_could_never_be_sent_is_refused_before_the_run(hub, tmp_path, settings, message):
    done, _ = tune(hub, tmp_path, **settings)
    assert done.returncode == 1
    assert re.search(f"ValueError: .*{message}", done.stderr), done.stderr
    assert not hub.requests


def test_a_config_that_publishes_is_its_own_json():
    config = TuneConfig(output="run", push_to="me/run", license="mit")
    assert TuneConfig.from_json(config.to_json()) == config
