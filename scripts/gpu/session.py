"""What a part is given, and where its rows go: on disk at once, so that a crash loses nothing that was measured."""

from __future__ import annotations

import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

Work = Callable[[], Any]
FATAL = ("illegal memory access", "device-side assert", "unspecified launch failure", "misaligned address")
"""Errors after which a process can use its GPU no more."""


@dataclass
class Session:
    """The rows of one part.

    Attributes:
        file: JSON file of the rows.
        device: `"cuda"` or `"cpu"`.
        quick: Whether sizes are tiny, so that only the script itself is tried.
        deadline: Time, as `time.time()` counts, at which the part should be done.
        share: Index of this process and number of processes that share the part.
        tables: Rows by the name of their table.
        left_out: What was not measured, with the reason.
    """

    file: Path
    device: str
    quick: bool
    deadline: float
    share: tuple[int, int] = (0, 1)
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)

    def add(self, table: str, **row: Any) -> None:
        """Add a row; the keys are the headers of the table's columns, units included."""
        self.tables.setdefault(table, []).append(row)
        self.write()

    def leave_out(self, what: str, why: str) -> None:
        self.left_out.append(f"{what}: {why}")
        self.write()

    def write(self) -> None:
        draft = self.file.with_suffix(".draft")
        draft.write_text(json.dumps({"tables": self.tables, "left_out": self.left_out}))
        draft.replace(self.file)

    @property
    def runs_triton(self) -> bool:
        """Whether kernels can run: on a GPU, or by Triton's interpreter, which is slow and for trying the script."""
        return self.device == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"

    def seconds_left(self) -> float:
        return self.deadline - time.time()

    @contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """Run a block that measures `what`; if it raises an exception, it is left out, with the exception's message."""
        try:
            yield
        except OutOfTime as error:
            self.leave_out(what, str(error))
        except Exception as error:
            if any(text in str(error) for text in FATAL):
                self.leave_out(what, f"{type(error).__name__}, which ended this part: {error}")
                raise
            first = (str(error).strip() or "no message").splitlines()[0]
            self.leave_out(what, f"{type(error).__name__}: {first[:300]}")
        finally:
            if self.device == "cuda":
                torch.cuda.empty_cache()

    def need(self, seconds: float) -> None:
        """Raise OutOfTime if less time than this is left."""
        if self.seconds_left() < seconds:
            raise OutOfTime(f"{self.seconds_left():.0f} s were left, and it takes about {seconds:.0f} s")

    def wait(self) -> None:
        """Wait until the device has done all work."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def _time(self, work: Work, calls: int) -> float:
        """Seconds for each of a number of consecutive calls."""
        if self.device == "cuda":
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(calls):
                work()
            stop.record()
            stop.synchronize()
            return start.elapsed_time(stop) / 1000 / calls
        began = time.perf_counter()
        for _ in range(calls):
            work()
        return (time.perf_counter() - began) / calls

    def medians(self, works: dict[str, Work], seconds: float = 1.0) -> dict[str, float]:
        """Median seconds of a call of each work; the works take turns.

        Args:
            works: Functions to time, by name. Each is called twice before, which compiles and tunes its kernels.
            seconds: Time for all of them together, without the first calls.
        """
        calls, spent = {}, 0.0
        for name, work in works.items():
            work()
            self.wait()
            once = self._time(work, 1)
            calls[name] = max(1, min(100, math.ceil(2e-3 / max(once, 1e-6))))
            spent += once * calls[name]
        if self.quick:
            seconds = 0.0
        rounds = max(3, min(30, int(seconds / spent)))
        times: dict[str, list[float]] = {name: [] for name in works}
        for _ in range(rounds):
            for name, work in works.items():
                times[name].append(self._time(work, calls[name]))
        return {name: statistics.median(values) for name, values in times.items()}

    def first_call(self, work: Work) -> float:
        """Seconds of the very first call, in which kernels are compiled and tiles are tried."""
        self.wait()
        began = time.perf_counter()
        work()
        self.wait()
        return time.perf_counter() - began

    def peak_mib(self, work: Work) -> float | None:
        """MiB that a call allocates on top of those held before it; None on the CPU, where nobody counts."""
        if self.device != "cuda":
            return None
        self.wait()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        self.wait()
        return (torch.cuda.max_memory_allocated() - before) / 2**20

    def graphed(self, work: Work) -> Work:
        """The work as a CUDA graph, without the time that Python takes to start its kernels; itself on the CPU."""
        if self.device != "cuda":
            return work
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                work()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            graph.held = work()  # type: ignore[attr-defined]
        return graph.replay


class OutOfTime(Exception):
    """The part's time box does not hold a measurement."""
