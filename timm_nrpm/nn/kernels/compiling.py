"""How `estimate.cpp` becomes a library: compiled by the machine's own compiler, and kept in a cache folder.

Compiling takes a few seconds. The library's name says what it is made from and for (source, compiler, instruction set,
C library), so that a new version, another machine or another torch never meets an old one; and it says the hash of its
own content, since loading a library that is cut short kills the process. It is put there by renaming, so that processes
that start together do not disturb each other.
"""

from __future__ import annotations

import atexit
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch
from platformdirs import user_cache_path

from timm_nrpm.errors import CompilationError

SOURCE = Path(__file__).with_name("estimate.cpp")
HEADER = Path(__file__).with_name("panel.h")
SECONDS = 120  # for the compiler; it needs four

# The instruction sets that torch itself tells apart. Not -march=native: the cache may be shared by unlike machines.
INSTRUCTIONS = {
    "AVX512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mprefer-vector-width=512"],
    "AVX2": ["-mavx2", "-mfma"],
}


def cache_folder() -> Path:
    """Where compiled kernels are kept: `TIMM_NRPM_CACHE`, or timm_nrpm in the user's cache folder.

    What lies there is executed. So a folder or file that others could have written does not count.

    Raises:
        RuntimeError: The user has no home.
    """
    if given := os.environ.get("TIMM_NRPM_CACHE"):
        return Path(given)
    folder = user_cache_path("timm_nrpm", appauthor=False)
    if not folder.is_absolute():
        raise RuntimeError(f"This user has no home, in which the cache would be: {folder}.")
    return folder


def folders() -> Iterator[Path]:
    """The cache folder, and one for this process alone: for a machine without a writable home, or with a full one."""
    with suppress(RuntimeError):  # there is no home
        yield cache_folder()
    alone = Path(tempfile.mkdtemp(prefix="timm_nrpm-"))
    atexit.register(shutil.rmtree, alone, ignore_errors=True)
    yield alone


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


def build(folder: Path, cxx: list[str]) -> Path:
    """The compiled library in `folder`, from before or made now.

    Args:
        folder: It need not exist.
        cxx: The command that compiles.

    Raises:
        CompilationError: The compiler failed.
        subprocess.TimeoutExpired: It was not done after SECONDS.
        OSError: The library cannot be written or trusted.
    """
    flags = ["-O3", "-std=c++17", "-fopenmp", "-fPIC", "-shared", "-w"]
    flags += INSTRUCTIONS.get(torch.backends.cpu.get_cpu_capability(), [])
    command = [*cxx, *flags]
    made_from = [SOURCE.read_text(), HEADER.read_text(), *command, _target(command)]
    start = f"estimate-{_hash(chr(0).join(made_from).encode())}-"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    _check_owner(folder)
    for path in folder.glob(f"{start}*.so"):
        _check_owner(path)
        if path.stem == start + _hash(path.read_bytes()):
            return path
    return _compile(command, folder, start)


def _compile(command: list[str], folder: Path, start: str) -> Path:
    """A new library whose name begins with `start`, in `folder` all at once."""
    for abandoned in folder.glob("compiling-*"):
        if time.time() - abandoned.stat().st_mtime > 2 * SECONDS:
            abandoned.unlink(missing_ok=True)
    handle, name = tempfile.mkstemp(prefix="compiling-", suffix=".so", dir=folder)
    os.close(handle)
    draft = Path(name)
    try:
        _run([*command, str(SOURCE), "-o", name])
        os.chmod(draft, 0o755)
        path = folder / f"{start}{_hash(draft.read_bytes())}.so"
        _to_disk(draft)  # before it has its name, which a crash of the machine would leave without content
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
    return path


def _target(command: list[str]) -> str:
    """What the machine code is for: all that the compiler predefines, such as its version and the instruction set.

    A CXX with -march=native, and a compiler that is built to choose it, differ in this from machine to machine.
    """
    macros = _run([*command, "-dM", "-E", "-x", "c++", os.devnull])
    libc = os.confstr("CS_GNU_LIBC_VERSION") if "CS_GNU_LIBC_VERSION" in getattr(os, "confstr_names", {}) else ""
    return "\0".join([macros, platform.machine(), sys.platform, libc or ""])


def _run(command: list[str]) -> str:
    """What a compiler prints."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    if done.returncode:
        raise CompilationError(f"{command[0]} failed: {done.stderr.strip()[:500]}")
    return done.stdout


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _to_disk(path: Path) -> None:
    """Wait until the content of a file is on the disk, which is also when a full one says so."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _check_owner(path: Path) -> None:
    status = path.stat()
    if status.st_uid not in (os.geteuid(), 0) or status.st_mode & 0o022:
        raise PermissionError(f"{path} can be written by others")
