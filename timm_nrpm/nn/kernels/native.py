"""The estimator on the CPU in float32: `estimate.cpp`, compiled once per machine by the machine's own compiler."""

from __future__ import annotations

import ctypes
import functools
import math
import subprocess
import threading
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from timm_nrpm.errors import CompilationError, SlowPathWarning
from timm_nrpm.nn.estimator import Penalty
from timm_nrpm.nn.kernels.compiling import build, compiler, folders
from timm_nrpm.nn.kernels.convolution import Convolution, in_planes, strided_as

Pointer, Integer, Number = ctypes.c_void_p, ctypes.c_int, ctypes.c_float

_lock = threading.Lock()  # the first call compiles, and others wait for it


def _load(path: Path) -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(path))
    loaded.nrpm_forward.argtypes = [Pointer, Pointer, Integer, Number, *[Pointer] * 4, Integer]
    loaded.nrpm_backward.argtypes = [Pointer, Pointer, Integer, Number, *[Pointer] * 6, Integer]
    loaded.nrpm_limit.argtypes = [Pointer, ctypes.c_int64, ctypes.c_int64, Integer, Integer]
    loaded.nrpm_forward.restype = loaded.nrpm_backward.restype = None
    loaded.nrpm_limit.restype = ctypes.c_float
    return loaded


@functools.cache
def _loaded() -> ctypes.CDLL | None:
    reason: Exception | None = None
    try:
        cxx = compiler()
        for folder in folders():
            try:
                return _load(build(folder, cxx))
            except (CompilationError, OSError, AttributeError) as error:  # such as a full disk, or noexec
                reason = error
    except (CompilationError, OSError, subprocess.TimeoutExpired) as error:
        reason = error
    warnings.warn(
        f"The fast CPU kernels are not available: {reason}. The same numbers are computed ten times more slowly. "
        "Install g++, or name a C++ compiler in the environment variable CXX, to have the fast kernels.",
        SlowPathWarning,
        stacklevel=3,
    )
    return None


def library() -> ctypes.CDLL | None:
    """The kernels, compiled if need be; None, after one :class:`SlowPathWarning`, if that is not possible."""
    with _lock:
        return _loaded()


def serves(x: Tensor) -> bool:
    """Whether these kernels can compute on `x`."""
    return x.device.type == "cpu" and x.dtype == torch.float32 and library() is not None


def forward(
    x: Tensor,
    weight: Tensor,
    lam: float,
    out: Tensor,
    state: Tensor,
    conv: Convolution,
    iterations: int,
    penalty: Penalty,
) -> None:
    """Fill `out` and, unless it is empty, `state`; see :func:`timm_nrpm.nn.kernels.operator.mixed_sum`."""
    _call(
        "nrpm_forward",
        _describe(x, weight, out, conv, iterations),
        penalty,
        lam,
        (x, weight.contiguous(), out, state if state.numel() else None),
    )


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    lam: float,
    state: Tensor,
    grad_x: Tensor,
    grad_weight: Tensor,
    conv: Convolution,
    iterations: int,
    penalty: Penalty,
) -> None:
    """Add to the gradients that are not empty; see :func:`timm_nrpm.nn.kernels.operator.mixed_sum_backward`."""
    state = in_planes(state)
    grad = strided_as(grad, state[0])
    gradients = [gradient if gradient.numel() else None for gradient in (grad_x, grad_weight)]
    # The input is read with the strides of its gradient, which are equal unless its elements overlap or have gaps.
    x = x if gradients[0] is None else strided_as(x, grad_x)
    _call(
        "nrpm_backward",
        _describe(x, weight, grad, conv, iterations),
        penalty,
        lam,
        (x, weight.contiguous(), state, grad, *gradients),
    )


def _call(name: str, description: list[int], penalty: Penalty, lam: float, tensors: Sequence[Tensor | None]) -> None:
    kernels = library()
    assert kernels is not None  # otherwise `serves` chose another implementation
    getattr(kernels, name)(
        (ctypes.c_int64 * len(description))(*description),
        (ctypes.c_float * 5)(*penalty.numbers),
        penalty != Penalty(penalty.eps),  # anything but l1
        lam,
        *[None if tensor is None else tensor.data_ptr() for tensor in tensors],
        torch.get_num_threads(),
    )


def _describe(x: Tensor, weight: Tensor, out: Tensor, conv: Convolution, iterations: int) -> list[int]:
    """The fields of the struct `Conv` in panel.h."""
    groups, image, sums = conv.groups, list(x.shape[2:]), list(out.shape[2:])
    if conv.is_pointwise(weight) and all(t.stride(2) == t.shape[3] * t.stride(3) for t in (x, out)):
        image = sums = [1, math.prod(image)]  # contiguous rows are one long row
    return [
        *(len(x), groups, x.shape[1] // groups, len(weight) // groups, *image, *sums),
        *(*weight.shape[2:], *conv.stride, *conv.padding, *conv.dilation),
        *(*x.stride(), *out.stride(), iterations),
    ]


LIMITS = {"forward": (0, 1), "forward for a gradient": (1, 1), "backward": (2, 3)}
"""The passes that `limit` knows: their number in estimate.cpp, and the steps that they make with each number."""


def limit(numbers: Tensor, rounds: int, name: str, threads: int) -> float:
    """Run a loop whose speed the benchmark takes for the machine's limit, see `nrpm_limit` in estimate.cpp.

    Args:
        numbers: Numbers to compute on, `[N]`, float32; N is a multiple of 64, and they fit the first-level cache.
        rounds: Number of passes over the numbers.
        name: The pass whose arithmetic is done, a key of `LIMITS`.
        threads: Number of threads, each of which makes all passes.

    Returns:
        A sum over the results, so that the compiler cannot leave the loop out.
    """
    kernels = library()
    assert kernels is not None
    return kernels.nrpm_limit(numbers.data_ptr(), len(numbers), rounds, LIMITS[name][0], threads)
