"""Correctness: forward and backward against float64, every way to divide, and the tests that need a GPU."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpu.layers import EPS, SMALL, TINY, Layer
from gpu.session import Session
from timm_nrpm.nn.estimator import Penalty
from timm_nrpm.nn.kernels import operator

ROOT = Path(__file__).parents[2]
TILES_OF_CHECKS = {"forward": (4, 64, 2, 1), "backward_x": (4, 64, 2, 1), "backward_weight": (1, 16, 64, 4, 1)}
SETTINGS = (("l1", 1), ("l1", 3), ("huber-mcp", 2))


def off(value: Tensor, want: Tensor) -> float:
    """Relative error of all elements together."""
    value, want = value.detach(), want.detach().double()
    return float((value.double().to(want.device) - want).norm() / want.norm().clamp_min(1e-30))


@contextmanager
def ieee() -> Iterator[None]:
    """Convolutions and products in float32, not in TensorFloat-32, which PyTorch allows convolutions by default."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def checks(session: Session) -> None:
    for layer in TINY if session.quick else SMALL:
        with session.attempt(f"errors of {layer}"), ieee():
            session.need(3)
            _operator_errors(session, layer)
    for layer in (TINY[:1] if session.quick else SMALL) if session.runs_triton else ():
        with session.attempt(f"errors of every way to divide, {layer}"), ieee():
            session.need(5)
            _kernel_errors(session, layer)
    if session.device != "cuda":
        session.leave_out("pytest -m gpu", "there is no GPU")
        return
    with session.attempt("pytest -m gpu"):
        session.need(20)
        _pytest(session)


def _operator_errors(session: Session, layer: Layer) -> None:
    """The public functions, with gradients, beside float64 on the CPU."""
    wide = layer.tensors("cpu", torch.float64)
    want, of_cpu, of_device = (
        _with_gradients(layer, [t.detach().to(device, dtype).requires_grad_() for t in wide])
        for device, dtype in (("cpu", torch.float64), ("cpu", torch.float32), (session.device, torch.float32))
    )
    errors = [list(map(off, values, want)) for values in (of_device, of_cpu)]
    session.add("errors", **{
        "layer": str(layer), "forward": errors[0][0], "gradient of the input": errors[0][1],
        "gradient of the weight": errors[0][2], "largest of float32 on the CPU": max(errors[1]),
        "no more than twice that": max(errors[0]) <= 2 * max(errors[1]),
    })  # fmt: skip


def _with_gradients(layer: Layer, tensors: list[Tensor]) -> list[Tensor]:
    """The output of a layer, and its gradients with respect to the input and the weight."""
    out = layer.forwards(*tensors)["ours"]()
    return [out, *torch.autograd.grad(out.square().sum(), tensors)]


def _kernel_errors(session: Session, layer: Layer) -> None:
    """The kernels with each way to divide, beside float64 on the CPU."""
    from gpu.tiles import only_tiles
    from timm_nrpm.nn.kernels import cuda
    from timm_nrpm.nn.kernels.cuda_kernels import RECIPROCALS

    x, weight = layer.operands(*layer.tensors(session.device))
    lam, last, both = torch.tensor(0.3, device=session.device), not layer.kernel, (True, True)
    grad = torch.randn_like(layer.convolution.plain(x, weight))
    x_wide, weight_wide, lam_wide, grad_wide = (t.double().cpu() for t in (x, weight, lam, grad))
    for name, steps in SETTINGS:
        settings = layer.settings(Penalty.named(name, EPS, 0.3, 1.0), steps)
        want, states = operator.compute(x_wide, weight_wide, lam_wide, True, *settings, last, True)
        wanted = operator.compute_backward(grad_wide, x_wide, weight_wide, lam_wide, states, True, *settings, *both)
        for reciprocal in RECIPROCALS:
            with only_tiles(reciprocal, **TILES_OF_CHECKS):
                out, state = cuda.compute(x, weight, lam, True, *settings, last, True)
                grads = cuda.compute_backward(grad, x, weight, lam, state, True, *settings, *both)
            session.add("errors of the kernels", **{
                "layer": str(layer), "penalty": name, "K": steps, "1 / u": reciprocal, "forward": off(out, want),
                "gradient of the input": off(grads[0], wanted[0]), "gradient of the weight": off(grads[1], wanted[1]),
            })  # fmt: skip


def _pytest(session: Session) -> None:
    """Run the tests that are marked `gpu`, and add a row of how many passed."""
    if not find_spec("pytest"):
        session.leave_out("pytest -m gpu", "pytest is not installed; the errors above check the same operator")
        return
    marked = [str(p) for p in sorted((ROOT / "tests").rglob("test_*.py")) if "pytest.mark.gpu" in p.read_text()]
    marked = [path for path in marked if Path(path).name != "test_gpu_check.py"]
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "--tb=short", "--continue-on-collection-errors"]
    command += ["-p", "no:cacheprovider", *(["-n", "6"] if find_spec("xdist") else []), *marked]
    done: Any
    try:
        done = subprocess.run(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
            timeout=max(10, session.seconds_left() - 3),
        )  # fmt: skip
        output, end = done.stdout, f"exit status {done.returncode}"
    except subprocess.TimeoutExpired as error:
        kept = error.stdout or b""
        output, end = (kept.decode(errors="replace") if isinstance(kept, bytes) else kept), "stopped by the time box"
    print(output)
    counts = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|skipped|errors?)\b", output)}
    failed = re.findall(r"^(?:FAILED|ERROR) (.{0,200})", output, re.MULTILINE)
    row = {"ended": end, **{word: counts.get(word, 0) for word in ("passed", "failed", "skipped")}}
    session.add("pytest", **row, **{"names of failed tests": "; ".join(failed)})
    if end != "exit status 0":
        session.leave_out("pytest -m gpu", f"{end}: {' '.join(output.split())[-400:]}")
