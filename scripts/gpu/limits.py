# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Loops on registers with the arithmetic of the kernels and nothing else, which measure what the card can do.

A step is, for each product, t = x a - m, |t| + eps, a reciprocal, and the two sums; with gradients there are two more
sums. A step of the backward pass ends in the gradient of the product instead. The kernels' own functions compute both.
"""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from gpu.session import Session
from timm_nrpm.nn.kernels.cuda_kernels import RECIPROCALS, slope_of_step, weight_and_slope, with_sign

SIZE, WARPS = 2048, 4  # numbers of a program, 16 for each thread, and its warps
LOOPS = ("forward", "forward that keeps a state", "backward")


@triton.jit
def forward_loop(
    numbers, out, rounds, eps, KEEP: tl.constexpr, RECIPROCAL: tl.constexpr, SIZE: tl.constexpr
):  # fmt: skip
    place = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    x = tl.load(numbers + place)
    m = x * 0.5
    S = tl.zeros([SIZE], tl.float32)
    T = tl.zeros([SIZE], tl.float32)
    A = tl.zeros([SIZE], tl.float32)
    B = tl.zeros([SIZE], tl.float32)
    a = 1.0
    for _ in range(rounds):
        t = tl.fma(x, tl.full([SIZE], 1.0, tl.float32) * a, -m)
        omega, slope = weight_and_slope(t, eps, 1.0, 0.0, 0.0, float("inf"), False, RECIPROCAL)
        S += omega
        T = tl.fma(omega, t, T)
        if KEEP:
            A += tl.abs(t) * slope
            B += with_sign(slope, t)
        a += 0.0009765625
    tl.store(out + place, S + T + A + B)


@triton.jit
def backward_loop(numbers, out, rounds, eps, RECIPROCAL: tl.constexpr, SIZE: tl.constexpr):
    place = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    x = tl.load(numbers + place)
    m, G, move = x * 0.5, x * 0.25, x * 0.125
    total = tl.zeros([SIZE], tl.float32)
    a = 1.0
    for _ in range(rounds):
        t = tl.fma(x, tl.full([SIZE], 1.0, tl.float32) * a, -m)
        total += slope_of_step(t, G, move, eps, 1.0, 0.0, 0.0, float("inf"), False, RECIPROCAL)
        a += 0.0009765625
    tl.store(out + place, total)


@triton.jit
def reciprocal_loop(numbers, out, rounds, RECIPROCAL: tl.constexpr, SIZE: tl.constexpr):
    place = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    x = tl.load(numbers + place)
    for _ in range(rounds):
        # |x| + 0.5 first: it keeps the numbers apart from 0.
        x, _slope = weight_and_slope(x, 0.5, 1.0, 0.0, 0.0, float("inf"), False, RECIPROCAL)
    tl.store(out + place, x)


@triton.jit
def multiply_add_loop(numbers, out, rounds, SIZE: tl.constexpr):
    place = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    x = tl.load(numbers + place)
    for _ in range(rounds):
        x = tl.fma(x, x, -0.5)  # stays in [-0.5, 0.5] from there
    tl.store(out + place, x)


def run(loop: str, numbers: Tensor, rounds: int, reciprocal: str, eps: float = 1e-3) -> Tensor:
    """What a loop leaves, in the shape of the numbers, whose count is a multiple of SIZE."""
    out, grid = torch.empty_like(numbers), (numbers.numel() // SIZE,)
    fixed = {"SIZE": SIZE, "num_warps": WARPS}
    if loop == "backward":
        backward_loop[grid](numbers, out, rounds, eps, RECIPROCAL=reciprocal, **fixed)
    elif loop in LOOPS:
        forward_loop[grid](numbers, out, rounds, eps, KEEP=loop != LOOPS[0], RECIPROCAL=reciprocal, **fixed)
    elif loop == "reciprocal":
        reciprocal_loop[grid](numbers, out, rounds, RECIPROCAL=reciprocal, **fixed)
    else:
        multiply_add_loop[grid](numbers, out, rounds, **fixed)
    return out


def limits(session: Session) -> None:
    """Add a row for each loop and each way to divide."""
    cuda = session.device == "cuda"
    multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count if cuda else 1
    numbers = (
        torch.rand((1 if session.quick else 16 * multiprocessors) * SIZE, device=session.device).mul_(0.4).add_(0.05)
    )
    loops = [(loop, reciprocal) for loop in (*LOOPS, "reciprocal") for reciprocal in RECIPROCALS]
    rounds, rates = 2 if session.quick else 4096, {}
    for loop, reciprocal in [("multiply-add", ""), *loops]:
        name = f"{loop}, {reciprocal}".rstrip(", ")
        with session.attempt(f"limit of {name}"):
            session.need(3)
            work = partial(run, loop, numbers, rounds, reciprocal)
            rates[name] = numbers.numel() * rounds / session.medians({name: work}, 0.5)[name]
            session.add("limits", **{
                "loop": loop, "1 / u": reciprocal, "G steps/s": rates[name] / 1e9,
                "for each multiprocessor and ns": rates[name] / 1e9 / multiprocessors,
            })  # fmt: skip


def rates(tables: dict[str, list[dict[str, object]]], reciprocal: str) -> dict[str, float]:
    """Steps a second at the limit, by the name of the loop, from the rows that `limits` added."""
    rows = [row for row in tables.get("limits", []) if row["1 / u"] == reciprocal]
    return {str(row["loop"]): float(str(row["G steps/s"])) * 1e9 for row in rows}
