"""The estimator on the CPU in float32: `estimate.cpp`, compiled once a machine by its own C++ compiler.

Compiling takes a few seconds. The library is kept in a cache folder under a name that says which source, compiler and
instruction set it is made from, so that a new version, another machine or another torch never meet an old one, and put
there by renaming, so that processes that start together do not disturb each other.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import hashlib
import math
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from torch import Tensor

from timm_nrpm.estimator import Penalty
from timm_nrpm.kernels.convolution import Convolution, empty_gradients, empty_results, strided_as

SOURCE = Path(__file__).with_name("estimate.cpp")
HEADER = Path(__file__).with_name("panel.h")
SECONDS = 120  # for the compiler; it needs three

# The instruction sets that torch itself tells apart. Not -march=native: the cache may be shared by unlike machines.
INSTRUCTIONS = {
    "AVX512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mprefer-vector-width=512"],
    "AVX2": ["-mavx2", "-mfma"],
}

Pointer, Integer = ctypes.c_void_p, ctypes.c_int


class SlowPathWarning(UserWarning):
    """The CPU kernels could not be compiled, so the slow path serves."""


def cache_folder() -> Path:
    """Where compiled kernels are kept: `TIMM_NRPM_CACHE`, or timm_nrpm in the user's cache folder."""
    if given := os.environ.get("TIMM_NRPM_CACHE"):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "timm_nrpm"


def _writable_cache() -> Path:
    """The cache folder, or one for this process alone where that cannot be written."""
    folder = cache_folder()
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    temporary = Path(tempfile.mkdtemp(prefix="timm_nrpm-"))
    atexit.register(shutil.rmtree, temporary, ignore_errors=True)
    return temporary


def compiler() -> str:
    candidates = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "c++", "clang++"]
    for candidate in candidates:
        if path := shutil.which(candidate):
            return path
    raise OSError(f"no C++ compiler was found (looked for {', '.join(candidates)})")


def build() -> Path:
    """The compiled library, from the cache or made now.

    Raises:
        OSError: There is no compiler, it failed, or the library cannot be written.
    """
    cxx = compiler()
    flags = ["-O3", "-std=c++17", "-fopenmp", "-fPIC", "-shared", "-w"]
    flags += INSTRUCTIONS.get(torch.backends.cpu.get_cpu_capability(), [])
    made_from = [SOURCE.read_text(), HEADER.read_text(), cxx, str(os.stat(cxx).st_mtime_ns), *flags, sys.platform]
    name = f"estimate-{hashlib.sha256(chr(0).join(made_from).encode()).hexdigest()[:16]}.so"
    if (cache_folder() / name).exists():
        return cache_folder() / name
    path = _writable_cache() / name
    handle, temporary = tempfile.mkstemp(suffix=".so", dir=path.parent)
    os.close(handle)
    try:
        command = [cxx, *flags, str(SOURCE), "-o", temporary]
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
        if done.returncode:
            raise OSError(f"{cxx} failed: {done.stderr.strip()[:500]}")
        os.replace(temporary, path)
    except subprocess.TimeoutExpired as error:
        raise OSError(f"{cxx} was not done after {SECONDS} s") from error
    finally:
        Path(temporary).unlink(missing_ok=True)
    return path


def _load() -> ctypes.CDLL:
    path = build()
    try:
        return ctypes.CDLL(str(path))
    except OSError:  # cut short by a full disk, say: once more
        path.unlink(missing_ok=True)
        return ctypes.CDLL(str(build()))


@functools.cache
def library() -> ctypes.CDLL | None:
    """The kernels, compiled if need be; None, after one :class:`SlowPathWarning`, where that cannot be done."""
    try:
        loaded = _load()
    except OSError as error:
        warnings.warn(
            f"The fast CPU kernels are not available: {error}. The same numbers come from a path that is ten times "
            "slower. Install g++ (or name a compiler in CXX) to have them.",
            SlowPathWarning,
            stacklevel=2,
        )
        return None
    loaded.nrpm_forward.argtypes = [Pointer, Pointer, Integer, *[Pointer] * 5, Integer]
    loaded.nrpm_backward.argtypes = [Pointer, Pointer, Integer, *[Pointer] * 8, Integer]
    loaded.nrpm_limit.argtypes = [Pointer, ctypes.c_int64, ctypes.c_int64, Integer]
    loaded.nrpm_forward.restype = loaded.nrpm_backward.restype = None
    loaded.nrpm_limit.restype = ctypes.c_float
    return loaded


def serves(x: Tensor) -> bool:
    """Whether these kernels can take `x`."""
    return x.device.type == "cpu" and x.dtype == torch.float32 and library() is not None


def forward(
    x: Tensor, weight: Tensor, plain: Tensor, conv: Convolution, iterations: int, penalty: Penalty, keep: bool
) -> tuple[Tensor, Tensor]:
    """See :func:`timm_nrpm.kernels.operator.robust_sum`."""
    out, state = empty_results(plain, iterations, keep)
    weight, plain = weight.contiguous(), strided_as(plain, out)
    _call(
        "nrpm_forward",
        _describe(x, weight, out, conv, iterations),
        penalty,
        (x, weight, plain, out, state if keep else None),
    )
    return out, state


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    plain: Tensor,
    out: Tensor,
    state: Tensor,
    conv: Convolution,
    iterations: int,
    penalty: Penalty,
    needs: tuple[bool, bool],
) -> tuple[Tensor, Tensor]:
    """See :func:`timm_nrpm.kernels.operator.robust_sum_backward`."""
    grad_x, grad_weight = empty_gradients(x, weight, *needs)
    # The input is read with the strides of its gradient, which are its own unless elements overlap or are spread out.
    x, plain, grad = strided_as(x, grad_x if needs[0] else x), strided_as(plain, out), strided_as(grad, out)
    _call(
        "nrpm_backward",
        _describe(x, weight, out, conv, iterations),
        penalty,
        (
            *(x, weight.contiguous(), plain, out, state, grad),
            *(
                gradient.zero_() if needed else None
                for gradient, needed in zip((grad_x, grad_weight), needs, strict=True)
            ),
        ),
    )
    return grad_x, grad_weight


def _call(name: str, description: list[int], penalty: Penalty, tensors: tuple[Tensor | None, ...]) -> None:
    kernels = library()
    assert kernels is not None  # else another implementation serves
    getattr(kernels, name)(
        (ctypes.c_int64 * len(description))(*description),
        (ctypes.c_float * 5)(*penalty.numbers),
        penalty != Penalty(penalty.eps),  # anything but l1
        *[None if tensor is None else tensor.data_ptr() for tensor in tensors],
        torch.get_num_threads(),
    )


def _describe(x: Tensor, weight: Tensor, out: Tensor, conv: Convolution, iterations: int) -> list[int]:
    """The struct `Conv` of estimate.cpp."""
    groups, image, sums = conv.groups, list(x.shape[2:]), list(out.shape[2:])
    if conv.is_pointwise(weight) and all(t.stride(2) == t.shape[3] * t.stride(3) for t in (x, out)):
        image = sums = [1, math.prod(image)]  # rows that follow each other are one long row
    return [
        *(len(x), groups, x.shape[1] // groups, len(weight) // groups, *image, *sums),
        *(*weight.shape[2:], *conv.stride, *conv.padding, *conv.dilation),
        *(*x.stride(), *out.stride(), iterations),
    ]


def limit(numbers: Tensor, rounds: int, threads: int) -> float:
    """Run the loop that the benchmark takes for the limit of the machine: see `nrpm_limit` in estimate.cpp.

    Args:
        numbers: `[N]`, float32; few enough for the first-level cache, a multiple of 64.
    """
    kernels = library()
    assert kernels is not None
    return kernels.nrpm_limit(numbers.data_ptr(), len(numbers), rounds, threads)
