"""Measure how tuning scales: images per second of one process and of two, one thread each, beside two independent
processes, which are the limit of the machine; and the cost of a step beside the plain model's.

    python scripts/bench_tuning.py      # twelve minutes on two cores that do nothing else

Writes results/bench-tuning.json and .md. The three take turns, since machines are shared; the results are medians.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import timm
import torch
from rich.progress import track
from torch.utils.data import DataLoader, TensorDataset

import timm_nrpm
from timm_nrpm import NRPMConfig, TuneConfig, reprogram_, tune

RESULTS = Path(__file__).parents[1] / "results"
BATCH, ROUNDS = 32, 3
FEW, MANY = 1, 5  # numbers of steps; the difference of their times leaves out starting and ending a run
CASES: dict[str, dict[str, Any]] = {
    "paradigm 2, PGD of seven steps (the default)": {"paradigm": "lambda"},
    "paradigm 2, FGSM": {"paradigm": "lambda", "objective": "fgsm"},
    "paradigm 3, FGSM": {"paradigm": "all", "objective": "fgsm"},
}


def seconds(settings: dict[str, Any], lam: float, steps: int) -> float:
    """Return the seconds that `steps` steps take, including the start and the end of the run."""
    count = BATCH * int(os.environ.get("WORLD_SIZE", "1")) * steps
    torch.manual_seed(0)
    data = TensorDataset(torch.rand(count, 3, 32, 32), torch.randint(10, (count,)))
    model = reprogram_(timm.create_model("resnet18_cifar_narrow"), NRPMConfig(lam=lam, iterations=3))
    start = time.perf_counter()
    tune(model, DataLoader(data, batch_size=BATCH), TuneConfig(**{"epochs": 1, **settings}))
    return time.perf_counter() - start


def worker() -> None:
    """Measure images per second of this process group for every case; the first process prints them as JSON."""
    torch.set_num_threads(1)
    images = BATCH * int(os.environ.get("WORLD_SIZE", "1"))
    rates: dict[str, float] = {}
    for name, settings in CASES.items():
        runs = {name: (settings, 0.5)}
        if settings["paradigm"] == "all":  # lambda is fixed at 1: plain layers
            runs[f"{name}, plain"] = ({**settings, "trainable": ("*.weight", "*.bias")}, 1.0)
        for case, (options, lam) in runs.items():
            seconds(options, lam, FEW)  # warm-up: what happens only once
            few = seconds(options, lam, FEW)
            rates[case] = images * (MANY - FEW) / (seconds(options, lam, MANY) - few)
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(rates))


def measured(kind: str) -> dict[str, float]:
    """Return images per second of one process ("1"), two that share a run ("2") or two separate runs ("apart")."""
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2"] if kind == "2" else []
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, __file__, "--worker"]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    running = [subprocess.Popen(command, env=environment, **pipes) for _ in range(2 if kind == "apart" else 1)]
    answers = [process.communicate() for process in running]
    for process, (_, errors) in zip(running, answers, strict=True):
        if process.returncode:
            raise RuntimeError(errors[-2000:])
    rates = [json.loads(output.splitlines()[-1]) for output, _ in answers]
    return {case: sum(rate[case] for rate in rates) for case in rates[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=" ".join(__doc__.split("\n\n")[0].split()))
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON and the table")
    args = parser.parse_args()
    if args.worker:
        worker()
        return
    runs: dict[str, list[dict[str, float]]] = {"1": [], "2": [], "apart": []}
    for _ in track(range(ROUNDS), "One process, two, and two separate runs"):
        for kind, results in runs.items():
            results.append(measured(kind))
    rates = {
        kind: {case: statistics.median(run[case] for run in results) for case in results[0]}
        for kind, results in runs.items()
    }
    versions = {"torch": torch.__version__, "timm": timm.__version__, "timm_nrpm": timm_nrpm.__version__}
    lines = [
        "# What `scripts/bench_tuning.py` measured",
        "",
        f"`resnet18_cifar_narrow`, 32x32, every layer, K = 3, batch {BATCH} and one thread a process, "
        f"{platform.machine()}, torch {torch.__version__}; images a second, medians of {ROUNDS} rounds.",
        "",
        "Efficiency is that of two processes beside twice one; two runs at once, which share nothing, are what the "
        "machine allows.",
        "",
        "| | 1 process | 2 processes | efficiency | two runs at once | of that | plain model, 1 process |",
        "|---|---|---|---|---|---|---|",
    ]
    for case in CASES:
        one, two, apart = (rates[kind][case] for kind in ("1", "2", "apart"))
        plain = rates["1"].get(f"{case}, plain")
        beside = f"{plain:.0f} ({plain / one:.1f}x)" if plain else ""
        limits = f"{two / one / 2:.0%} | {apart:.1f} | {two / apart:.0%}"
        lines.append(f"| {case} | {one:.1f} | {two:.1f} | {limits} | {beside} |")
    text = "\n".join(lines) + "\n"
    print(text)
    args.out.mkdir(parents=True, exist_ok=True)
    content = {"machine": versions, "batch": BATCH, "steps": [FEW, MANY], "runs": runs}
    (args.out / "bench-tuning.json").write_text(json.dumps(content, indent=1) + "\n")
    (args.out / "bench-tuning.md").write_text(text)


if __name__ == "__main__":
    main()
