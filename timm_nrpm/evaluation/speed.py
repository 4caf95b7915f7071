"""Measures how fast this machine is, once, in a second or two, by small layers of every kind.

On a CPU one thread is measured, by the time for which its core is at work: other jobs that run meanwhile take time from
it, but hardly change that number. A threaded call among other jobs would wait for whichever core is busy.
"""

from __future__ import annotations

import functools
import itertools
import platform
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_nrpm.config import Estimator, NRPMConfig
from timm_nrpm.evaluation.machine import ATTENTION, CURVED, ELEMENTWISE, POOLED, WEIGHTS, Machine, Rates, amount_of
from timm_nrpm.evaluation.stopwatch import seconds_of
from timm_nrpm.models.work import work_of
from timm_nrpm.nn.layers import reprogram_layer_

SLICE = 0.03
"""Seconds that each probe may take, of which there are fourteen, and twenty more for an estimate."""

STEPS = (1, 3)
"""The paper's K of the probes, since the time of an estimate is linear in K."""

OTHERS = 1 << 23
"""Bytes that are written before each call of a probe, more than a core's own cache holds: between two calls of a layer,
a model computes all its others."""

DEEP = 16
"""Number of layers with many weights that one probe calls in turn, since no cache holds 38 MB for long."""


def machine_of(device: torch.device, dtype: torch.dtype, estimator: Estimator | None) -> Machine:
    """Measure this machine; what was measured before in this process is not measured again.

    Args:
        device: Device of the model.
        dtype: Floating-point type of its weights.
        estimator: Settings of the estimate; None to measure plain operations alone.
    """
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    plain, other = _plain_rates(device, dtype)
    name = name_of(device)
    if estimator is None:
        return Machine(device.type, threads, 0, plain, None, other, name)
    few, many = _estimate_rates(device, dtype, estimator._replace(iterations=STEPS[0]))
    estimate = _with_steps(few, many, estimator.iterations)
    return Machine(device.type, threads, estimator.iterations, plain, estimate, other, name)


def name_of(device: torch.device) -> str:
    """Name of a GPU, or of this machine's processor; empty if the system does not tell.

    Example:
        >>> isinstance(name_of(torch.device("cpu")), str)
        True
    """
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def _with_steps(few: Rates, many: Rates, steps: int) -> Rates:
    """Rates of the estimate with any number of steps, from those with few and with many (STEPS)."""

    def seconds(kind: str) -> float:
        first = 1 / few.rates[kind]
        return first + max(0.0, 1 / many.rates[kind] - first) * (steps - STEPS[0]) / (STEPS[1] - STEPS[0])

    return Rates(few.call, {kind: 1 / seconds(kind) for kind in few.rates})


@functools.cache
def _plain_rates(device: torch.device, dtype: torch.dtype) -> tuple[Rates, Rates]:
    """Rates of plain layers, and of what is between layers."""
    with _probing(device):
        return _layer_rates(device, dtype, None), _other_rates(device, dtype)


@functools.cache
def _estimate_rates(device: torch.device, dtype: torch.dtype, estimator: Estimator) -> tuple[Rates, Rates]:
    """Rates of layers with few steps of the estimate, and with many (STEPS)."""
    with _probing(device):
        few, many = (_layer_rates(device, dtype, estimator._replace(iterations=steps)) for steps in STEPS)
    return few, many


@contextmanager
def _probing(device: torch.device) -> Iterator[None]:
    """Compute in one thread and without gradients; random numbers and the number of threads stay what they were."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        torch.set_num_threads(threads)


def _layers() -> list[tuple[nn.Module, Tensor]]:
    """A typical layer of each kind, and an input of it."""
    last = torch.zeros(1, 64, 28, 28).to(memory_format=torch.channels_last)
    return [
        (nn.Conv2d(64, 64, 3, padding=1), torch.zeros(1, 64, 28, 28)),
        (nn.Conv2d(64, 64, 3, padding=1, groups=4), torch.zeros(1, 64, 28, 28)),
        (nn.Conv2d(192, 64, 1), torch.zeros(1, 192, 28, 28)),
        (nn.Conv2d(128, 128, 3, padding=1, groups=128), torch.zeros(1, 128, 28, 28)),
        (nn.Conv2d(512, 512, 5, padding=2, groups=512), torch.zeros(1, 512, 7, 7)),
        (nn.Conv2d(64, 64, 7, padding=3, groups=64), last),
        (nn.Linear(192, 384), torch.zeros(1, 196, 192)),
        (nn.Linear(512, 1000), torch.zeros(1, 512)),
    ]


def _layer_rates(device: torch.device, dtype: torch.dtype, estimator: Estimator | None) -> Rates:
    """Rates of layers, plain or with the estimate."""

    def made(layer: nn.Module) -> nn.Module:
        if estimator is not None:
            iterations, eps, penalty, delta, gamma = estimator
            config = NRPMConfig(0.5, iterations, eps, penalty, delta=delta, gamma=gamma)
            reprogram_layer_(layer, config, 0.5)
        return layer.to(device, dtype)

    def seconds(work: Callable[[Tensor], Tensor], x: Tensor) -> float:
        return _timed(work, torch.randn_like(x, device=device, dtype=dtype))

    call = seconds(made(nn.Conv2d(8, 8, 1)), torch.zeros(1, 8, 4, 4))
    rates: dict[str, float] = {}
    for layer, x in _layers():
        (work,) = work_of(layer, x).layers
        rates[work.kind] = _rate(amount_of(work, estimator is not None), seconds(made(layer), x), call)
    layers, x = [nn.Linear(512, 1152) for _ in range(DEEP)], torch.zeros(1, 49, 512)
    (work,) = work_of(layers[0], x).layers
    turns = itertools.cycle([made(layer) for layer in layers])
    warm = call + work.products / rates[work.kind]
    rates[WEIGHTS] = _rate(work.weights, seconds(lambda x: next(turns)(x), x), warm)
    return Rates(call, rates)


def _other_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """Rates of what is between the layers: BatchNorm, GELU, pooling and attention stand for the rest."""

    def seconds(work: Callable[[Tensor], Tensor], *shape: int) -> float:
        return _timed(work, torch.randn(shape, device=device, dtype=dtype))

    norms = [nn.BatchNorm2d(channels).eval().to(device, dtype) for channels in (8, 64)]
    call = seconds(norms[0], 1, 8, 2, 2)
    amounts: dict[str, tuple[int, Callable[[Tensor], Tensor], tuple[int, ...]]] = {
        ELEMENTWISE: (2 * 64 * 56 * 56, norms[1], (1, 64, 56, 56)),
        CURVED: (196 * 768, F.gelu, (196, 768)),
        POOLED: (9 * 64 * 28 * 28, lambda x: F.max_pool2d(x, 3, 2, 1), (1, 64, 56, 56)),
        ATTENTION: (
            2 * 3 * 196 * 196 * 64,
            lambda x: F.scaled_dot_product_attention(x, x, x),
            (1, 3, 196, 64),
        ),
    }
    rates = {kind: _rate(amount, seconds(work, *shape), call) for kind, (amount, work, shape) in amounts.items()}
    return Rates(call, rates)


def _rate(amount: int, seconds: float, known: float) -> float:
    """Amount of work a second in a call, of whose time a part is known to be something else.

    At least a twentieth is taken to be this work, since a clock is not exact.
    """
    return amount / max(seconds - known, seconds / 20, 1e-9)


def _timed(work: Callable[[Tensor], Tensor], x: Tensor) -> float:
    """Median seconds of calls, each after the caches were filled with something else.

    Of the many layers in a forward, even the fastest one, most take their usual time, and few their shortest.
    """
    others = np.zeros(OTHERS, np.uint8)
    return statistics.median(seconds_of(lambda: wait_for(work(x)), SLICE, prepare=lambda: others.fill(1)))


def wait_for(result: Any) -> None:
    """Wait until the device that computes a result is done."""
    if isinstance(result, Tensor) and result.is_cuda:
        torch.cuda.synchronize(result.device)
