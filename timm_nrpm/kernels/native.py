"""The estimator on the CPU in float32: `estimate.cpp`, compiled once a machine by its own C++ compiler.

Compiling takes a few seconds. The library is kept in a cache folder under a name that says which source, compiler and
instruction set it is made from, so that a new version, another machine or another torch never meet an old one, and put
there by renaming, so that processes that start together do not disturb each other.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import hashlib
import math
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path

import torch
from torch import Tensor

from timm_nrpm.estimator import Penalty
from timm_nrpm.kernels.convolution import Convolution, empty_gradients, empty_results, state_as, strided_as

SOURCE = Path(__file__).with_name("estimate.cpp")
HEADER = Path(__file__).with_name("panel.h")
SECONDS = 120  # for the compiler; it needs four

# The instruction sets that torch itself tells apart. Not -march=native: the cache may be shared by unlike machines.
INSTRUCTIONS = {
    "AVX512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mprefer-vector-width=512"],
    "AVX2": ["-mavx2", "-mfma"],
}

Pointer, Integer = ctypes.c_void_p, ctypes.c_int

_lock = threading.Lock()  # the first call compiles, others wait


class SlowPathWarning(UserWarning):
    """The CPU kernels could not be compiled, so the slow path serves."""


class CompilationError(RuntimeError):
    """There is no compiler, or it failed."""


def cache_folder() -> Path:
    """Where compiled kernels are kept: `TIMM_NRPM_CACHE`, or timm_nrpm in the user's cache folder.

    What lies there is executed. So a folder or file that others could have written does not count, and then, as where
    there is no writable home, the kernels are compiled into a folder for this process alone.
    """
    if given := os.environ.get("TIMM_NRPM_CACHE"):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "timm_nrpm"


def _cache() -> Path:
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    _check_owner(folder)
    return folder


def _temporary() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="timm_nrpm-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _check_owner(path: Path) -> None:
    status = path.stat()
    if status.st_uid not in (os.geteuid(), 0) or status.st_mode & 0o022:
        raise PermissionError(f"{path} can be written by others")


def compiler() -> list[str]:
    """The command that compiles C++: `CXX`, or the first that is there.

    Raises:
        CompilationError: None is.
    """
    candidates = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "c++", "clang++"]
    for candidate in candidates:
        words = shlex.split(candidate)
        if words and (path := shutil.which(words[0])):
            return [path, *words[1:]]
    raise CompilationError(f"no C++ compiler was found (looked for {', '.join(candidates)})")


def build(folder: Path) -> Path:
    """The compiled library in `folder`, from before or made now.

    Raises:
        CompilationError: There is no compiler, or it failed.
        OSError: The library cannot be written or trusted.
    """
    cxx = compiler()
    flags = ["-O3", "-std=c++17", "-fopenmp", "-fPIC", "-shared", "-w"]
    flags += INSTRUCTIONS.get(torch.backends.cpu.get_cpu_capability(), [])
    where = [platform.machine(), sys.platform, str(os.stat(cxx[0]).st_mtime_ns)]
    made_from = [SOURCE.read_text(), HEADER.read_text(), *cxx, *flags, *where]
    path = folder / f"estimate-{hashlib.sha256(chr(0).join(made_from).encode()).hexdigest()[:16]}.so"
    if path.exists():
        _check_owner(path)
        return path
    for abandoned in folder.glob("compiling-*"):
        if time.time() - abandoned.stat().st_mtime > 2 * SECONDS:
            abandoned.unlink(missing_ok=True)
    handle, temporary = tempfile.mkstemp(prefix="compiling-", suffix=".so", dir=folder)
    os.close(handle)
    try:
        command = [*cxx, *flags, str(SOURCE), "-o", temporary]
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
        if done.returncode:
            raise CompilationError(f"{shlex.join(cxx)} failed: {done.stderr.strip()[:500]}")
        os.chmod(temporary, 0o755)
        os.replace(temporary, path)
    except subprocess.TimeoutExpired as error:
        raise CompilationError(f"{shlex.join(cxx)} was not done after {SECONDS} s") from error
    finally:
        Path(temporary).unlink(missing_ok=True)
    return path


def _load(folder: Path) -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(build(folder)))
    loaded.nrpm_forward.argtypes = [Pointer, Pointer, Integer, *[Pointer] * 5, Integer]
    loaded.nrpm_backward.argtypes = [Pointer, Pointer, Integer, *[Pointer] * 8, Integer]
    loaded.nrpm_limit.argtypes = [Pointer, ctypes.c_int64, ctypes.c_int64, Integer]
    loaded.nrpm_forward.restype = loaded.nrpm_backward.restype = None
    loaded.nrpm_limit.restype = ctypes.c_float
    return loaded


@functools.cache
def _loaded() -> ctypes.CDLL | None:
    try:
        try:
            return _load(_cache())
        except CompilationError:
            raise
        except (OSError, RuntimeError, AttributeError):  # no home, a full disk, noexec, a file cut short
            return _load(_temporary())
    except (CompilationError, OSError, AttributeError) as error:
        warnings.warn(
            f"The fast CPU kernels are not available: {error}. The same numbers come from a path that is ten times "
            "slower. Install g++ (or name a compiler in CXX) to have them.",
            SlowPathWarning,
            stacklevel=3,
        )
        return None


def library() -> ctypes.CDLL | None:
    """The kernels, compiled if need be; None, after one :class:`SlowPathWarning`, where that cannot be done."""
    with _lock:
        return _loaded()


def serves(x: Tensor) -> bool:
    """Whether these kernels can take `x`."""
    return x.device.type == "cpu" and x.dtype == torch.float32 and library() is not None


def forward(
    x: Tensor, weight: Tensor, plain: Tensor, conv: Convolution, iterations: int, penalty: Penalty, keep: bool
) -> tuple[Tensor, Tensor]:
    """See :func:`timm_nrpm.kernels.operator.robust_sum`."""
    out, state = empty_results(plain, iterations, keep)
    if not out.numel():
        return out, state
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
    if not out.numel():
        return grad_x.zero_(), grad_weight.zero_()
    state = state_as(state, out)
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
