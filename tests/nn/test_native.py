"""How the CPU kernels come to be: compiled, kept, done without; each in processes of their own."""

import errno
import hashlib
import os
import pwd
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import torch

from timm_nrpm.nn.functional import nrpm_conv2d
from timm_nrpm.nn.kernels import compiling, native

COMPILER = any(map(shutil.which, ["g++", "c++", "clang++"]))

PROGRAM = """
    import warnings, sys, torch
    warnings.simplefilter("always")
    from timm_nrpm.nn.functional import nrpm_conv2d
    from timm_nrpm.nn.kernels import native
    torch.manual_seed(0)
    x, weight = torch.randn(2, 5, 9, 9, requires_grad=True), torch.randn(7, 5, 3, 3, requires_grad=True)
    own = torch.randn(5, 1, 3, 3)  # depthwise and fixed, so that the gradient is that of x alone
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            out = nrpm_conv2d(x, weight, padding=1, lam=0.2, eps=0.05)
            like = x.to(memory_format=torch.channels_last)
            other = {"penalty": "huber-mcp", "delta": 0.3, "gamma": 1.0}
            out = out + nrpm_conv2d(like, weight, padding=1, lam=0.2, eps=0.05, **other)
            each = nrpm_conv2d(x, own, padding=1, groups=5, lam=0.2, eps=0.05)
            grads = torch.autograd.grad(out.square().sum() + each.square().sum(), (x, weight))
    for w in caught:
        print("WARNING", w.message)
    print("FAST", native.library() is not None)
    torch.save((out.detach(), each.detach(), *grads), sys.argv[1])
"""


def start(tmp_path, name, **environment):
    """A fresh process that computes something and leaves it in a file."""
    environment = {**os.environ, "TIMM_NRPM_CACHE": str(tmp_path / "cache"), **environment}
    command = [sys.executable, "-c", textwrap.dedent(PROGRAM), str(tmp_path / name)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process):
    out, error = process.communicate(timeout=300)
    assert process.returncode == 0, error
    return out.splitlines()


@pytest.fixture
def expected(tmp_path):
    torch.manual_seed(0)
    x, weight = torch.randn(2, 5, 9, 9, requires_grad=True), torch.randn(7, 5, 3, 3, requires_grad=True)
    own = torch.randn(5, 1, 3, 3)
    wide = x.double(), weight.double()
    out = nrpm_conv2d(*wide, padding=1, lam=0.2, eps=0.05)
    out = out + nrpm_conv2d(*wide, padding=1, lam=0.2, eps=0.05, penalty="huber-mcp", delta=0.3, gamma=1.0)
    each = nrpm_conv2d(wide[0], own.double(), padding=1, groups=5, lam=0.2, eps=0.05)
    wanted = out, each, *torch.autograd.grad(out.square().sum() + each.square().sum(), (x, weight))

    def compare(name):
        for value, want in zip(torch.load(tmp_path / name, weights_only=True), wanted, strict=True):
            assert (value.double() - want).norm() < 1e-5 * want.norm()

    return compare


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [("no-such-compiler", "no C++ compiler"), pytest.param("false", "failed", marks=pytest.mark.slow)],
)
def test_without_a_compiler(tmp_path, expected, compiler, reason):
    lines = finish(start(tmp_path, "out", CXX=compiler))
    assert lines[-1] == "FAST False"
    assert len(lines) == 2  # one warning in two calls
    assert lines[0].startswith("WARNING The fast CPU kernels are not available")
    assert reason in lines[0]
    expected("out")
    assert not list(tmp_path.glob("cache/*"))


@pytest.mark.slow
@pytest.mark.skipif(not COMPILER, reason="there is no C++ compiler")
@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_every_instruction_set(tmp_path, expected, capability):
    if capability == "avx512" and "AVX512" not in torch.backends.cpu.get_cpu_capability():
        pytest.skip("this CPU has no AVX-512, and torch would run its instructions all the same")
    assert finish(start(tmp_path, "out", ATEN_CPU_CAPABILITY=capability)) == ["FAST True"]
    expected("out")


REAL = next(filter(None, map(shutil.which, ["g++", "c++", "clang++"])), None)


def fake_compiler(tmp_path, before, name="cxx"):
    """A compiler that notes that it was called to compile; what it is told about the target passes through."""
    script = tmp_path / name
    script.write_text(
        f'#!/bin/sh\ncase "$*" in *" -dM "*) exec {REAL} "$@";; esac\n'
        f'echo called >> {tmp_path}/calls\n{before}\nexec {REAL} "$@"\n'
    )
    script.chmod(0o755)
    return str(script)


def copy_of(library):
    """What a compiler does that is done at once."""
    return f'for out; do :; done; cp {library} "$out"; exit 0'


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """A cache folder with the library, and a compiler that gives a copy of it at once."""
    folder = tmp_path_factory.mktemp("compiled")
    path = compiling.build(folder / "cache", compiling.compiler())
    return path, fake_compiler(folder, copy_of(path))


@pytest.mark.slow
@pytest.mark.skipif(not COMPILER, reason="there is no C++ compiler")
def test_compiled_once_and_by_many_at_a_time(tmp_path, expected, compiled):
    compiler = fake_compiler(tmp_path, f"sleep 1; {copy_of(compiled[0])}")
    for process in [start(tmp_path, f"out{i}", CXX=compiler) for i in range(3)]:
        assert finish(process) == ["FAST True"]
    for i in range(3):
        expected(f"out{i}")
    calls = (tmp_path / "calls").read_text()
    assert finish(start(tmp_path, "out", CXX=compiler)) == ["FAST True"]
    assert (tmp_path / "calls").read_text() == calls  # from the cache
    assert len(list(tmp_path.glob("cache/*"))) == 1  # nothing half done is left
    (library,) = tmp_path.glob("cache/*.so")
    assert library.stem.split("-")[2] == hashlib.sha256(library.read_bytes()).hexdigest()[:16]


@pytest.mark.slow
@pytest.mark.skipif(not COMPILER, reason="there is no C++ compiler")
def test_killed_while_compiling(tmp_path, expected, compiled):
    process = start(tmp_path, "out", CXX=fake_compiler(tmp_path, "sleep 5"))
    while not (tmp_path / "calls").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert finish(start(tmp_path, "out", CXX=compiled[1])) == ["FAST True"]
    expected("out")


@pytest.mark.slow
@pytest.mark.skipif(not COMPILER, reason="there is no C++ compiler")
def test_what_others_could_have_written_is_not_executed(tmp_path, expected, compiled):
    assert finish(start(tmp_path, "out", CXX=compiled[1])) == ["FAST True"]
    (library,) = tmp_path.glob("cache/*.so")
    library.write_bytes(b"not a library")
    library.chmod(0o666)
    assert finish(start(tmp_path, "out", CXX=compiled[1])) == ["FAST True"]  # from a folder of its own
    expected("out")
    assert library.read_bytes() == b"not a library"
    library.chmod(0o644)  # ours, and broken
    assert finish(start(tmp_path, "out", CXX=compiled[1])) == ["FAST True"]
    assert library.read_bytes() != b"not a library"


@pytest.mark.slow
@pytest.mark.skipif(not COMPILER, reason="there is no C++ compiler")
def test_without_a_home(tmp_path, monkeypatch):
    def nobody(_):
        raise KeyError("getpwuid(): uid not found")

    monkeypatch.setattr(pwd, "getpwuid", nobody)
    monkeypatch.setattr(compiling.tempfile, "tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for name in ("TIMM_NRPM_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CXX", f"{compiling.compiler()[0]} -g0")  # a command with an argument
    assert native._loaded.__wrapped__() is not None
    assert list(tmp_path.glob("timm_nrpm-*/estimate-*.so"))
    assert not (tmp_path / "~").exists()


@pytest.mark.slow
@pytest.mark.skipif(not COMPILER, reason="there is no C++ compiler")
def test_a_cache_that_cannot_be_written(tmp_path, expected):
    (tmp_path / "cache").write_text("a file where the folder should be")
    (tmp_path / "tmp").mkdir()
    assert finish(start(tmp_path, "out", TMPDIR=str(tmp_path / "tmp"))) == ["FAST True"]
    expected("out")
    assert not list((tmp_path / "tmp").glob("timm_nrpm*"))  # which is gone with the process


EACH_FOLDER = """
    import os, sys, torch
    from timm_nrpm.nn.functional import nrpm_linear
    from timm_nrpm.nn.kernels import native
    x, weight = torch.randn(3, 40), torch.randn(20, 40)
    for folder in sys.argv[1:]:
        if not (child := os.fork()):  # which loads the library for the first time
            os.environ["TIMM_NRPM_CACHE"] = folder
            fast = nrpm_linear(x, weight, lam=0.2, eps=0.05)
            wide = nrpm_linear(x.double(), weight.double(), lam=0.2, eps=0.05)
            right = torch.allclose(fast.double(), wide, atol=1e-4)
            os._exit(42 if right and native.library() is not None else 1)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), folder)
"""


def each(folders, **environment):
    """Exit codes of processes of their own that compute with these cache folders; negative ones are signals."""
    command = [sys.executable, "-c", textwrap.dedent(EACH_FOLDER), *map(str, folders)]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return [int(line.split()[0]) for line in done.stdout.splitlines()]


def broken(content):
    """The library as a full disk, a crash of the machine or a bad block leaves it."""
    for length in (0, 1, 64, 4096, 4097, len(content) // 2, len(content) - 4096, len(content) - 1):
        yield content[:length]
        yield content[:length] + bytes(len(content) - length)  # the length was written, the content was not
    for place in (0, 17, len(content) // 3, len(content) // 2, len(content) - 100):
        yield content[:place] + bytes([content[place] ^ 0x40]) + content[place + 1 :]
    yield content + b"\0"


@pytest.mark.slow
@pytest.mark.skipif(not COMPILER, reason="there is no C++ compiler")
def test_a_broken_library_is_never_loaded(tmp_path, compiled):
    whole, compiler = compiled
    content, folders = whole.read_bytes(), []
    for number, part in enumerate(broken(content)):
        folders.append(tmp_path / str(number))
        folders[-1].mkdir()
        (folders[-1] / compiling.build(tmp_path / "named", [compiler]).name).write_bytes(part)
    assert len(folders) == 22
    assert each(folders, CXX=compiler) == [42] * len(folders)
    for folder in folders:
        assert [path.read_bytes() == content for path in folder.iterdir()] == [True]  # made anew, and nothing beside it


@pytest.mark.slow
@pytest.mark.skipif(not COMPILER, reason="there is no C++ compiler")
def test_a_library_for_another_processor_is_not_taken(tmp_path, compiled):
    """A home that unlike machines share, and a compiler that makes code for the machine it runs on."""
    script = tmp_path / "cxx"
    script.write_text(f'#!/bin/sh\ncase "$*" in *" -dM "*) exec {REAL} $TARGET "$@";; esac\nexec {compiled[1]} "$@"\n')
    script.chmod(0o755)
    x86 = compiling.platform.machine() in ("x86_64", "AMD64")
    targets = ("-march=native", "-march=x86-64-v2") if x86 else ("-O3", "-O0")
    for target, libraries in zip((*targets, targets[0]), (1, 2, 2), strict=True):
        assert each([tmp_path / "cache"], CXX=str(script), TARGET=target) == [42]
        assert len(list((tmp_path / "cache").iterdir())) == libraries


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder; what is compiled for one process alone lies beside it."""
    (tmp_path / "alone").mkdir()
    monkeypatch.setenv("TIMM_NRPM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(compiling.tempfile, "tempdir", str(tmp_path / "alone"))
    return tmp_path / "cache"


def refuse(*_, **__):
    raise OSError(errno.EROFS, "Read-only file system")


@pytest.mark.slow
@pytest.mark.skipif(not COMPILER, reason="there is no C++ compiler")
def test_a_full_cache(tmp_path, monkeypatch, cache):
    no_space = f'case "$*" in *{cache}*) echo No space left on device >&2; exit 1;; esac'
    monkeypatch.setenv("CXX", fake_compiler(tmp_path, no_space))
    assert native._loaded.__wrapped__() is not None
    assert (tmp_path / "calls").read_text() == "called\n" * 2
    assert list(tmp_path.glob("alone/timm_nrpm-*/estimate-*.so"))
    assert not list(cache.iterdir())


@pytest.mark.slow
@pytest.mark.skipif(not COMPILER, reason="there is no C++ compiler")
@pytest.mark.parametrize("name", ["replace", "fsync", "chmod"])
def test_a_cache_that_fails_while_it_is_written(tmp_path, monkeypatch, cache, compiled, name):
    """A quota, a lost network share: the library is compiled for this process alone, and nothing half done is left."""
    monkeypatch.setenv("CXX", compiled[1])
    real, failed = getattr(os, name), []

    def fails_once(*given):
        if failed:
            return real(*given)
        failed.append(given)
        return refuse()

    monkeypatch.setattr(compiling.os, name, fails_once)
    assert native._loaded.__wrapped__() is not None
    assert failed
    assert list(tmp_path.glob("alone/timm_nrpm-*/estimate-*.so"))
    assert not list(cache.iterdir())


@pytest.mark.skipif(not COMPILER, reason="there is no C++ compiler")
def test_a_read_only_cache_serves_what_is_in_it(tmp_path, monkeypatch, cache, compiled):
    compiling.build(cache, [compiled[1]])
    (library,) = cache.iterdir()
    monkeypatch.setenv("CXX", compiled[1])
    monkeypatch.setattr(compiling.tempfile, "mkstemp", refuse)
    for name in ("replace", "fsync", "unlink", "chmod", "mkdir"):
        monkeypatch.setattr(compiling.os, name, refuse)
    assert native._loaded.__wrapped__() is not None
    library.write_bytes(b"broken")  # by somebody else; here there is nowhere to compile to
    with pytest.warns(native.SlowPathWarning, match="Read-only file system"):
        assert native._loaded.__wrapped__() is None
