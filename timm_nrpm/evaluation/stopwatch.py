"""How long a call takes, and how much memory."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

LEAST = 5  # calls, of which the first one warms up
SLOW = 10  # times the seconds to spend, after which two calls are enough


def clock_of_work() -> Callable[[], float]:
    """The clock that times a model: with one thread and no GPU, the seconds for which the processor was at work, which
    other processes do not change; else those that passed.

    Example:
        >>> clock_of_work()() > 0
        True
    """
    alone = torch.get_num_threads() == 1 and not torch.cuda.is_available()
    return time.thread_time if alone else time.perf_counter


def seconds_of(work: Callable[[], Any], at_least: float, *, prepare: Callable[[], Any] | None = None) -> list[float]:
    """Seconds of each of some calls, without the first one, which warms up.

    With one thread these are the seconds for which the processor was at work, and else those that passed.

    Args:
        work: Function that is called until `at_least` seconds are over, and LEAST times unless it is slow. It waits for
            its device.
        at_least: Seconds to spend, those of `prepare` among them.
        prepare: Function that is called before each call and not timed.

    Example:
        >>> max(seconds_of(lambda: time.sleep(0.01), 0.1)) < 1
        True
    """
    clock = clock_of_work()
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < 2 or time.perf_counter() - begin < at_least * (SLOW if len(times) < LEAST else 1):
        if prepare is not None:
            prepare()
        start = clock()
        work()
        times.append(clock() - start)
    return times[1:]


def resident(field: str) -> int:
    """A field of Linux's /proc/self/status in bytes: VmRSS is the resident memory, VmHWM its peak."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def reset_peak() -> None:
    """Give freed memory back to the system, and let the peak of the resident memory start from what is left."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def peak_bytes(work: Callable[[], Any], device: str) -> int | None:
    """Bytes that a call takes on top of those held before it; None on a CPU where the system does not tell.

    Args:
        work: Function that is called once.
        device: `cpu` or `cuda`.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    try:
        reset_peak()
    except (OSError, AttributeError):  # another system than Linux with glibc
        return None
    before = resident("VmRSS")
    work()
    return max(0, resident("VmHWM") - before)
