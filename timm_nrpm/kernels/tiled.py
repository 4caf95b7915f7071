"""The estimator over a matrix product, in tiles that stay in the cache, with the exact gradient.

Groups `[G]`, outputs `[O]`, summands `[D]`, positions `[P]`: `x` is `[G, D, P]`, `weight` `[G, O, D]`, and output
`(g, o, p)` is the estimate over the D products `weight[g, o, :] * x[g, :, p]`. The G * O * D * P products are never
held at once: a tile of them is made, used and dropped. Positions are innermost, so every elementwise step runs over
contiguous memory whatever D is.

The gradient keeps three numbers an output and step (`m_k`, `1 / S_k`, `c_k`) and makes the products again, tile by
tile. With `t_k = p - m_k`, `S_k = sum_d omega(t_k)`, `m_{k+1} = sum_d omega(t_k) p / S_k`:

    d m_{k+1} / d p_d = (omega(t_k) + (p_d - m_{k+1}) omega'(t_k)) / S_k
    d m_{k+1} / d m_k = c_k = - sum_d (p_d - m_{k+1}) omega'(t_k) / S_k
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from timm_nrpm.estimator import Penalty

# Products in a tile, measured on two cores with 2 MiB of L2 each: half of this loses 15 % to the cost of starting an
# operation, four times this falls out of the cache and loses half.
TILE = 1 << 18

Steps = list[tuple[Tensor, Tensor, Tensor]]
"""What the gradient needs of every step: `m_k`, `1 / S_k`, `c_k`, each `[G, O, P]`."""


def _tiles(groups: int, outputs: int, depth: int, positions: int) -> Iterator[tuple[slice, slice, slice]]:
    """Slices of groups, outputs and positions whose products number about TILE, positions as long as possible."""
    p = max(1, min(positions, max(64, TILE // depth)))
    o = max(1, min(outputs, TILE // (depth * p)))
    g = max(1, min(groups, TILE // (depth * p * o)))
    for g0 in range(0, groups, g):
        for p0 in range(0, positions, p):
            for o0 in range(0, outputs, o):
                yield slice(g0, g0 + g), slice(o0, o0 + o), slice(p0, p0 + p)


def estimate(
    x: Tensor, weight: Tensor, start: Tensor, penalty: Penalty, iterations: int, keep_steps: bool = False
) -> tuple[Tensor, Steps]:
    """`iterations` steps of eq. 3 from `start`, in mean units.

    Args:
        x: `[G, D, P]`.
        weight: `[G, O, D]`.
        start: `[G, O, P]`, the plain means `m_0`.
        keep_steps: Whether to return what `estimate_backward` needs.

    Returns:
        The robust means `[G, O, P]`, and the steps (empty unless `keep_steps`).
    """
    groups, depth, positions = x.shape
    mean = torch.empty_like(start)
    steps: Steps = []
    if keep_steps:
        steps = [(torch.empty_like(start), torch.empty_like(start), torch.empty_like(start)) for _ in range(iterations)]
    for g, o, p in _tiles(groups, weight.shape[1], depth, positions):
        a = weight[g, o].unsqueeze(-1)  # [g, o, D, 1]
        b = x[g, :, p].unsqueeze(1)  # [g, 1, D, p]
        m = start[g, o, p].unsqueeze(2)  # [g, o, 1, p]
        for k in range(iterations):
            t = torch.addcmul(-m, a, b)  # [g, o, D, p], the product minus the mean in one pass
            if not keep_steps:
                w = penalty.weight(t)
                m = m + t.mul_(w).sum(2, keepdim=True) / w.sum(2, keepdim=True)
                continue
            w, slope = penalty.weight_and_slope(t)
            inverse = w.sum(2, keepdim=True).reciprocal_()
            move = w.mul_(t).sum(2, keepdim=True) * inverse  # m_{k+1} - m_k
            c = (move * slope.sum(2, keepdim=True) - slope.mul_(t).sum(2, keepdim=True)) * inverse
            for kept, value in zip(steps[k], (m, inverse, c), strict=True):
                kept[g, o, p] = value.squeeze(2)
            m = m + move
        mean[g, o, p] = m.squeeze(2)
    return mean, steps


def estimate_backward(
    x: Tensor, weight: Tensor, mean: Tensor, steps: Steps, grad: Tensor, penalty: Penalty, needs: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """Gradients of `estimate` with respect to `x`, `weight` and `start`.

    Args:
        mean: What `estimate` returned.
        steps: The steps it kept, at least one.
        grad: Gradient with respect to `mean`, `[G, O, P]`.
        needs: Whether the gradients of `x` and of `weight` are wanted; None is returned for one that is not.
    """
    groups, depth, positions = x.shape
    # G_k for every step, from the last to the first; what is left at the end is the gradient of the start.
    scaled: list[Tensor] = []
    for _, inverse, c in reversed(steps):
        scaled.insert(0, grad * inverse)
        grad = grad * c
    ends = [m for m, _, _ in steps[1:]] + [mean]  # m_{k+1}
    grad_x = torch.zeros_like(x) if needs[0] else None
    grad_weight = torch.zeros_like(weight) if needs[1] else None
    if not any(needs):
        return None, None, grad
    for g, o, p in _tiles(groups, weight.shape[1], depth, positions):
        a = weight[g, o].unsqueeze(-1)  # [g, o, D, 1]
        b = x[g, :, p].unsqueeze(1)  # [g, 1, D, p]
        total: Tensor | None = None  # gradient of the products, [g, o, D, p]
        for (m, _, _), end, coefficient in zip(steps, ends, scaled, strict=True):
            start = m[g, o, p].unsqueeze(2)
            t = torch.addcmul(-start, a, b)
            w, slope = penalty.weight_and_slope(t)
            t += start - end[g, o, p].unsqueeze(2)  # p - m_{k+1}
            part = w.addcmul_(t, slope).mul_(coefficient[g, o, p].unsqueeze(2))
            total = part if total is None else total.add_(part)
        assert total is not None  # at least one step
        if grad_weight is not None:
            grad_weight[g, o] += (total * b).sum(3)
        if grad_x is not None:
            grad_x[g, :, p] += total.mul_(a).sum(1)
    return grad_x, grad_weight, grad
