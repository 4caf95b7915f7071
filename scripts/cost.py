"""Compare the estimated cost of twelve models with the measured one: `results/cost.md` and `.json`.

Other jobs may share the machine, and the time that passes says more about them than about a model. So what is measured
is the time for which cores are at work, divided by the number of threads: with one thread that is what a free core
takes, and with two it is the least that two free cores can take, for work that divides evenly. Each is the fastest
forward of a round, and the median of the rounds. About four minutes on two cores that are not free.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

# Threads that wait for each other at work would count as if they were at work.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import timm
import torch
from bench import ROOT, machine
from torch import Tensor, nn

import timm_nrpm
from timm_nrpm.evaluation.cost import cost
from timm_nrpm.models.modes import evaluating

GROUPS: dict[str, tuple[str, ...]] = {
    "six models with which the probes were chosen": (
        *("resnet18", "mixer_s32_224", "vit_tiny_patch16_224"),
        *("convnext_atto", "mobilenetv3_small_050", "tf_efficientnet_lite0"),
    ),
    "three that showed which kinds of layers were missing": ("regnetx_002", "pvt_v2_b0", "xcit_nano_12_p16_224"),
    "three measured after that, by which no kind of layer was chosen": ("efficientnet_b0", "levit_128s", "resnext26ts"),
}
"""Models, by what they were to the estimate."""

SETTINGS: dict[str, tuple[int, str | None]] = {"K = 3": (3, None), "K = 1": (1, None), "K = 3, first:4": (3, "first:4")}
GOAL = 0.25
FORWARDS = 4  # of a round, after one that warms up
THREADS = (1, 2)
Row = dict[str, Any]


def forwards(model: nn.Module, x: Tensor, threads: int) -> tuple[float, float]:
    """Seconds of work for each thread, and seconds that passed, of the fastest of some forwards."""
    torch.set_num_threads(threads)
    times = []
    with evaluating(model), torch.no_grad():
        for _ in range(1 + FORWARDS):
            start, begin = time.process_time(), time.perf_counter()
            model(x)
            times.append(((time.process_time() - start) / threads, time.perf_counter() - begin))
    worked, passed = zip(*times[1:], strict=True)
    return min(worked), min(passed)


def rows_of(name: str, rounds: int) -> list[Row]:
    """Estimated and measured seconds of one model, plain and in all settings, by turns."""
    make = partial(timm_nrpm.create_model, name, lam=0.8)
    nets = {"plain": timm.create_model(name).eval()}
    nets |= {key: make(iterations=k, layers=layers).eval() for key, (k, layers) in SETTINGS.items()}
    x = torch.randn(1, 3, 224, 224)
    measured: dict[tuple[str, int], list[tuple[float, float]]] = {(key, n): [] for key in nets for n in THREADS}
    for _ in range(rounds):
        for key, net in nets.items():
            for threads in THREADS:
                measured[key, threads].append(forwards(net, x, threads))
    rows: list[Row] = []
    for key, net in nets.items():
        row: Row = {"model": name, "setting": key, "load": os.getloadavg()[0], "threads": {}}
        for threads in THREADS:
            torch.set_num_threads(threads)
            report = cost(net)
            worked, passed = (statistics.median(times) for times in zip(*measured[key, threads], strict=True))
            row["threads"][str(threads)] = {"estimated": report.seconds, "worked": worked, "passed": passed}
            row |= {"products": report.products, "slowdown": report.slowdown, "memory": report.memory}
        rows.append(row)
    return rows


def markdown(result: Row) -> str:
    """The page."""
    rows: list[Row] = result["rows"]

    def ratio(row: Row, threads: int) -> float:
        times = row["threads"][str(threads)]
        return float(times["estimated"] / times["worked"])

    def near(models: Sequence[str], threads: int) -> str:
        ours = [row for row in rows if row["model"] in models and row["setting"] != "plain"]
        return f"{sum(abs(ratio(row, threads) - 1) <= GOAL for row in ours)} of {len(ours)}"

    load = statistics.mean(row["load"] for row in rows)
    lines = [
        "# Estimated and measured cost",
        "",
        f"`python scripts/cost.py` on {result['machine']['cpu']}, {result['cores']} cores, on "
        f"which {load:.1f} threads wanted to run on average. Random weights, one image of 224 x 224, lambda 0.8, in "
        "milliseconds. Measured is the time for which cores are at work, divided by the number of threads: with one "
        "thread what a free core takes, with two the least that two free cores can take, as if calls were divided. The "
        "time that passed with two threads is longer, by what threads wait for each other and by other jobs, which no "
        "estimate can know.",
        "",
        f"Estimates of reprogrammed models within {GOAL:.0%} of what is measured, with one thread and with two:",
        "",
        *(f"- {group}: {near(names, 1)}, and {near(names, 2)}" for group, names in GROUPS.items()),
        "",
        "| model | setting | M products | 1 thread: estimated | measured | ratio | 2 threads: estimated | measured "
        "| ratio | passed | times plain |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [row["model"], row["setting"], f"{row['products'] / 1e6:.0f}"]
        for threads in THREADS:
            times = row["threads"][str(threads)]
            cells += [f"{1e3 * times[key]:.1f}" for key in ("estimated", "worked")] + [f"{ratio(row, threads):.2f}"]
        cells += [f"{1e3 * row['threads']['2']['passed']:.0f}", f"{row['slowdown']:.1f}x"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3, help="rounds of measuring (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=ROOT / "results", help="folder for the JSON and the table")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    kept = arguments.out / "cost.json"  # models that are in it are not measured again
    result: Row = {"machine": machine("cpu"), "cores": os.cpu_count(), "rows": []}
    if kept.exists():
        result["rows"] = json.loads(kept.read_text(encoding="utf-8"))["rows"]
    for name in (name for names in GROUPS.values() for name in names):
        if name not in {row["model"] for row in result["rows"]}:
            result["rows"] += rows_of(name, arguments.rounds)
            kept.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
            print(name, flush=True)
    (arguments.out / "cost.md").write_text(markdown(result), encoding="utf-8")


if __name__ == "__main__":
    main()
