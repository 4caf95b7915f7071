"""Pushes beside a run, in real runs against a Hub that works, fails or says nothing."""

import json
import os
import re
import sys
from pathlib import Path

import forked
import pytest
import torch
from hub_server import Fault, Hub
from hub_worker import Worker

import timm_nrpm
from timm_nrpm import TuneConfig
from timm_nrpm.models.format import CONFIG

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
    return launch(hub, tmp_path, {**settings, **config}, processes=processes, more=more)


def launch(hub, tmp_path, *configs, processes=1, more=None):
    """Run the program with one configuration after another; the results are 0.pt, 1.pt and so on."""
    given = [
        {"images": 64, "result": str(tmp_path / f"{number}.pt"), "config": config}
        for number, config in enumerate(configs)
    ]
    command = [sys.executable, *(["-m", "torch.distributed.run", "--nproc_per_node", "2"] if processes == 2 else [])]
    variables = environment(hub, tmp_path, **(more or {}), **({"ACCELERATE_USE_CPU": "true"} if processes == 2 else {}))
    command += [str(PROGRAM), json.dumps(given)]
    return forked.run(command, env=variables, capture_output=True, text=True, timeout=300)


def on_hub(hub, tmp_path, name="me/run"):
    """Lambdas of what is on the Hub, loaded by a process of its own."""
    variables = environment(hub, tmp_path, HF_HOME=str(tmp_path / "elsewhere"))
    done = forked.run([sys.executable, "-c", FOUND, name], env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_last_variant_is_on_the_hub(hub, tmp_path, processes):
    done = tune(hub, tmp_path, processes=processes, lam_lr=0.1)
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
    done = tune(hub, tmp_path, paradigm="all", epochs=1, checkpoint_every=100)
    assert done.returncode == 0, done.stderr
    files = hub.repo("me/run").files()
    assert files["model.safetensors"] == (tmp_path / "run" / "variant" / "model.safetensors").read_bytes()
    assert "The weights were tuned" in files["README.md"].decode()


def test_a_run_takes_nothing_away_and_says_so(hub, tmp_path):
    hub.create("me/run", private=True).commit({"config.json": b"of a plain model"})
    done = tune(hub, tmp_path, epochs=1)
    assert done.returncode == 0, done.stderr
    assert (
        "me/run was not updated, and the run goes on: ValueError: me/run would lose config.json (16 bytes)"
        in done.stderr
    )
    assert f"Push it later: timm-nrpm push --variant {tmp_path / 'run' / 'variant'} me/run" in done.stderr
    assert hub.repo("me/run").files()["config.json"] == b"of a plain model"
    assert len(hub.repo("me/run").commits()) == 2


FAULTS = {
    "down": Fault("status", "*", "/api/.*down", -1, status=503),
    "broken-lines": Fault("reset", "*", "broken-lines", -1),
    "silent": Fault("stall", "*", "/api/.*silent", -1, seconds=600),
    "the-commit-fails": Fault("status", "POST", "the-commit-fails/commit/", -1, status=500),
}


@pytest.fixture(scope="module")
def troubled(tmp_path_factory):
    """A run that pushes nothing and then one for each fault, in one process: the hub, the folder and what was said.

    The repository of each run has the name of the fault that befalls it.
    """
    folder = tmp_path_factory.mktemp("troubled")
    config = {"epochs": 2, "steps": 1, "checkpoint_every": 3}
    configs = [config, *({**config, "output": str(folder / name), "push_to": f"me/{name}"} for name in FAULTS)]
    with Hub(folder / "hub") as server:
        server.user("me", TOKEN)
        for fault in FAULTS.values():
            server.fault(fault)
        done = launch(server, folder, *configs, more={"TIMM_NRPM_TIMEOUT": "2"})
        assert done.returncode == 0, done.stderr
        assert "/me/down" in server.requests[0].path  # none is of the first run
        server.clear()
        worker = Worker(server, folder / "worker", WITHOUT="matplotlib", HF_TOKEN=TOKEN)
        yield server, folder, done, worker
        worker.kill()


@pytest.mark.slow
@pytest.mark.xdist_group("troubled")
@pytest.mark.parametrize("name", FAULTS)
def test_a_hub_that_is_down_neither_ends_nor_changes_the_run(troubled, name):
    hub, folder, done, worker = troubled
    alone = torch.load(folder / "0.pt", weights_only=True)
    state = torch.load(folder / f"{list(FAULTS).index(name) + 1}.pt", weights_only=True)
    assert all(torch.equal(state[key], tensor) for key, tensor in alone.items())
    assert f"me/{name} was not updated, and the run goes on" in done.stderr
    variant = folder / name / "variant"
    command = re.search(rf"timm-nrpm (push --variant {variant} me/{name})", done.stderr)
    lambdas = timm_nrpm.lambdas(timm_nrpm.from_pretrained(variant))
    assert len(lambdas) == 10
    assert TOKEN not in done.stderr + done.stdout
    assert f"me/{name}" not in hub.repos or CONFIG not in hub.repo(f"me/{name}").files()
    assert worker(f"nrpm.cli.program.main({command[1].split()!r})") == 0
    assert worker(f"nrpm.lambdas(nrpm.from_pretrained('me/{name}'))") == lambdas


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"push_to": "me/run", "output": None}, "needs output"),
        ({"push_to": "no owner"}, "is not allowed"),
        ({"push_to": "../run"}, "is not allowed"),
    ],
)
def test_what_could_never_be_sent_is_refused_before_the_run(hub, tmp_path, settings, message):
    done = tune(hub, tmp_path, **settings)
    assert done.returncode == 1
    assert re.search(f"ValueError: .*{message}", done.stderr), done.stderr
    assert not hub.requests


def test_a_config_that_publishes_is_its_own_json():
    config = TuneConfig(output="run", push_to="me/run", license="mit")
    assert TuneConfig.from_json(config.to_json()) == config
