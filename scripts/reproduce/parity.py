"""Compare our layer with the authors' on the same weights and inputs: values, gradients, time and memory.

    python scripts/reproduce/parity.py --authors CHECKOUT    # of github.com/chris-hzc/Robustness-Reprogramming

Their file models/conv2d.py is executed, so give a checkout that you trust.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import torch
from experiment import Claim, Experiment, Measured, Row, main
from lab import Lab, Missing
from torch import Tensor

from timm_nrpm.nn.functional import nrpm_conv2d

COLUMNS = (
    "forward, float64",
    "gradients, float64",
    "gradients, ours in float32",
    "gradients, theirs in float32",
    "time, theirs / ours",
    "memory, theirs / ours",
)
ROUNDS, LAM = 5, 0.3
MIB = 1 << 20


@dataclass(frozen=True)
class Case:
    """A layer and its estimate. `shape` is that of the input, `[N, C, H, W]`; `kernel` is the side of the kernel."""

    shape: tuple[int, int, int, int]
    outputs: int
    kernel: int
    stride: int = 1
    padding: int = 0
    iterations: int = 1
    eps: float = 1e-3
    lam: float = LAM
    penalty: str = "l1"


CASES = {
    "LeNet conv1": Case((64, 1, 28, 28), 10, 5),
    "LeNet conv2": Case((64, 10, 12, 12), 20, 5),
    "LeNet conv2, K = 3": Case((64, 10, 12, 12), 20, 5, iterations=3),
    "narrow ResNet-18, layer1": Case((16, 8, 32, 32), 8, 3, padding=1, eps=5e-4),
    "narrow ResNet-18, layer3, stride 2": Case((16, 16, 16, 16), 32, 3, 2, 1, eps=5e-4),
    "narrow ResNet-18, layer4": Case((16, 64, 4, 4), 64, 3, padding=1, eps=5e-4),
    "a linear layer, 784 to 256": Case((16, 784, 1, 1), 256, 1, eps=5e-5),
    "Huber": Case((64, 10, 12, 12), 20, 5, lam=0.0, penalty="huber"),
    "MCP": Case((64, 10, 12, 12), 20, 5, lam=0.0, penalty="mcp"),
    "Huber and MCP": Case((64, 10, 12, 12), 20, 5, lam=0.0, penalty="huber-mcp"),
}
THEIRS = {"l1": "L12", "huber": "Huber", "mcp": "MCP", "huber-mcp": "HM"}
ZONES = {"delta": 0.01, "gamma": 0.02}
"""Thresholds of the penalties, chosen so that products fall on both sides of them."""

Layer = Callable[[Tensor, Tensor], Tensor]


def theirs(case: Case, checkout: Path) -> Layer:
    """Return the authors' convolution, whose forward leaves the bias out."""
    spec = importlib.util.spec_from_file_location("authors_conv2d", checkout / "models" / "conv2d.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    layer = module.RobustConv2d(case.shape[1], case.outputs, case.kernel, case.stride, case.padding, bias=False)
    total = layer.robust_sum
    total.K, total.norm, total.epsilon, total.lmbd = case.iterations, THEIRS[case.penalty], case.eps, case.lam
    total.gamma, total.delta = ZONES["gamma"], ZONES["delta"]

    def forward(x: Tensor, weight: Tensor) -> Tensor:
        del layer.weight
        layer.weight = weight
        return layer(x)

    layer._parameters.pop("weight")
    layer.weight = torch.empty(0)
    return forward


def ours(case: Case) -> Layer:
    """Return our convolution."""
    options: dict[str, Any] = {"stride": case.stride, "padding": case.padding, "lam": case.lam, "eps": case.eps,
                               "iterations": case.iterations, "penalty": case.penalty, **ZONES}  # fmt: skip
    return lambda x, weight: nrpm_conv2d(x, weight, **options)


def step(layer: Layer, case: Case, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], float]:
    """Return the output and both gradients, and the median seconds of a forward and backward."""
    draw = torch.Generator().manual_seed(0)
    fan_in = case.shape[1] * case.kernel**2
    x = torch.randn(case.shape, generator=draw).to(dtype).requires_grad_()
    weight = torch.randn(case.outputs, case.shape[1], case.kernel, case.kernel, generator=draw) / fan_in**0.5
    weight = weight.to(dtype).requires_grad_()
    tensors, times = [], []
    for number in range(ROUNDS + 1):
        start = time.perf_counter()
        y = layer(x, weight)
        slope = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        tensors = [y.detach(), *torch.autograd.grad((y * slope).sum(), (x, weight))]
        times += [time.perf_counter() - start] if number else []
    return tensors, median(times)


def gap(tensors: list[Tensor], reference: list[Tensor]) -> float:
    """Return the largest difference, relative to the largest entry of the reference."""
    pairs = zip(tensors, reference, strict=True)
    return float(f"{max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs):.2g}")


def peak(name: str, checkout: Path | None) -> int:
    """Return the bytes by which a step raises its process's memory; of the authors' layer if `checkout` is given."""
    case = CASES[name]
    layer = ours(case) if checkout is None else theirs(case, checkout)
    step(layer, replace(case, shape=(1, *case.shape[1:])))  # warm-up: memory of the libraries
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = _status("VmRSS")
    step(layer, case)
    return _status("VmHWM") - before


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) * 1024


def experiment(lab: Lab) -> Experiment:
    def row(name: str) -> Measured:
        if lab.authors is None or not (lab.authors / "models" / "conv2d.py").is_file():
            raise Missing("the authors' code is not here: give a checkout of their repository as --authors")
        case = CASES[name]
        layers = ours(case), theirs(case, lab.authors)
        (mine, my_time), (other, their_time) = (step(layer, case) for layer in layers)
        exact, reference = (step(layer, case, torch.float64)[0] for layer in layers)
        with get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
            sizes = [pool.apply(peak, (name, checkout)) for checkout in (None, lab.authors)]
        gaps = [gap(exact[:1], reference[:1]), *(gap(g[1:], reference[1:]) for g in (exact, mine, other))]
        ratios = [round(their_time / my_time, 1), round(sizes[1] / max(sizes[0], MIB), 1)]
        return {"ours": [*gaps, *ratios], "milliseconds": [round(1000 * t, 2) for t in (my_time, their_time)],
                "MiB": [round(size / MIB, 1) for size in sizes]}  # fmt: skip

    names = list(CASES)
    claims = [
        Claim("(ours) values and gradients agree to 1e-9 in float64, penalty l1",
              lambda r: all(max(r[n][:2]) < 1e-9 for n in names if CASES[n].penalty == "l1")),
        Claim("(ours) our step is faster in every case", lambda r: all(r[n][4] > 1 for n in names)),
        Claim("(ours) our step takes less memory in every case", lambda r: all(r[n][5] > 1 for n in names)),
    ]  # fmt: skip
    return Experiment(
        "parity", "our layer and the authors', on the same weights and inputs", (), COLUMNS,
        [Row(name, lambda name=name: row(name)) for name in names], claims, unit="see the headings",  # type: ignore[misc]
        settings={"rounds": ROUNDS, "lambda": LAM, "zones": ZONES},
        about="Largest differences of the output and of the gradients of x and of the weight from theirs in float64, "
        "relative to the largest entry; "
        f"median time of {ROUNDS} forwards with backward in float32; memory by which such a step raises that of a "
        "process (ours counts as 1 MiB at least). Their convolution leaves its bias out of the forward, so none is "
        "compared.",
    )  # fmt: skip


if __name__ == "__main__":
    main(experiment)
