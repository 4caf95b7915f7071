"""A hundred kills at random moments: a tuned model is, bit for bit, the one of a run that nobody killed."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import forked
import pytest
import torch

from timm_nrpm.evaluation.history import History

PROGRAM = Path(__file__).parents[1] / "tune_digits.py"
KILLS = 100
LONGEST = 2.5
"""Seconds after the start of a process in which it is killed, from before its first step to well after."""


def start(folder: Path, seed: int, resume: bool) -> tuple[subprocess.Popen, Path]:
    config = {"paradigm": "all", "objective": "sat", "optimizer": "adamw", "eps": 0.1, "steps": 1, "epochs": 8,
              "calibrate": 32, "checkpoint_every": 3, "evaluate_steps": 1, "target_start": 0, "seed": seed,
              "output": str(folder)}  # fmt: skip
    result = folder.parent / f"{folder.name}.pt"
    settings = {"model": "resnet", "images": 96, "batch": 8, "config": config, "resume": resume, "result": str(result)}
    ours = {"PYTHONPATH": str(PROGRAM.parents[1]), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(PROGRAM), json.dumps([settings])]
    with open(folder.parent / "log", "a") as log:
        return forked.Popen(command, stdout=subprocess.DEVNULL, stderr=log, env={**os.environ, **ours}), result


def steps_of(folder: Path) -> list:
    history = History.from_json((folder / "history.json").read_text())
    return [history.steps, history.evaluations]


@pytest.mark.slow
def test_a_hundred_kills_lose_nothing(tmp_path):
    chance, kills, seed = random.Random(0), 0, 0
    while kills < KILLS:
        folder, again = tmp_path / f"killed-{seed}", False
        while True:
            process, result = start(folder, seed, resume=again)
            again = True
            if kills < KILLS:
                time.sleep(chance.uniform(0.0, LONGEST))
                process.send_signal(signal.SIGKILL)
            status = process.wait()
            if status != -signal.SIGKILL:
                break
            kills += 1
        assert status == 0, (tmp_path / "log").read_text()[-3000:]
        process, untouched = start(tmp_path / f"whole-{seed}", seed, resume=False)
        assert process.wait() == 0
        assert steps_of(folder) == steps_of(tmp_path / f"whole-{seed}")
        killed, whole = (torch.load(file, weights_only=True) for file in (result, untouched))
        assert killed.keys() == whole.keys()
        assert all(torch.equal(killed[name], whole[name]) for name in whole)
        left = {path.name for path in (folder / "checkpoints").iterdir()}
        assert left == {path.name for path in (tmp_path / f"whole-{seed}" / "checkpoints").iterdir()}
        seed += 1
    print(f"{kills} kills, {seed} runs")
