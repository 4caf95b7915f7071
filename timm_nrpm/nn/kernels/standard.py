"""The estimator by standard operators alone, for models that leave PyTorch or this package.

A graph with `timm_nrpm::mixed_sum` runs only where this package is installed. Inside :func:`standard_operators` the
layers compute the same by operators that every runtime has. The products of all outputs would not fit into memory, so
a loop goes over tiles of them, and the graph keeps it as a loop: `scan` in a program of `torch.export`, `Scan` in ONNX,
and a scripted loop in TorchScript.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from timm_nrpm.nn.estimator import Penalty
from timm_nrpm.nn.kernels.convolution import Convolution

TILE = 1 << 18
"""Number of products of one image in a tile, unless one output has more."""

_wanted = False
_alone = threading.RLock()


@contextmanager
def standard_operators() -> Iterator[None]:
    """Let reprogrammed layers compute by standard operators, in all threads, until the context is left.

    Other threads that enter it wait. What they compute meanwhile is the same, and slower.
    """
    global _wanted
    with _alone:
        before, _wanted = _wanted, True
        try:
            yield
        finally:
            _wanted = before


def is_wanted() -> bool:
    """Whether the program is inside :func:`standard_operators`."""
    return _wanted


def mixed_sum(x: Tensor, weight: Tensor, lam: Tensor, conv: Convolution, iterations: int, penalty: Penalty) -> Tensor:
    """Sums of a convolution mixed with their robust estimates, as :func:`timm_nrpm.nn.kernels.operator.mixed_sum`.

    Args:
        x: Input, `[B, C, H, W]`. B, and W of a linear map, may be symbols of a graph.
        weight: Weight, `[O, C / groups, kH, kW]`.
        lam: Lambda, without dimensions.
        conv: The convolution.
        iterations: Number of steps, K >= 1.
        penalty: The weight function.

    Returns:
        Mixed sums, `[B, O, H', W']`.
    """
    plain = conv.plain(x, weight)
    a = weight.flatten(1).unflatten(0, (conv.groups, -1)).unsqueeze(-1)  # [G, O, D, 1]
    b = conv.columns_of_images(x, weight).unsqueeze(2)  # [B, G, 1, D, L]
    groups, outputs, depth, _ = a.shape
    m = (plain / depth).flatten(2).unflatten(1, (groups, outputs)).unsqueeze(3)  # [B, G, O, 1, L]
    numbers = list(penalty.numbers)
    each = depth * _known(math.prod(plain.shape[2:]))
    if groups == 1:
        chunks = _chunks(outputs, each)
        tiles = a[0].unflatten(0, (chunks, -1)), m[:, 0].unflatten(1, (chunks, -1)).movedim(1, 0)
        means = _loop(*tiles, b[:, 0].unsqueeze(0), iterations, numbers)  # [n, B, o, L]
    else:
        chunks = _chunks(groups, each * outputs)
        tiles = a.unflatten(0, (chunks, -1)), m.unflatten(1, (chunks, -1)).movedim(1, 0)
        means = _loop(*tiles, b.unflatten(1, (chunks, -1)).movedim(1, 0), iterations, numbers)  # [n, B, g, O, L]
    robust = means.movedim(0, 1).reshape_as(plain) * depth
    return robust + lam * (plain - robust)


def _known(size: int | torch.SymInt) -> int:
    """A size as a number, which of a symbol is that of the example."""
    hint = getattr(getattr(size, "node", None), "hint", None)
    return int(size) if hint is None else int(hint)


def _chunks(count: int, each: int) -> int:
    """The smallest number of equal chunks of `count` outputs, with `each` products an output, that are no larger than
    a tile or a single output."""
    return next(n for n in range(1, count + 1) if count % n == 0 and (count // n * each <= TILE or n == count))


def _loop(a: Tensor, m: Tensor, b: Tensor, iterations: int, numbers: list[float]) -> Tensor:
    """Robust means of all tiles, `[n, ...]`.

    Args:
        a: Weights of each tile, `[n, ..., D, 1]`.
        m: Plain means of each tile, `[n, ..., 1, L]`.
        b: Columns of each tile, `[n, ..., D, L]`, or `[1, ..., D, L]` for the same columns in all tiles.
        iterations, numbers: Number of steps, and the fields of the penalty.
    """
    if len(a) == 1:
        return _estimate(a[0], m[0], b[0], iterations, numbers).unsqueeze(0)
    if torch.jit.is_tracing():  # a trace would hold every tile
        scripted: Tensor = torch.jit.script(_scripted)(a, m, b, iterations, numbers)
        return scripted
    from torch._higher_order_ops.scan import scan_op

    def body(carried: Tensor, a: Tensor, m: Tensor, *own: Tensor) -> tuple[Tensor, Tensor]:
        return carried.clone(), _estimate(a, m, own[0] if own else carried, iterations, numbers)

    # The function around this operator compiles the body, which takes seconds for each layer. OpenVINO knows no input
    # of a loop besides what it carries and what it goes over, so columns of all tiles are carried.
    carried, own = (b[0], []) if len(b) == 1 else (a.new_zeros(1), [b])
    _, means = scan_op(body, [carried], [a, m, *own], ())
    tensor: Tensor = means
    return tensor


def _scripted(a: Tensor, m: Tensor, b: Tensor, iterations: int, numbers: list[float]) -> Tensor:
    """The loop as TorchScript keeps it."""
    means: list[Tensor] = []
    for i in range(a.shape[0]):
        means.append(_estimate(a[i], m[i], b[min(i, b.shape[0] - 1)], iterations, numbers))
    return torch.stack(means)


def _estimate(a: Tensor, m: Tensor, b: Tensor, iterations: int, numbers: list[float]) -> Tensor:
    """Robust means of a tile, `[..., L]`: :func:`timm_nrpm.nn.estimator.robust_mean` in a form that can be scripted."""
    eps, scale, shift, low, high = numbers[0], numbers[1], numbers[2], numbers[3], numbers[4]
    products = a * b  # [..., D, L]
    ones = torch.ones_like(a).transpose(-2, -1)  # [..., 1, D]: runtimes are slow at sums along D, and not at products
    for _ in range(iterations):
        t = products - m
        w = (t.abs() + eps).reciprocal()
        if scale != 1.0:
            w = w * scale
        if shift != 0.0:
            w = w - shift
        if low > 0.0 or high < float("inf"):
            w = w.clamp(low, high)
        m = m + ones @ (t * w) / (ones @ w)
    return m.squeeze(-2)
