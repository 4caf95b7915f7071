"""Measure how fast the estimator is, compared with what it replaces and with what the machine can do.

    python scripts/bench.py                  # everything, about ten minutes on two cores
    python scripts/bench.py --only operators # or: models, scaling
    python scripts/bench.py --device cuda

Writes results/bench-DEVICE.json and results/bench-DEVICE.md. Everything is measured in one run, since machines are
shared: the estimator, the reference that holds every product in memory, the plain operation, and the limit. The limit
is a loop over data in the first-level cache that does what a step does to each product: one |x|, an addition, a
reciprocal and two multiply-adds. The limit of forward and backward together is that of two such loops, with the
arithmetic of the forward pass that keeps what a gradient needs, and with that of the backward pass. Times are medians.
A product counts once, whatever K is: at K = 3 the limit in products is a third of that in steps.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from bench_tables import K, Row, markdown
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

import timm_nrpm
from timm_nrpm.evaluation.speed import name_of
from timm_nrpm.evaluation.stopwatch import peak_bytes, resident
from timm_nrpm.nn.estimator import Penalty, robust_sum
from timm_nrpm.nn.functional import nrpm_conv2d, nrpm_linear
from timm_nrpm.nn.kernels import compiling, native

ROOT = Path(__file__).parents[1]
Memory = list[tuple[Row, str, Callable[[], Any]]]  # row, key in it, and the call whose memory is measured at the end

# By name: batch, channels, outputs, size, kernel, stride, padding, groups. The first three are the targets.
CONVOLUTIONS = {
    "3x3, 16 to 16, 32x32, batch 8": (8, 16, 16, 32, 3, 1, 1, 1),
    "3x3, 64 to 64, 28x28, batch 1": (1, 64, 64, 28, 3, 1, 1, 1),
    "3x3, 256 to 256, 14x14, batch 1": (1, 256, 256, 14, 3, 1, 1, 1),
    "3x3, 512 to 512, 7x7, batch 8": (8, 512, 512, 7, 3, 1, 1, 1),
    "stem 7x7/2, 3 to 64, 224x224, batch 1": (1, 3, 64, 224, 7, 2, 3, 1),
    "1x1, 256 to 64, 56x56, batch 1": (1, 256, 64, 56, 1, 1, 0, 1),
    "1x1, 64 to 256, 56x56, batch 8": (8, 64, 256, 56, 1, 1, 0, 1),
    "depthwise 3x3, 256, 28x28, batch 8": (8, 256, 256, 28, 3, 1, 1, 256),
    "patchify 16x16, 3 to 192, 224x224, batch 1": (1, 3, 192, 224, 16, 16, 0, 1),
}
# By name: rows, inputs, outputs.
LINEARS = {
    "tokens 196 to 384, 512 rows": (512, 196, 384),
    "head 512 to 1000, 1 row": (1, 512, 1000),
}
# By name: batch size.
MODELS = {"resnet18": 8, "resnet50": 8}


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(work: Callable[[], Any], device: str, at_least: float = 1.0) -> float:
    """Return the median time of a call in seconds.

    The first call is a warm-up. At least three more are timed, and more until `at_least` seconds are spent. Where a
    call takes more than five seconds, two calls are enough and both are timed.
    """
    times: list[float] = []
    spent = 0.0
    while spent < at_least or len(times) < 4:
        _wait(device)
        start = time.perf_counter()
        work()
        _wait(device)
        times.append(time.perf_counter() - start)
        spent += times[-1]
        if min(times) > 5 and len(times) == 2:
            return statistics.median(times)
    return statistics.median(times[1:])


def forget_free_memory() -> None:
    """Make glibc return freed memory to the system at once, which slows down every later call."""
    m_mmap_threshold = -3
    ctypes.CDLL(None).mallopt(m_mmap_threshold, 1 << 16)


def limits(device: str) -> dict[str, float]:
    """Return the most steps that the machine can do per second, forward and with backward as well ("both").

    They are NaN where they are not known: on a CPU without a compiled kernel, and with backward on a GPU.
    """
    if device == "cuda":
        # A multiprocessor does 16 reciprocals and 128 multiply-adds per clock; a step takes 1 and about 8 of them.
        properties = torch.cuda.get_device_properties(0)
        clocks = properties.multi_processor_count * torch.cuda.clock_rate() * 1e6
        return {"forward": min(16.0, 128 / 8) * clocks, "both": math.nan}
    if native.library() is None:
        return {"forward": math.nan, "both": math.nan}
    numbers, rounds, threads = torch.rand(4096), 5_000, torch.get_num_threads()
    rates = {
        name: len(numbers) * rounds * threads * steps
        / seconds(partial(native.limit, numbers, rounds, name, threads), device, 0.3)
        for name, (_, steps) in native.LIMITS.items()
    }  # fmt: skip
    return {
        "forward": rates["forward"],
        "both": 1 / (1 / rates["forward for a gradient"] + 1 / rates["backward"]),
    }


def machine(device: str) -> Row:
    """Return the versions, the processor and the compiler that the results depend on."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    field = lambda name: next((x.split(":")[1].strip() for x in info.splitlines() if x.startswith(name)), "")  # noqa: E731
    wanted = ("sse4_2", "avx2", "fma", "avx512f", "avx512dq", "avx512bw", "avx512vl", "avx512_fp16", "amx_tile")
    compiler = ""
    if native.library() is not None:
        compiler = subprocess.run([*compiling.compiler(), "--version"], capture_output=True, text=True).stdout.split(
            "\n"
        )[0]
    return {
        "torch": torch.__version__,
        "timm": timm.__version__,
        "timm_nrpm": timm_nrpm.__version__,
        "python": platform.python_version(),
        "cpu": name_of(torch.device("cpu")),
        "cpu_flags": [flag for flag in wanted if flag in field("flags").split()],
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "compiler": compiler,
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
    }


def _operator(
    name: str, x: Tensor, weight: Tensor, ours: Callable[[], Tensor], plain: Callable[[], Tensor],
    reference: Callable[[], Tensor], device: str, memory: Memory,
) -> Row:  # fmt: skip
    products = plain().numel() * weight[0].numel()

    def both(forward: Callable[[], Tensor]) -> Callable[[], None]:
        def step() -> None:
            out = forward()
            torch.autograd.grad(out, (x, weight), torch.ones_like(out))

        return step

    def inference(forward: Callable[[], Tensor]) -> Callable[[], None]:
        def step() -> None:
            with torch.no_grad():
                forward()

        return step

    row: Row = {"layer": name, "products": products, "steps_a_second_at_the_limit": limits(device)}
    # The reference holds about a dozen tensors of products for the gradient.
    fits = products * 4 * 12 < 11e9
    for kind, wrap in (("forward", inference), ("both", both)):
        row[kind] = {"seconds": seconds(wrap(ours), device), "plain_seconds": seconds(wrap(plain), device)}
        row[kind]["reference_seconds"] = seconds(wrap(reference), device) if fits else None
        if device == "cuda" and fits:
            row[kind]["compiled_reference_seconds"] = seconds(wrap(torch.compile(reference)), device)
        memory.append((row[kind], "bytes", wrap(ours)))
        if fits:
            memory.append((row[kind], "reference_bytes", wrap(reference)))
        row[kind]["products_a_second"] = products / row[kind]["seconds"]
    before, after = row["steps_a_second_at_the_limit"], limits(device)  # the machine is shared
    row["steps_a_second_at_the_limit"] = {kind: max(before[kind], after[kind]) for kind in after}
    return row


def _reference(x: Tensor, weight: Tensor, stride: int = 1, padding: int = 0, groups: int = 1) -> Tensor:
    """Compute the sums of `nrpm_conv2d` or `nrpm_linear` with every product in memory, in another layout."""
    penalty = Penalty.named("l1", 1e-3)
    if x.ndim == 2:
        return robust_sum(x, weight, penalty, K)
    outs = []
    for part, matrix in zip(x.chunk(groups, 1), weight.flatten(1).chunk(groups), strict=True):
        columns = F.unfold(part, (weight.shape[2], weight.shape[3]), 1, padding, stride).mT.flatten(0, 1)  # [N, D]
        outs.append(robust_sum(columns, matrix, penalty, K))
    return torch.cat(outs, 1)


def operators(device: str, progress: Progress, memory: Memory) -> list[Row]:
    rows = []
    task = progress.add_task("operators", total=len(CONVOLUTIONS) + len(LINEARS))
    for name, (batch, channels, outputs, size, kernel, stride, padding, groups) in CONVOLUTIONS.items():
        x = torch.randn(batch, channels, size, size, device=device, requires_grad=True)
        weight = torch.randn(outputs, channels // groups, kernel, kernel, device=device)
        weight = weight.div_(weight[0].numel() ** 0.5).requires_grad_()
        settings = {"stride": stride, "padding": padding, "groups": groups}
        ours = partial(nrpm_conv2d, x, weight, lam=0.0, iterations=K, **settings)  # type: ignore[arg-type]
        plain, reference = partial(F.conv2d, x, weight, **settings), partial(_reference, x, weight, **settings)
        rows.append(_operator(name, x, weight, ours, plain, reference, device, memory))
        progress.advance(task)
    for name, (count, inputs, outputs) in LINEARS.items():
        x = torch.randn(count, inputs, device=device, requires_grad=True)
        weight = torch.randn(outputs, inputs, device=device).div_(inputs**0.5).requires_grad_()
        ours, plain = partial(nrpm_linear, x, weight, lam=0.0, iterations=K), partial(F.linear, x, weight)
        rows.append(_operator(name, x, weight, ours, plain, partial(_reference, x, weight), device, memory))
        progress.advance(task)
    return rows


def _profile(step: Callable[[], None], device: str) -> dict[str, float]:
    """Return the shares of the time spent in the estimator forward, in the estimator backward and elsewhere."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profile:
        step()
        _wait(device)
    events = {e.key: e.cpu_time_total for e in profile.key_averages()}
    everything = sum(e.self_cpu_time_total for e in profile.key_averages())
    ours = {
        "estimator forward": events.get("timm_nrpm::mixed_sum", 0.0),
        "estimator backward": events.get("timm_nrpm::mixed_sum_backward", 0.0),
    }
    shares = {name: value / everything for name, value in ours.items()}
    return {**shares, "everything else": 1 - sum(shares.values())}


def models(device: str, progress: Progress, _: Memory) -> list[Row]:
    rows = []
    task = progress.add_task("models", total=2 * len(MODELS))
    for name, batch in MODELS.items():
        x = torch.randn(batch, 3, 224, 224, device=device)
        row: Row = {"model": name, "batch": batch}
        for kind, model in (("plain", timm.create_model(name)), ("ours", timm_nrpm.create_model(name, lam=0.5))):
            model = model.to(device)
            optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

            def forward(model: nn.Module = model, x: Tensor = x) -> None:
                with torch.no_grad():
                    model(x)

            def train(model: nn.Module = model, x: Tensor = x, optimizer: torch.optim.Optimizer = optimizer) -> None:
                model(x).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()

            row[kind] = {"forward_seconds": seconds(forward, device, 3), "train_seconds": seconds(train, device, 3)}
            row[kind]["train_bytes"] = peak_bytes(train, device)
            row[kind]["resident_bytes"] = resident("VmHWM") if device == "cpu" else torch.cuda.max_memory_allocated()
            if kind == "ours" and device == "cpu":
                row["time_goes_to"] = {"forward": _profile(forward, device), "train": _profile(train, device)}
            progress.advance(task)
        rows.append(row)
    return rows


def scaling(device: str, progress: Progress, _: Memory) -> list[Row]:
    """Measure the rate over a range of 16x in each dimension, with all other dimensions as in the base."""
    base = {"batch": 2, "channels": 128, "outputs": 128, "positions": 28 * 28, "K": 3}
    rows = []
    task = progress.add_task("scaling", total=5 * len(base))
    for varied, middle in base.items():
        for factor in (0.25, 0.5, 1, 2, 4) if varied not in ("batch", "K") else (1, 2, 4, 8, 16):
            start = 1 if varied in ("batch", "K") else middle
            sizes = {**base, varied: round(start * factor)}
            side = sizes["positions"] ** 0.5
            x = torch.randn(sizes["batch"], sizes["channels"], round(side), round(side), device=device)
            weight = torch.randn(sizes["outputs"], sizes["channels"], 3, 3, device=device) / 34
            x.requires_grad_(), weight.requires_grad_()

            def both(x: Tensor = x, weight: Tensor = weight, steps: int = sizes["K"]) -> None:
                out = nrpm_conv2d(x, weight, padding=1, lam=0.0, iterations=steps)
                torch.autograd.grad(out, (x, weight), torch.ones_like(out))

            def forward(x: Tensor = x, weight: Tensor = weight, steps: int = sizes["K"]) -> None:
                with torch.no_grad():
                    nrpm_conv2d(x, weight, padding=1, lam=0.0, iterations=steps)

            work = len(x) * weight.numel() * round(side) ** 2 * sizes["K"]
            rows.append({
                "varied": varied, "value": sizes[varied], "product_steps": work,
                "forward_steps_a_second": work / seconds(forward, device, 0.5),
                "both_steps_a_second": work / seconds(both, device, 0.5),
            })  # fmt: skip
            progress.advance(task)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="device to measure (default: cpu)")
    parser.add_argument("--only", choices=["operators", "models", "scaling"], help="measure this part alone")
    parser.add_argument("--out", type=Path, default=ROOT / "results", help="folder for the JSON and the table")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    console = Console()
    memory: Memory = []
    result: Row = {"machine": machine(arguments.device)}
    with Progress(console=console) as progress:
        for part in (operators, models, scaling):
            if arguments.only in (None, part.__name__):
                result[part.__name__] = part(arguments.device, progress, memory)
        forget_free_memory()
        for row, key, call in progress.track(memory, description="memory"):
            row[key] = peak_bytes(call, arguments.device)
    console.print(markdown(result), markup=False, highlight=False)
    arguments.out.mkdir(parents=True, exist_ok=True)
    stem = arguments.out / f"bench-{arguments.device}"
    stem.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    stem.with_suffix(".md").write_text(markdown(result))
    console.print(f"Written: {stem}.json, {stem}.md")


if __name__ == "__main__":
    main()
