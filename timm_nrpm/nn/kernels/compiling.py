"""Compilation of `estimate.cpp` to a library, by the machine's own compiler, in a cache folder.

Compiling takes a few seconds. The library's name holds a hash of what it is made from and for (source, compiler,
instruction set, C library), so that a new version, another machine or another torch never loads an old one. It also
holds a hash of the library's content, since loading a truncated library kills the process. The library is moved into
place by renaming, so that processes that start together do not disturb each other.
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

from timm_nrpm.errors import CompilationError

SOURCE = Path(__file__).with_name("estimate.cpp")
HEADERS = sorted(SOURCE.parent.glob("*.h"))
SECONDS = 120  # time limit of the compiler, which needs four

# The instruction sets that torch itself tells apart. Not -march=native: the cache may be shared by unlike machines.
INSTRUCTIONS = {
    "AVX512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mprefer-vector-width=512"],
    "AVX2": ["-mavx2", "-mfma"],
}


def cache_folder() -> Path:
    """The folder of compiled kernels: `TIMM_NRPM_CACHE`, or timm_nrpm in the user's cache folder.

    Its files are executed, so a folder or file that other users could have written is not used.

    Raises:
        RuntimeError: The user has no home directory.
    """
    if given := os.environ.get("TIMM_NRPM_CACHE"):
        return Path(given)
    from platformdirs import user_cache_path  # which no other part of the package needs

    folder = user_cache_path("timm_nrpm", appauthor=False)
    if not folder.is_absolute():
        raise RuntimeError(f"This user has no home directory for the cache, {folder}: set TIMM_NRPM_CACHE to a folder.")
    return folder


def folders() -> Iterator[Path]:
    """The cache folder, then a temporary one of this process, for a machine whose home is full or not writable."""
    with suppress(RuntimeError):  # there is no home
        yield cache_folder()
    temporary = Path(tempfile.mkdtemp(prefix="timm_nrpm-"))
    atexit.register(shutil.rmtree, temporary, ignore_errors=True)
    yield temporary


def compiler() -> list[str]:
    """The command of the C++ compiler: `CXX`, or the first of g++, c++ and clang++ that is installed.

    Raises:
        CompilationError: There is no compiler.
    """
    candidates = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "c++", "clang++"]
    for candidate in candidates:
        words = shlex.split(candidate)
        if words and (path := shutil.which(words[0])):
            return [path, *words[1:]]
    raise CompilationError(f"no C++ compiler was found (looked for {', '.join(candidates)})")


def build(folder: Path, cxx: list[str]) -> Path:
    """Path of the compiled library in `folder`, which is compiled now if it is not there yet.

    Args:
        folder: Folder of the library, which need not exist.
        cxx: Command of the C++ compiler.

    Raises:
        CompilationError: The compiler failed.
        subprocess.TimeoutExpired: The compiler was not done after SECONDS.
        OSError: The library cannot be written, or other users could have written it.
    """
    flags = ["-O3", "-std=c++17", "-fopenmp", "-fPIC", "-shared", "-w"]
    flags += INSTRUCTIONS.get(torch.backends.cpu.get_cpu_capability(), [])
    command = [*cxx, *flags]
    made_from = [*(path.read_text() for path in (SOURCE, *HEADERS)), *command, _target(command)]
    prefix = f"estimate-{_hash(chr(0).join(made_from).encode())}-"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    _check_owner(folder)
    for path in folder.glob(f"{prefix}*.so"):
        _check_owner(path)
        if path.stem == prefix + _hash(path.read_bytes()):
            return path
    return _compile(command, folder, prefix)


def _compile(command: list[str], folder: Path, prefix: str) -> Path:
    """Path of a new library whose name begins with `prefix`, which appears in `folder` when it is complete."""
    for abandoned in folder.glob("compiling-*"):
        if time.time() - abandoned.stat().st_mtime > 2 * SECONDS:
            abandoned.unlink(missing_ok=True)
    handle, name = tempfile.mkstemp(prefix="compiling-", suffix=".so", dir=folder)
    os.close(handle)
    draft = Path(name)
    try:
        _run([*command, str(SOURCE), "-o", name])
        os.chmod(draft, 0o755)
        path = folder / f"{prefix}{_hash(draft.read_bytes())}.so"
        _to_disk(draft)  # before renaming: after a crash of the machine the name might exist without the content
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
    return path


def _target(command: list[str]) -> str:
    """What the machine code is compiled for: the compiler's predefined macros, the platform and the C library.

    The macros give the compiler's version and the instruction set, which differs from machine to machine with
    -march=native in CXX or in the compiler's defaults.
    """
    macros = _run([*command, "-dM", "-E", "-x", "c++", os.devnull])
    libc = os.confstr("CS_GNU_LIBC_VERSION") if "CS_GNU_LIBC_VERSION" in getattr(os, "confstr_names", {}) else ""
    return "\0".join([macros, platform.machine(), sys.platform, libc or ""])


def _run(command: list[str]) -> str:
    """The standard output of a compiler."""
    process = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    if process.returncode:
        raise CompilationError(f"{command[0]} failed: {process.stderr.strip()[:500]}")
    return process.stdout


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _to_disk(path: Path) -> None:
    """Wait until the content of a file is on the disk; a full disk may raise its OSError only here."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _check_owner(path: Path) -> None:
    status = path.stat()
    if status.st_uid not in (os.geteuid(), 0) or status.st_mode & 0o022:
        raise PermissionError(f"{path} can be written by other users")
