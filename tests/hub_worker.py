"""The real client in a process of its own, against the Hub of hub_server.py, and fixtures for both."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import threading
from concurrent.futures import Future
from itertools import count

import forked
import pytest
from hub_server import Hub

OURS = {"nrpm_config.json", "nrpm.safetensors", "config.json", "README.md", "lambdas.png", "cost.json"}

TOKEN, READ_ONLY = (f"hf_{secrets.token_hex(17)}" for _ in range(2))

WORKER = '''
import hashlib, json, logging, os, sys, tempfile, threading, traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # what is printed is not said to the tests
sys.modules |= dict.fromkeys(os.environ.get("WITHOUT", "").split())  # as if they were not installed

import timm
import torch

import timm_nrpm as nrpm
from timm_nrpm.models import network
from timm_nrpm.hub import publishing, pushing
from timm_nrpm.models import downloads as transfers
from timm_nrpm.models.reprogramming import model_sha256, reprogrammed_layers

torch.set_num_threads(1)
transfers.WAITS = pushing.WAITS = (0.05, 0.05)
images = torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def variant(lam=0.5, name="resnet8_digits"):
    return nrpm.calibrate_(nrpm.create_model(name, pretrained=True, lam=lam).eval(), [images[:32]])


@torch.no_grad()
def seen(model):
    """What tells a model from others: lambdas, and each bit of the logits."""
    lams = sorted(nrpm.lambdas(model).items()) if reprogrammed_layers(model) else []
    return [lams, hashlib.sha256(model.eval()(images[32:]).numpy().tobytes()).hexdigest()]


def fresh():
    return tempfile.mkdtemp(dir=".")


def load(name, **options):
    return seen(nrpm.from_pretrained(name, **{"cache_dir": fresh(), **options}))


def push(model, name, **options):
    return asdict(nrpm.push_to_hub(model, name, **options))


def from_timm(name, **options):
    return seen(timm.create_model(f"hf-hub:{name}", **{"pretrained": True, "cache_dir": fresh(), **options}))


def report(model):
    attack = nrpm.report.AttackResult("pgd", "own", (True, False, None), 1, 1, 0.1)
    threat, versions, clean = nrpm.Threat(), {"torch": torch.__version__}, (True, True, False)
    about = {"versions": versions, "sha256": model_sha256(model), "data": "digits, test"}
    return nrpm.RobustnessReport(threat, "quick", 10, 0, 0, clean, (attack,), **about)


def answer(number, expression):
    try:
        said = {"result": eval(expression, globals())}
    except BaseException as error:
        said = {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
    with lock:
        print(json.dumps({"number": number, **said}, default=str), file=answers, flush=True)


lock, small, plain = threading.Lock(), variant(), timm.create_model("resnet8_digits", pretrained=True)
nrpm.save_pretrained(small, "small")
nrpm.save_pretrained(small, "whole", full=True)
with ThreadPoolExecutor(32) as pool:
    for line in sys.stdin:
        pool.submit(answer, *json.loads(line))
'''


class Failed(Exception):
    """What went wrong in a worker: the error's type and message."""

    def __init__(self, error, trace):
        super().__init__(error)
        self.trace = trace


class Worker:
    """A process with a token that evaluates expressions, several at a time."""

    def __init__(self, hub, folder, **settings):
        keep = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        flags = ("HF_HUB_DISABLE_XET", "HF_HUB_DISABLE_TELEMETRY", "OMP_NUM_THREADS")
        keep |= {"HF_ENDPOINT": hub.url, "NO_PROXY": "127.0.0.1", "HF_TOKEN": TOKEN, **dict.fromkeys(flags, "1")}
        keep |= dict.fromkeys(("TIMM_NRPM_TIMEOUT", "HF_HUB_DOWNLOAD_TIMEOUT", "HF_HUB_ETAG_TIMEOUT"), "3")
        keep |= {"HF_HOME": str(folder / "home"), **settings}
        folder.mkdir(exist_ok=True)
        self.folder, self.said = folder, []
        self._numbers, self._asked = count(), {}
        with open(folder / "log", "a") as log:
            self.process = forked.Popen(
                [sys.executable, "-c", WORKER], env=keep, cwd=folder, text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
            )  # fmt: skip
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self):
        for line in self.process.stdout:
            self.said.append(line)
            said = json.loads(line)
            asked = self._asked.pop(said["number"])
            if "error" in said:
                asked.set_exception(Failed(said["error"], said["trace"]))
            else:
                asked.set_result(said["result"])
        for asked in self._asked.values():
            asked.set_exception(Failed("the worker ended", (self.folder / "log").read_text()))

    def start(self, expression):
        number, asked = next(self._numbers), Future()
        self._asked[number] = asked
        print(json.dumps([number, expression]), file=self.process.stdin, flush=True)
        return asked

    def __call__(self, expression):
        return self.start(expression).result(timeout=150)

    def push(self, name, model="small", **options):
        return self(f"push({model}, {name!r}, **{options!r})")

    def load(self, name, **options):
        return self(f"load({name!r}, **{options!r})")

    def kill(self):
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    with Hub(tmp_path_factory.mktemp("hub")) as hub:
        hub.user("me", TOKEN)
        hub.user("me", READ_ONLY, write=False)
        yield hub
        assert [line for line in hub.unexpected if "/flip-" not in line] == []  # whose addresses may be damaged


@pytest.fixture(scope="module")
def worker(hub, tmp_path_factory):
    worker = Worker(hub, tmp_path_factory.mktemp("work"))
    yield worker
    worker.kill()


@pytest.fixture(scope="module")
def small(worker):
    return worker("seen(small)")


@pytest.fixture
def repo(request):
    """The name of one that is not there yet."""
    return "me/" + "".join(c if c.isalnum() else "-" for c in request.node.name).strip("-")[:80]
