"""Reprogrammed linear and convolution as functions, like `torch.nn.functional`.

Both compute Algorithm 1 of NRPM (arXiv 2410.04577): `lam * z + (1 - lam) * z_robust + bias`, where `z` is what the
plain operation gives without its bias and `z_robust` the robust estimate of the same sum. They need the memory of the
plain operation and a few numbers per output; the gradient is exact, and first order only.

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

import torch
import torch.nn.functional as F
from torch import Tensor

from timm_nrpm.config import Estimator, check_estimator, check_lam
from timm_nrpm.nn.estimator import Penalty
from timm_nrpm.nn.kernels import mixed_sum, standard
from timm_nrpm.nn.kernels.convolution import Convolution, Pair

FEW = 16  # fewer rows of a linear map do not fill one vector of the kernels


def is_plain(lam: float | Tensor, iterations: int, penalty: str) -> bool:
    """Whether the plain operation is the whole result: no iteration, no robust penalty, or lambda = 1 and not learned.

    The value of a tensor is read where that costs nothing. Elsewhere, in a graph or on a device, the operator itself
    skips the work at lambda = 1.
    """
    if not isinstance(lam, Tensor):
        return iterations == 0 or penalty == "l2" or lam >= 1
    if lam.requires_grad and torch.is_grad_enabled():
        return False
    return iterations == 0 or penalty == "l2" or (is_readable(lam) and bool(lam >= 1))


def is_readable(lam: Tensor) -> bool:
    """Whether reading the value neither waits for a device nor breaks a graph."""
    return lam.device.type == "cpu" and not torch.compiler.is_compiling()


def _check(
    lam: float | Tensor, iterations: int, eps: float, penalty: str, delta: float, gamma: float
) -> tuple[float | Tensor, Estimator]:
    """Lambda and the settings as plain numbers; unchecked in a graph, where numbers may be symbols."""
    graph = torch.compiler.is_compiling()
    settings = (Estimator if graph else check_estimator)(iterations, eps, penalty, delta, gamma)
    if not isinstance(lam, Tensor):
        return lam if graph else check_lam(lam), settings
    if lam.numel() != 1:
        raise ValueError(f"lam has shape {list(lam.shape)}, and one lambda serves the whole layer: give one number.")
    if is_readable(lam):
        check_lam(lam.item())
    return lam.reshape(()), settings


def precision_of(x: Tensor) -> tuple[torch.dtype, torch.dtype]:
    """The floating-point types to compute in and to return, which autocast may set.

    Nothing is computed in half precision, whose three digits of a product are too few for its distance to the mean.
    """
    device = x.device.type
    graph = torch.compiler.is_compiling()  # in which torch 2.11 cannot ask whether a device has autocast
    known = device != "meta" if graph else torch.amp.is_autocast_available(device)
    autocast = known and torch.is_autocast_enabled(device) and x.dtype != torch.float64
    dtype = torch.get_autocast_dtype(device) if autocast else x.dtype
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype, dtype


def _mix(
    x: Tensor,  # [B, C, H, W]
    weight: Tensor,  # [O, C / groups, kH, kW]
    conv: Convolution,
    lam: float | Tensor,
    estimator: Estimator,
    channels_last: bool,
) -> Tensor:
    """Algorithm 1 without bias, `[B, O, H', W']`."""
    iterations, eps, penalty, delta, gamma = estimator
    lam = lam.to(x) if isinstance(lam, Tensor) else x.new_full((), lam)
    if not iterations:  # lambda is learned, and gets its gradient of 0
        plain = conv.plain(x, weight)
        return torch.lerp(plain, plain, lam)
    if standard.is_wanted():
        return standard.mixed_sum(x, weight, lam, conv, iterations, Penalty.named(penalty, eps, delta, gamma))
    grad = torch.is_grad_enabled()
    learned = lam.requires_grad and grad
    keep = grad and (x.requires_grad or weight.requires_grad or learned)
    shape = (conv.stride, conv.padding, conv.dilation, conv.groups)
    numbers = Penalty.named(penalty, eps, delta, gamma).numbers
    return mixed_sum(x, weight, lam, not learned, *shape, iterations, numbers, channels_last, keep)[0]


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
        x: Input, `[..., D]`, floating point.
        weight: Weight, `[O, D]`.
        bias: Bias, `[O]`, which is added after the estimate; None for none.
        lam: Lambda in [0, 1], a number or a tensor with one element, which may take a gradient.
        iterations, eps, penalty, delta, gamma: See :class:`timm_nrpm.NRPMConfig`.

    Returns:
        Output, `[..., O]`.

    Raises:
        ValueError: The shapes do not fit, or a setting is outside its range.

    Example:
        >>> x, weight = torch.randn(2, 5, 64), torch.randn(10, 64)
        >>> nrpm_linear(x, weight, lam=0.8).shape
        torch.Size([2, 5, 10])
    """
    lam, estimator = _check(lam, iterations, eps, penalty, delta, gamma)
    if weight.ndim != 2 or x.ndim < 1 or x.shape[-1] != weight.shape[-1]:
        raise ValueError(
            f"nrpm_linear got x {list(x.shape)} and weight {list(weight.shape)}: x must be [..., D] and weight [O, D]."
        )
    if is_plain(lam, estimator.iterations, estimator.penalty):
        return F.linear(x, weight, bias)
    return mixed_linear(x, weight, bias, lam, estimator)


def mixed_linear(x: Tensor, weight: Tensor, bias: Tensor | None, lam: float | Tensor, estimator: Estimator) -> Tensor:
    """What :func:`nrpm_linear` computes of arguments that are known to be right, where lambda counts."""
    if x.numel() == 0 or weight.numel() == 0:
        return F.linear(x, weight, bias)
    compute_dtype, dtype = precision_of(x)
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1]).to(compute_dtype)  # [N, D]
    matrix = weight.to(compute_dtype)
    # The kernels run along the positions of a 1x1 convolution. These are the rows or, if rows are few, the outputs; in
    # a graph, which must serve any number of rows, they are always the rows.
    graph = torch.compiler.is_compiling() or standard.is_wanted()
    if swap := not graph and rows.shape[0] < FEW <= matrix.shape[0]:
        rows, matrix = matrix, rows
    columns, kernel = rows.t()[None, :, None], matrix[..., None, None]  # [1, D, 1, N], [O, D, 1, 1]
    out = _mix(columns, kernel, Convolution(), lam, estimator, channels_last=not swap)  # [1, O, 1, N]
    out = out[0, :, 0] if swap else out[0, :, 0].t()
    if bias is not None:
        out = out.add_(bias.to(compute_dtype))
    return out.to(dtype).reshape(*x.shape[:-1], len(weight))


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
        x: Input, `[B, C, H, W]` or `[C, H, W]`, floating point.
        weight: Weight, `[O, C / groups, kH, kW]`.
        bias: Bias, `[O]`, which is added after the estimate; None for none.
        stride, padding, dilation, groups: The same as in `torch.nn.functional.conv2d`; padding may be `"same"` or
            `"valid"`. Padded zeros are products like any other, as in the paper.
        lam: Lambda in [0, 1], a number or a tensor with one element, which may take a gradient.
        iterations, eps, penalty, delta, gamma: See :class:`timm_nrpm.NRPMConfig`.

    Returns:
        Output, `[B, O, H', W']` or `[O, H', W']`.

    Raises:
        ValueError: The shapes do not fit, or a setting is outside its range.

    Example:
        >>> x, weight = torch.randn(2, 16, 32, 32), torch.randn(8, 16, 3, 3)
        >>> nrpm_conv2d(x, weight, padding="same", lam=0.8).shape
        torch.Size([2, 8, 32, 32])
    """
    lam, estimator = _check(lam, iterations, eps, penalty, delta, gamma)
    if weight.ndim != 4 or x.ndim not in (3, 4) or x.shape[-3] != weight.shape[1] * groups:
        raise ValueError(
            f"nrpm_conv2d got x {list(x.shape)}, weight {list(weight.shape)} and groups={groups}: "
            "x must be [B, C, H, W] or [C, H, W] and weight [O, C / groups, kH, kW]."
        )
    batch = x if x.ndim == 4 else x.unsqueeze(0)
    batch, conv = padded(batch, weight, stride, padding, dilation, groups)
    if is_plain(lam, estimator.iterations, estimator.penalty):
        out = F.conv2d(batch, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)
    else:
        out = mixed_conv2d(batch, weight, bias, conv, lam, estimator)
    return out if x.ndim == 4 else out.squeeze(0)


def padded(
    x: Tensor,  # [B, C, H, W]
    weight: Tensor,
    stride: int | Sequence[int],
    padding: int | Sequence[int] | str,
    dilation: int | Sequence[int],
    groups: int,
) -> tuple[Tensor, Convolution]:
    """Return the input, padded where padding is uneven, and the convolution of it."""
    strides, dilations = _pair(stride), _pair(dilation)
    if padding == "same":
        if strides != (1, 1):
            raise ValueError(f'padding="same" needs stride 1, and stride is {strides}.')
        total = [d * (k - 1) for d, k in zip(dilations, weight.shape[2:], strict=True)]
        padding = (total[0] // 2, total[1] // 2)
        if any(t % 2 for t in total):  # as in torch, the odd one goes to the right and below
            left, right = padding[1], total[1] - padding[1]
            x = F.pad(x, (left, right, padding[0], total[0] - padding[0]))
            padding = 0
    elif padding == "valid":
        padding = 0
    elif isinstance(padding, str):
        raise ValueError(f'padding={padding!r} is not known: give an integer, a pair, "same" or "valid".')
    return x, Convolution(strides, _pair(padding), dilations, groups)


def mixed_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, conv: Convolution, lam: float | Tensor, estimator: Estimator
) -> Tensor:
    """What :func:`nrpm_conv2d` computes of arguments that are known to be right, where lambda counts."""
    if x.numel() == 0 or weight.numel() == 0:
        return F.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)
    compute_dtype, dtype = precision_of(x)
    x, weight = x.to(compute_dtype), weight.to(compute_dtype)
    last = any(t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous() for t in (x, weight))
    out = _mix(x, weight, conv, lam, estimator, last)  # [B, O, H', W']
    if bias is not None:
        out = out.add_(bias.to(compute_dtype).view(-1, 1, 1))
    return out.to(dtype)


def _pair(value: int | Sequence[int]) -> Pair:
    return (int(value[0]), int(value[-1])) if isinstance(value, Sequence) else (value, value)
