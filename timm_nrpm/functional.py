"""Reprogrammed linear and convolution as functions, like `torch.nn.functional`.

Both compute Algorithm 1 of NRPM (arXiv 2410.04577): `lam * z + (1 - lam) * z_robust + bias`, where `z` is what the
plain operation gives without its bias and `z_robust` the robust estimate of the same sum. The memory they need is that
of the plain operation and a few numbers an output; the gradient is exact, and first order only.

Example:
    >>> x, weight = torch.randn(8, 64), torch.randn(10, 64)
    >>> nrpm_linear(x, weight, lam=0.8).shape
    torch.Size([8, 10])
    >>> nrpm_conv2d(torch.randn(2, 16, 32, 32), torch.randn(8, 16, 3, 3), padding=1, lam=0.8).shape
    torch.Size([2, 8, 32, 32])
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from timm_nrpm.config import check_estimator, check_lam
from timm_nrpm.estimator import Penalty
from timm_nrpm.kernels import estimate, estimate_backward

Pair = tuple[int, int]

# Numbers in one unfolded block: 64 MiB of float32. A convolution is unfolded a few images at a time.
BLOCK = 1 << 24


@dataclass(frozen=True)
class _Geometry:
    """How a convolution reads its input; a linear map is the geometry None."""

    kernel: Pair
    stride: Pair
    padding: Pair
    dilation: Pair
    groups: int

    def unfold(self, x: Tensor) -> Tensor:
        """`[B, C, H, W]` to columns `[G, D, B * L]`, L output positions and D = C / G * kH * kW."""
        columns = F.unfold(x, self.kernel, self.dilation, self.padding, self.stride)  # [B, C * kH * kW, L]
        columns = columns.unflatten(1, (self.groups, -1))  # [B, G, D, L]
        return columns.permute(1, 2, 0, 3).flatten(2)  # [G, D, B * L]

    def fold(self, columns: Tensor, x: Tensor) -> Tensor:
        """The adjoint of `unfold`, to the shape of `x`."""
        columns = columns.unflatten(2, (len(x), -1)).permute(2, 0, 1, 3).flatten(1, 2)  # [B, C * kH * kW, L]
        return F.fold(columns, x.shape[2:], self.kernel, self.dilation, self.padding, self.stride)


class _Estimate(torch.autograd.Function):
    """Robust means from plain means, over a linear map or a convolution, a block of inputs at a time."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # [N, D] or [B, C, H, W]
        weight: Tensor,  # [G, O, D]
        start: Tensor,  # [N, O, 1] or [B, G * O, L]
        geometry: _Geometry | None,
        penalty: Penalty,
        iterations: int,
        keep: bool,
    ) -> Tensor:
        mean = torch.empty_like(start)
        saved: list[Tensor] = []
        for block in _blocks(x, weight, start):
            columns, begin = _columns(x[block], geometry), _outputs(start[block], weight)
            m, steps = estimate(columns, weight, begin, penalty, iterations, keep)
            mean[block] = _inputs(m, mean[block].shape)
            saved.extend([m, *(tensor for step in steps for tensor in step)] if keep else ())
        ctx.geometry, ctx.penalty, ctx.iterations = geometry, penalty, iterations
        ctx.save_for_backward(x, weight, *saved)
        return mean

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # torch's once_differentiable looks at `grad` alone, and would silently leave out what x and weight contribute.
        if torch.is_grad_enabled():
            raise RuntimeError("The robust estimate has first derivatives only: call backward without create_graph.")
        x, weight, *saved = ctx.saved_tensors
        needs = ctx.needs_input_grad[:2]
        grad_x = torch.empty_like(x) if needs[0] else None
        grad_weight = torch.zeros_like(weight) if needs[1] else None
        grad_start = torch.empty_like(grad)
        size = 1 + 3 * ctx.iterations
        for i, block in enumerate(_blocks(x, weight, grad)):
            m, *flat = saved[i * size : (i + 1) * size]
            steps = [(flat[k], flat[k + 1], flat[k + 2]) for k in range(0, len(flat), 3)]
            columns = _columns(x[block], ctx.geometry)
            gx, gw, gs = estimate_backward(columns, weight, m, steps, _outputs(grad[block], weight), ctx.penalty, needs)
            if gx is not None and grad_x is not None:
                grad_x[block] = gx[0].t() if ctx.geometry is None else ctx.geometry.fold(gx, x[block])
            if gw is not None and grad_weight is not None:
                grad_weight += gw
            grad_start[block] = _inputs(gs, grad_start[block].shape)
        return grad_x, grad_weight, grad_start, None, None, None, None


def _blocks(x: Tensor, weight: Tensor, out: Tensor) -> list[slice]:
    """Slices of the first dimension whose columns number about BLOCK; none for an empty batch."""
    columns = weight.shape[0] * weight.shape[2] * out.shape[2]  # G * D * L, for one image
    size = max(1, BLOCK // max(1, columns))
    return [slice(i, i + size) for i in range(0, len(x), size)]


def _columns(x: Tensor, geometry: _Geometry | None) -> Tensor:
    return x.t().unsqueeze(0).contiguous() if geometry is None else geometry.unfold(x)  # [G, D, P]


def _outputs(z: Tensor, weight: Tensor) -> Tensor:
    """`[B, G * O, L]` to `[G, O, B * L]`."""
    return z.unflatten(1, weight.shape[:2]).permute(1, 2, 0, 3).flatten(2)


def _inputs(m: Tensor, shape: torch.Size) -> Tensor:
    """`[G, O, B * L]` to `[B, G * O, L]`, the given shape."""
    return m.unflatten(2, (shape[0], shape[2])).permute(2, 0, 1, 3).reshape(shape)


def _mix(
    x: Tensor,
    weight: Tensor,  # [G, O, D], a view of the operation's weight
    z: Tensor,
    bias: Tensor | None,
    geometry: _Geometry | None,
    lam: float | Tensor,
    penalty: Penalty,
    iterations: int,
) -> Tensor:
    """Algorithm 1, from the plain result without bias."""
    # Half precision keeps three digits of a product whose distance to the mean is what counts: compute in float32.
    kind = torch.float32 if z.dtype in (torch.float16, torch.bfloat16) else z.dtype
    plain = z.to(kind)
    depth = weight.shape[-1]
    start = plain.reshape(*z.shape[:2], math.prod(z.shape[2:])) / depth  # [B, O, L]
    mean = start
    if iterations:
        # Asked here, since inside a Function gradients are always off and its inputs still say that they require one.
        keep = torch.is_grad_enabled() and any(t.requires_grad for t in (x, weight, start))
        mean = _Estimate.apply(x.to(kind), weight.to(kind), start, geometry, penalty, iterations, keep)
    lam = lam.to(kind) if isinstance(lam, Tensor) else lam
    out = (lam * plain + (1 - lam) * (depth * mean).view_as(plain)).to(z.dtype)
    return out if bias is None else out + bias.to(out.dtype).view(-1, *[1] * (z.ndim - 2))


def is_plain(lam: float | Tensor, iterations: int, penalty: str) -> bool:
    """Whether the plain operation is the whole answer: no iteration, or lambda = 1 and nothing to learn it by."""
    if isinstance(lam, Tensor) and lam.requires_grad and torch.is_grad_enabled():
        return False
    return iterations == 0 or penalty == "l2" or bool(lam >= 1)


def _check_lam(lam: float | Tensor) -> float | Tensor:
    if not isinstance(lam, Tensor):
        return check_lam(lam)
    if lam.numel() != 1:
        raise ValueError(f"lam has shape {list(lam.shape)}, and one lambda serves the whole layer: give one number.")
    check_lam(lam.item())
    return lam.reshape(())


def nrpm_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    lam: float | Tensor,
    iterations: int = 3,
    eps: float = 1e-3,
    penalty: str = "l1",
    delta: float = 3.0,
    gamma: float = 4.0,
) -> Tensor:
    """Linear map mixed with the robust estimate of its sum (NRPM, arXiv 2410.04577, Algorithm 1).

    Args:
        x: `[..., D]`, floating point.
        weight: `[O, D]`.
        bias: `[O]`; stays outside the estimate.
        lam: Lambda in [0, 1], a number or a tensor with one element, which may take a gradient.
        iterations, eps, penalty, delta, gamma: See :class:`timm_nrpm.NRPMConfig`.

    Returns:
        `[..., O]`.

    Raises:
        ValueError: Shapes that do not fit, or a setting outside its range.

    Example:
        >>> x, weight = torch.randn(2, 5, 64), torch.randn(10, 64)
        >>> nrpm_linear(x, weight, lam=0.8).shape
        torch.Size([2, 5, 10])
    """
    check_estimator(iterations, eps, penalty, delta, gamma)
    lam = _check_lam(lam)
    if weight.ndim != 2 or x.ndim < 1 or x.shape[-1] != weight.shape[-1]:
        raise ValueError(
            f"nrpm_linear got x {list(x.shape)} and weight {list(weight.shape)}: x must be [..., D] and weight [O, D]."
        )
    if is_plain(lam, iterations, penalty):
        return F.linear(x, weight, bias)
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])  # [N, D]
    z = F.linear(rows, weight)  # [N, O]
    options = Penalty.named(penalty, eps, delta, gamma)
    out = _mix(rows, weight.unsqueeze(0), z, bias, None, lam, options, iterations)
    return out.reshape(*x.shape[:-1], len(weight))


def nrpm_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int | Pair = 1,
    padding: int | Pair | str = 0,
    dilation: int | Pair = 1,
    groups: int = 1,
    lam: float | Tensor,
    iterations: int = 3,
    eps: float = 1e-3,
    penalty: str = "l1",
    delta: float = 3.0,
    gamma: float = 4.0,
) -> Tensor:
    """2D convolution mixed with the robust estimate of its sum (NRPM, arXiv 2410.04577, Algorithm 1, appendix A.2).

    Args:
        x: `[B, C, H, W]` or `[C, H, W]`, floating point.
        weight: `[O, C / groups, kH, kW]`.
        bias: `[O]`; stays outside the estimate.
        stride, padding, dilation, groups: As in `torch.nn.functional.conv2d`; padding may be `"same"` or `"valid"`.
            Padded zeros are products like any other, as in the paper.
        lam: Lambda in [0, 1], a number or a tensor with one element, which may take a gradient.
        iterations, eps, penalty, delta, gamma: See :class:`timm_nrpm.NRPMConfig`.

    Returns:
        `[B, O, H', W']`, or `[O, H', W']`.

    Raises:
        ValueError: Shapes that do not fit, or a setting outside its range.

    Example:
        >>> x, weight = torch.randn(2, 16, 32, 32), torch.randn(8, 16, 3, 3)
        >>> nrpm_conv2d(x, weight, padding="same", lam=0.8).shape
        torch.Size([2, 8, 32, 32])
    """
    check_estimator(iterations, eps, penalty, delta, gamma)
    lam = _check_lam(lam)
    if weight.ndim != 4 or x.ndim not in (3, 4) or x.shape[-3] != weight.shape[1] * groups:
        raise ValueError(
            f"nrpm_conv2d got x {list(x.shape)}, weight {list(weight.shape)} and groups={groups}: "
            "x must be [B, C, H, W] or [C, H, W] and weight [O, C / groups, kH, kW]."
        )
    batch = x if x.ndim == 4 else x.unsqueeze(0)
    kernel, strides, dilations = _pair(weight.shape[2:]), _pair(stride), _pair(dilation)
    if padding == "same":
        if strides != (1, 1):
            raise ValueError(f'padding="same" needs stride 1, and stride is {strides}.')
        total = [d * (k - 1) for d, k in zip(dilations, kernel, strict=True)]
        padding = (total[0] // 2, total[1] // 2)
        if any(t % 2 for t in total):  # like torch, the odd one goes right and below
            left, right = padding[1], total[1] - padding[1]
            batch = F.pad(batch, (left, right, padding[0], total[0] - padding[0]))
            padding = 0
    elif padding == "valid":
        padding = 0
    elif isinstance(padding, str):
        raise ValueError(f'padding={padding!r} is not known: give an integer, a pair, "same" or "valid".')
    geometry = _Geometry(kernel, strides, _pair(padding), dilations, groups)
    if is_plain(lam, iterations, penalty):
        out = F.conv2d(batch, weight, bias, strides, geometry.padding, dilations, groups)
        return out if x.ndim == 4 else out.squeeze(0)
    z = F.conv2d(batch, weight, None, strides, geometry.padding, dilations, groups)  # [B, O, H', W']
    matrix = weight.flatten(1).unflatten(0, (groups, -1))  # [G, O / G, D]
    out = _mix(batch, matrix, z, bias, geometry, lam, Penalty.named(penalty, eps, delta, gamma), iterations)
    return out if x.ndim == 4 else out.squeeze(0)


def _pair(value: int | Sequence[int]) -> Pair:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[-1]))
