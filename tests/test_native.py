"""How the CPU kernels come to be: compiled, kept, done without; each in processes of their own."""

import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import torch

from timm_nrpm.functional import nrpm_conv2d
from timm_nrpm.kernels import native

COMPILER = any(map(shutil.which, ["g++", "c++", "clang++"]))

PROGRAM = """
    import warnings, sys, torch
    warnings.simplefilter("always")
    from timm_nrpm.functional import nrpm_conv2d
    from timm_nrpm.kernels import native
    torch.manual_seed(0)
    x, weight = torch.randn(2, 5, 9, 9, requires_grad=True), torch.randn(7, 5, 3, 3, requires_grad=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            out = nrpm_conv2d(x, weight, padding=1, lam=0.2, eps=0.05)
            like = x.to(memory_format=torch.channels_last)
            other = {"penalty": "huber-mcp", "delta": 0.3, "gamma": 1.0}
            out = out + nrpm_conv2d(like, weight, padding=1, lam=0.2, eps=0.05, **other)
            grads = torch.autograd.grad(out.square().sum(), (x, weight))
    for w in caught:
        print("WARNING", w.message)
    print("FAST", native.library() is not None)
    torch.save((out.detach(), *grads), sys.argv[1])
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
    wide = x.double(), weight.double()
    out = nrpm_conv2d(*wide, padding=1, lam=0.2, eps=0.05)
    out = (out + nrpm_conv2d(*wide, padding=1, lam=0.2, eps=0.05, penalty="huber-mcp", delta=0.3, gamma=1.0)).float()
    want = (out.detach(), *torch.autograd.grad(out.square().sum(), (x, weight)))

    def compare(name):
        torch.testing.assert_close(torch.load(tmp_path / name, weights_only=True), want, rtol=1e-4, atol=1e-4)

    return compare


@pytest.mark.parametrize(("compiler", "reason"), [("no-such-compiler", "no C++ compiler"), ("false", "failed")])
def test_without_a_compiler(tmp_path, expected, compiler, reason):
    lines = finish(start(tmp_path, "out", CXX=compiler))
    assert lines[-1] == "FAST False"
    assert len(lines) == 2  # one warning in two calls
    assert lines[0].startswith("WARNING The fast CPU kernels are not available")
    assert reason in lines[0]
    expected("out")
    assert not list(tmp_path.glob("cache/*"))


@pytest.mark.skipif(not COMPILER, reason="there is no C++ compiler")
@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_every_instruction_set(tmp_path, expected, capability):
    # torch takes the best it has if the machine has less than what is asked for
    assert finish(start(tmp_path, "out", ATEN_CPU_CAPABILITY=capability)) == ["FAST True"]
    expected("out")


def fake_compiler(tmp_path, before):
    """A compiler that notes that it was called."""
    script = tmp_path / "cxx"
    real = next(filter(None, map(shutil.which, ["g++", "c++", "clang++"])))
    script.write_text(f'#!/bin/sh\necho called >> {tmp_path}/calls\n{before}\nexec {real} "$@"\n')
    script.chmod(0o755)
    return str(script)


@pytest.mark.skipif(not COMPILER, reason="there is no C++ compiler")
def test_compiled_once_and_by_many_at_a_time(tmp_path, expected):
    compiler = fake_compiler(tmp_path, "sleep 1")
    for process in [start(tmp_path, f"out{i}", CXX=compiler) for i in range(3)]:
        assert finish(process) == ["FAST True"]
    for i in range(3):
        expected(f"out{i}")
    calls = (tmp_path / "calls").read_text()
    assert finish(start(tmp_path, "out", CXX=compiler)) == ["FAST True"]
    assert (tmp_path / "calls").read_text() == calls  # from the cache
    assert len(list(tmp_path.glob("cache/*"))) == 1  # nothing half done is left


@pytest.mark.skipif(not COMPILER, reason="there is no C++ compiler")
def test_killed_while_compiling(tmp_path, expected):
    process = start(tmp_path, "out", CXX=fake_compiler(tmp_path, "sleep 5"))
    while not (tmp_path / "calls").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert finish(start(tmp_path, "out", CXX=fake_compiler(tmp_path, ""))) == ["FAST True"]
    expected("out")


@pytest.mark.skipif(not COMPILER, reason="there is no C++ compiler")
def test_what_others_could_have_written_is_not_executed(tmp_path, expected):
    assert finish(start(tmp_path, "out")) == ["FAST True"]
    (library,) = tmp_path.glob("cache/*.so")
    library.write_bytes(b"not a library")
    library.chmod(0o666)
    assert finish(start(tmp_path, "out")) == ["FAST True"]  # from a folder of its own
    expected("out")
    assert library.read_bytes() == b"not a library"
    library.chmod(0o644)  # ours, and broken
    assert finish(start(tmp_path, "out")) == ["FAST True"]


@pytest.mark.skipif(not COMPILER, reason="there is no C++ compiler")
def test_without_a_home(tmp_path, monkeypatch):
    def nowhere():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(native.Path, "home", nowhere)
    monkeypatch.setattr(native.tempfile, "tempdir", str(tmp_path))
    for name in ("TIMM_NRPM_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CXX", f"{native.compiler()[0]} -g0")  # a command with an argument
    assert native._loaded.__wrapped__() is not None
    assert list(tmp_path.glob("timm_nrpm-*/estimate-*.so"))


@pytest.mark.skipif(not COMPILER, reason="there is no C++ compiler")
def test_a_cache_that_cannot_be_written(tmp_path, expected):
    (tmp_path / "cache").write_text("a file where the folder should be")
    (tmp_path / "tmp").mkdir()
    assert finish(start(tmp_path, "out", TMPDIR=str(tmp_path / "tmp"))) == ["FAST True"]
    expected("out")
    assert not list((tmp_path / "tmp").glob("timm_nrpm*"))  # which is gone with the process
