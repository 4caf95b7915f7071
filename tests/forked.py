"""Processes that start at once: each is a fork of one that has imported torch, timm and this package already.

`run` and `Popen` are those of `subprocess` for commands of Python (`-c`, `-m` or a file). A process of its own imports
for seconds, and tests that start one after another would spend most of their time on it. What the Hub's client reads
from the environment when it is imported is read anew in each fork.
"""

from __future__ import annotations

import atexit
import inspect
import json
import os
import select
import signal
import socket
import subprocess
import sys
from typing import Any

SERVER = r"""
import importlib, json, os, runpy, signal, socket, sys, traceback, types

import accelerate, scipy, sklearn.datasets, torchattacks, torchvision
from huggingface_hub import constants, hf_api
import timm_nrpm, timm_nrpm.cli.inputs, timm_nrpm.evaluation.evaluate, timm_nrpm.hub.publishing, timm_nrpm.tuning.tune


def prepare(asked, files):
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE):
        signal.signal(number, signal.SIG_DFL if number != signal.SIGINT else signal.default_int_handler)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)  # as Python has it
    for number, file in enumerate(files[:3]):
        os.dup2(file, number)
    os.closerange(3, 256)
    os.environ.clear()
    os.environ.update(asked["environment"])
    os.chdir(asked["folder"])
    sys.path[:0] = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.orig_argv = asked["arguments"]
    importlib.reload(constants)
    hf_api.api.endpoint = constants.ENDPOINT


def execute(arguments):
    kind, *rest = arguments[1:]
    if kind == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.argv = ["-c", *rest[1:]]
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(rest[0], "<string>", "exec"), vars(main))
    else:
        sys.argv = [kind, *rest]
        sys.path.insert(0, os.path.dirname(kind))
        runpy.run_path(kind, run_name="__main__")


def child(asked, files):
    try:
        prepare(asked, files)
        execute(asked["arguments"])
        return 0
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except KeyboardInterrupt:
        traceback.print_exc()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except OSError:
                pass


def keep(asked, files):
    "Start a fork, and tell who asked its number and how it ends."
    pid = os.fork()
    if pid == 0:
        os._exit(child(asked, files))
    for file in files[:3]:
        os.close(file)
    os.write(files[3], b"%d\n" % pid)
    os.write(files[3], b"%d\n" % os.waitpid(pid, 0)[1])


signal.signal(signal.SIGINT, signal.SIG_IGN)
asking = socket.socket(fileno=int(sys.argv[1]))
while True:
    message, files, *_ = socket.recv_fds(asking, 1 << 20, 4)
    if not message:
        break
    if os.fork() == 0:
        keep(json.loads(message), files)
        os._exit(0)
    for file in files:
        os.close(file)
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass
"""

_server: list[socket.socket] = []


def _asking() -> socket.socket:
    """A connection to the server, which is started when it is first needed."""
    if not _server:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (ours, theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        command = [sys.executable, "-c", SERVER, str(theirs.fileno())]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=environment)
        theirs.close()
        atexit.register(process.wait)
        atexit.register(ours.close)  # before that, so that it ends
        _server.append(ours)
    return _server[0]


class Popen(subprocess.Popen):
    """`subprocess.Popen` whose process is a fork of the server's."""

    def _execute_child(self, *given: Any) -> None:
        bound = inspect.signature(subprocess.Popen._execute_child).bind(self, *given).arguments
        environment = dict(os.environ if bound["env"] is None else bound["env"])
        asked = {"arguments": [str(word) for word in bound["args"]], "environment": environment}
        asked["folder"] = os.fspath(bound["cwd"] or os.getcwd())
        standard = ((bound["p2cread"], 0), (bound["c2pwrite"], 1), (bound["errwrite"], 2))
        self._status, theirs = os.pipe()
        files = [number if file == -1 else file for file, number in standard]
        socket.send_fds(_asking(), [json.dumps(asked).encode()], [*files, theirs])
        os.close(theirs)
        self.pid, self._left = int(self._line()), b""
        self._child_created = True
        names = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
        self._close_pipe_fds(*(bound[name] for name in names))

    def _line(self) -> bytes:
        line = b""
        while not line.endswith(b"\n"):
            byte = os.read(self._status, 1)
            if not byte:
                raise ChildProcessError("the server of forks has ended")
            line += byte
        return line

    def _try_wait(self, wait_flags: int) -> tuple[int, int]:
        if wait_flags & os.WNOHANG and not select.select([self._status], [], [], 0)[0]:
            return 0, 0
        status = int(self._line())
        os.close(self._status)
        return self.pid, status

    def _internal_poll(self, *_: Any, **__: Any) -> int | None:
        with self._waitpid_lock:
            if self.returncode is None:
                pid, status = self._try_wait(os.WNOHANG)
                if pid:
                    self._handle_exitstatus(status)
        return self.returncode


def run(
    command: list[str],
    *,
    capture_output: bool = False,
    timeout: float | None = None,
    check: bool = False,
    **options: Any,
) -> subprocess.CompletedProcess:
    """`subprocess.run` of a fork."""
    if capture_output:
        options |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with Popen(command, **options) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        except BaseException:
            process.send_signal(signal.SIGKILL)
            raise
    done = subprocess.CompletedProcess(command, process.returncode, out, err)
    if check:
        done.check_returncode()
    return done
