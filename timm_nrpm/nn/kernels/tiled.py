"""The estimator in tiles that stay in the cache, by ordinary PyTorch operations, for any device and float type.

It serves float64, devices without a kernel, and machines without a C++ compiler. A block of images is
unfolded into columns `[G, D, P]` (groups, summands, positions), and a tile of the G * O * D * P products is made, used
and dropped. Positions are innermost, so every elementwise step runs over contiguous memory whatever D is.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from timm_nrpm.nn.estimator import Penalty
from timm_nrpm.nn.kernels.convolution import Convolution

# Number of products in a tile. On two cores with 2 MiB of L2 cache each, half of this loses 15 % of the speed to the
# cost of starting an operation, and four times this falls out of the cache and loses half of it.
TILE = 1 << 18

# Number of elements in the columns of one block of images: 64 MiB of float32.
BLOCK = 1 << 24


def forward(
    x: Tensor,
    weight: Tensor,
    lam: float,
    out: Tensor,
    state: Tensor,
    conv: Convolution,
    iterations: int,
    penalty: Penalty,
) -> None:
    """Fill `out` and, unless it is empty, `state`; see :func:`timm_nrpm.nn.kernels.operator.mixed_sum`."""
    matrix = weight.flatten(1).unflatten(0, (conv.groups, -1))  # [G, O, D]
    depth = matrix.shape[2]
    plain = conv.plain(x, weight)
    for block in _blocks(matrix, plain):
        start = conv.outputs(plain[block]) / depth
        columns = conv.columns(x[block], weight)
        m, kept = _estimate(columns, matrix, start, iterations, penalty, bool(state.numel()))
        out[block] = torch.lerp(conv.sum_outputs(m * depth, plain[block].shape), plain[block], lam)
        for slot, value in zip(state, kept, strict=True):
            slot[block] = conv.sum_outputs(value, plain[block].shape)


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    lam: float,
    state: Tensor,
    grad_x: Tensor,
    grad_weight: Tensor,
    conv: Convolution,
    iterations: int,
    penalty: Penalty,
) -> None:
    """Add to the gradients that are not empty; see :func:`timm_nrpm.nn.kernels.operator.mixed_sum_backward`."""
    matrix = weight.flatten(1).unflatten(0, (conv.groups, -1))  # [G, O, D]
    grad_matrix = grad_weight.view(matrix.shape) if grad_weight.numel() else None
    depth = matrix.shape[2]
    of_sums = grad * (1 - lam)
    for block in _blocks(matrix, grad):
        means = [conv.outputs(slot[block]) for slot in state[: iterations + 1]]  # m_0 ... m_K
        scales = [conv.outputs(slot[block] * of_sums[block] * depth) for slot in state[iterations + 1 : -1]]
        columns = conv.columns(x[block], weight)
        grad_columns = torch.zeros_like(columns) if grad_x.numel() else None
        _gradients(columns, matrix, means, scales, penalty, grad_columns, grad_matrix)
        if grad_columns is not None:
            grad_x[block] = conv.sum_columns(grad_columns, x[block], weight)
    needs = (bool(grad_x.numel()), bool(grad_weight.numel()))
    of_x, of_weight = conv.plain_gradients(grad * lam + of_sums * state[-1], x, weight, needs)
    grad_x += of_x
    grad_weight += of_weight


def _blocks(matrix: Tensor, plain: Tensor) -> list[slice]:
    """Slices of the images whose columns have about BLOCK elements; none for an empty batch."""
    columns = matrix.shape[0] * matrix.shape[2] * plain.shape[2:].numel()  # G * D * L, for one image
    size = max(1, BLOCK // max(1, columns))
    return [slice(i, i + size) for i in range(0, len(plain), size)]


def _tiles(columns: Tensor, matrix: Tensor) -> Iterator[tuple[slice, slice, slice]]:
    """Slices of groups, outputs and positions with about TILE products, and with as many positions as possible."""
    (groups, outputs, depth), positions = matrix.shape, columns.shape[2]
    p = max(1, min(positions, max(64, TILE // depth)))
    o = max(1, min(outputs, TILE // (depth * p)))
    g = max(1, min(groups, TILE // (depth * p * o)))
    for g0 in range(0, groups, g):
        for p0 in range(0, positions, p):
            for o0 in range(0, outputs, o):
                yield slice(g0, g0 + g), slice(o0, o0 + o), slice(p0, p0 + p)


def _estimate(
    columns: Tensor, matrix: Tensor, start: Tensor, iterations: int, penalty: Penalty, keep: bool
) -> tuple[Tensor, list[Tensor]]:
    """The robust means `[G, O, P]` from the means `start`, and the state in the same shape, one tile at a time."""
    mean = torch.empty_like(start)
    kept = [torch.empty_like(start) for _ in range((2 * iterations + 2) * keep)]
    for g, o, p in _tiles(columns, matrix):
        a = matrix[g, o].unsqueeze(-1)  # [g, o, D, 1]
        b = columns[g, :, p].unsqueeze(1)  # [g, 1, D, p]
        m = start[g, o, p].unsqueeze(2)  # [g, o, 1, p]
        means = [m]
        factors: list[Tensor] = []
        whole = torch.ones_like(m)
        for _ in range(iterations):
            t = torch.addcmul(-m, a, b)  # [g, o, D, p], the product minus the mean in one pass
            if not keep:
                w = penalty.weight(t)
                m = m + t.mul_(w).sum(2, keepdim=True) / w.sum(2, keepdim=True)
                continue
            w, slope = penalty.weight_and_slope(t)
            inverse = w.sum(2, keepdim=True).reciprocal_()
            move = w.mul_(t).sum(2, keepdim=True) * inverse  # m_{k+1} - m_k
            c = (move * slope.sum(2, keepdim=True) - slope.mul_(t).sum(2, keepdim=True)) * inverse
            m = m + move
            factors, whole = [*(f * c for f in factors), inverse], whole * c
            means.append(m)
        for slot, value in zip(kept, [*means, *factors, whole] if keep else [], strict=True):
            slot[g, o, p] = value.squeeze(2)
        mean[g, o, p] = m.squeeze(2)
    return mean, kept


def _gradients(
    columns: Tensor,
    matrix: Tensor,
    means: list[Tensor],
    scales: list[Tensor],
    penalty: Penalty,
    grad_columns: Tensor | None,
    grad_matrix: Tensor | None,
) -> None:
    """Add to the gradients of `columns` and `matrix`, one tile at a time; `means` and `scales` are `[G, O, P]`."""
    for g, o, p in _tiles(columns, matrix):
        a = matrix[g, o].unsqueeze(-1)  # [g, o, D, 1]
        b = columns[g, :, p].unsqueeze(1)  # [g, 1, D, p]
        total: Tensor | None = None  # gradient of the products, [g, o, D, p]
        for m, end, scale in zip(means, means[1:], scales, strict=False):
            t = torch.addcmul(-m[g, o, p].unsqueeze(2), a, b)
            w, slope = penalty.weight_and_slope(t)
            t += (m[g, o, p] - end[g, o, p]).unsqueeze(2)  # p - m_{k+1}
            part = w.addcmul_(t, slope).mul_(scale[g, o, p].unsqueeze(2))
            total = part if total is None else total.add_(part)
        assert total is not None  # at least one step
        if grad_matrix is not None:
            grad_matrix[g, o] += (total * b).sum(3)
        if grad_columns is not None:
            grad_columns[g, :, p] += total.mul_(a).sum(1)
