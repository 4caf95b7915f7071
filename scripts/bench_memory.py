"""Measure what gradient checkpointing saves of the memory of a training step, and what time it costs.

    python scripts/bench_memory.py    # resnet50 at 224x224, batch 8: two minutes on two cores

Writes results/bench-memory.json and .md. The blocks of the first stages hold most of the memory, since their outputs
are large, and no more of the work than the others: computing only these again in the backward pass saves the most for
its time. The steps alternate; times are medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from functools import partial
from pathlib import Path

import torch
from bench import ROOT, machine
from torch import nn
from torch.utils.checkpoint import checkpoint

import timm_nrpm
from timm_nrpm.evaluation.stopwatch import reset_peak, resident

# By name: stages whose blocks are computed again.
KINDS: dict[str, tuple[str, ...]] = {
    "nothing": (),
    "blocks of stages 1 and 2": ("layer1", "layer2"),
    "blocks of all stages": ("layer1", "layer2", "layer3", "layer4"),
}


def checkpoint_(model: nn.Module, stages: tuple[str, ...]) -> None:
    """Compute the blocks of these stages again in the backward pass, and no others."""
    for name, block in model.named_modules():
        stage, _, rest = name.partition(".")
        if rest.isdigit():
            block.__dict__.pop("forward", None)
            if stage in stages:
                block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="resnet50", help="a ResNet of timm (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="images in a step (default: %(default)s)")
    parser.add_argument("--size", type=int, default=224, help="height and width in pixels (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="steps of each kind (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=ROOT / "results", help="folder for the JSON and the table")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    model = timm_nrpm.create_model(arguments.model, lam=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    x = torch.randn(arguments.batch, 3, arguments.size, arguments.size)
    times: dict[str, list[float]] = {kind: [] for kind in KINDS}
    peaks: dict[str, int] = dict.fromkeys(KINDS, 0)
    for _ in range(arguments.rounds):
        for kind, stages in KINDS.items():
            checkpoint_(model, stages)
            reset_peak()
            start = time.perf_counter()
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            times[kind].append(time.perf_counter() - start)
            peaks[kind] = max(peaks[kind], resident("VmHWM"))
    base = statistics.median(times["nothing"])
    rows = [(kind, statistics.median(times[kind]), peaks[kind]) for kind in KINDS]
    table = [
        f"# A training step of {arguments.model}, {arguments.size}x{arguments.size}, batch {arguments.batch}, K = 3",
        "",
        "| computed again | seconds | times | resident |",
        "|---|---|---|---|",
        *(f"| {kind} | {taken:.1f} | {taken / base:.2f} | {size / 2**30:.2f} GiB |" for kind, taken, size in rows),
    ]
    print("\n".join(table))
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "bench-memory.md").write_text("\n".join(table) + "\n")
    result = {"machine": machine("cpu"), "seconds": times, "resident_bytes": peaks}
    (arguments.out / "bench-memory.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
