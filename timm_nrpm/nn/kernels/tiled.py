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
from timm_nrpm.nn.kernels.convolution import Convolution, empty_gradients, empty_results

# Number of products in a tile. On two cores with 2 MiB of L2 cache each, half of this loses 15 % of the speed to the
# cost of starting an operation, and four times this falls out of the cache and loses half of it.
TILE = 1 << 18

# Number of elements in the columns of one block of images: 64 MiB of float32.
BLOCK = 1 << 24


def forward(
    x: Tensor, weight: Tensor, plain: Tensor, conv: Convolution, iterations: int, penalty: Penalty, keep: bool
) -> tuple[Tensor, Tensor]:
    """See :func:`timm_nrpm.nn.kernels.operator.robust_sum`."""
    out, state = empty_results(plain, iterations, keep)
    matrix = weight.flatten(1).unflatten(0, (conv.groups, -1))  # [G, O, D]
    depth = matrix.shape[2]
    for block in _blocks(matrix, plain):
        start = conv.outputs(plain[block]) / depth
        columns = conv.columns(x[block], weight)
        m, kept = _estimate(columns, matrix, start, iterations, penalty, keep)
        out[block] = conv.sum_outputs(m * depth, plain[block].shape)
        for slot, value in zip(state, kept, strict=True):
            slot[block] = conv.sum_outputs(value, plain[block].shape)
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
    """See :func:`timm_nrpm.nn.kernels.operator.robust_sum_backward`."""
    grad_x, grad_weight = empty_gradients(x, weight, *needs)
    matrix = weight.flatten(1).unflatten(0, (conv.groups, -1))  # [G, O, D]
    grad_matrix = grad_weight.zero_().view(matrix.shape) if needs[1] else None
    depth = matrix.shape[2]
    for block in _blocks(matrix, plain):
        ends = [plain[block] / depth, *(slot[block] for slot in state[: iterations - 1]), out[block] / depth]
        means = [conv.outputs(m) for m in ends]  # m_0 ... m_K
        scales = [conv.outputs(slot[block] * grad[block] * depth) for slot in state[iterations - 1 : -1]]
        columns = conv.columns(x[block], weight)
        grad_columns = torch.zeros_like(columns) if needs[0] else None
        _gradients(columns, matrix, means, scales, penalty, grad_columns, grad_matrix)
        if grad_columns is not None:
            grad_x[block] = conv.sum_columns(grad_columns, x[block], weight)
    return grad_x, grad_weight


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
    kept = [torch.empty_like(start) for _ in range(2 * iterations * keep)]
    for g, o, p in _tiles(columns, matrix):
        a = matrix[g, o].unsqueeze(-1)  # [g, o, D, 1]
        b = columns[g, :, p].unsqueeze(1)  # [g, 1, D, p]
        m = start[g, o, p].unsqueeze(2)  # [g, o, 1, p]
        ends: list[Tensor] = []
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
            ends.append(m)
        for slot, value in zip(kept, [*ends[:-1], *factors, whole] if keep else [], strict=True):
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
