"""The estimator on CUDA in float32, as Triton kernels over an implicit convolution: nothing is unfolded.

Every program holds a tile of products in registers and walks along the dimension that it sums over. In the forward pass
the tile is outputs by positions, and the program walks along the summands, K times. For the gradient of the input it is
channels by pixels, along outputs and taps; for the gradient of the weight, outputs by summands by positions, along
positions. No two programs write to the same place, so results do not vary from run to run.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
from torch import Tensor

from timm_nrpm.nn.estimator import Penalty
from timm_nrpm.nn.kernels import cuda_kernels, operator
from timm_nrpm.nn.kernels.convolution import Convolution, empty_gradients, empty_results, in_planes, strided_as

RECIPROCAL = "approximate"
"""How the kernels compute 1 / u, one of `cuda_kernels.RECIPROCALS`. On an H100 a convolution took 7.0 ms by the special
function unit and 9.4 by division, with the same errors against float64 (`results/bench-nvidia-h100-80gb-hbm3.md`)."""

SPLITS = 64  # largest number of ranges of positions, whose parts of the weight's gradient are summed at the end
PROGRAMS = 1024  # number of programs that fill a large GPU: with this many, positions are not split further


def forward(
    x: Tensor,
    weight: Tensor,
    plain: Tensor,
    lam: Tensor,
    skip: bool,
    out: Tensor,
    state: Tensor,
    conv: Convolution,
    iterations: int,
    penalty: Penalty,
) -> None:
    """Fill `out` and, unless it is empty, `state`, from the plain sums; lambda is read on the device.

    See :func:`timm_nrpm.nn.kernels.operator.mixed_sum`.
    """
    weight, plain = weight.contiguous(), strided_as(plain, out)
    rows, columns = len(weight) // conv.groups, out.numel() // len(weight)
    cuda_kernels.forward[_grid(rows, columns, conv.groups)](
        *(x, weight, plain, lam, out, state),
        *(rows, columns, columns.bit_length(), weight[0].numel(), weight.shape[1]),
        *_shape(x, out),
        *penalty.numbers,
        *_constants(weight, conv, iterations, penalty),
        KEEP=bool(state.numel()),
        SKIP=skip,
        RECIPROCAL=RECIPROCAL,
    )


def backward_x(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    lam: Tensor,
    skip: bool,
    state: Tensor,
    grad_x: Tensor,
    conv: Convolution,
    iterations: int,
    penalty: Penalty,
) -> None:
    """Fill the gradient of the input through the steps of the estimate, without what comes through the plain sums."""
    weight, state = weight.contiguous(), in_planes(state)
    grad, x = strided_as(grad, state[0]), strided_as(x, grad_x)
    rows, columns = weight.shape[1], x.numel() // x.shape[1]
    cuda_kernels.backward_x[_grid(rows, columns, conv.groups)](
        *(x, weight, lam, state, grad, grad_x),
        *(rows, columns, columns.bit_length(), weight[0].numel(), len(weight) // conv.groups),
        *_shape(x, grad),
        *penalty.numbers,
        *_constants(weight, conv, iterations, penalty),
        KEEP=True,
        SKIP=skip,
        RECIPROCAL=RECIPROCAL,
    )


def backward_weight(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    lam: Tensor,
    skip: bool,
    state: Tensor,
    grad_weight: Tensor,
    conv: Convolution,
    iterations: int,
    penalty: Penalty,
) -> None:
    """The same for the gradient of the weight."""
    weight, state = weight.contiguous(), in_planes(state)
    grad = strided_as(grad, state[0])
    depth, positions, outputs = weight[0].numel(), grad.numel() // len(weight), len(weight) // conv.groups
    programs = conv.groups * triton.cdiv(outputs, 16) * triton.cdiv(depth, 64)
    splits = max(1, min(SPLITS, positions // 256, triton.cdiv(PROGRAMS, programs)))
    parts = grad_weight.new_empty(splits, *grad_weight.shape)
    cuda_kernels.backward_weight[_grid(outputs, depth, conv.groups, splits)](
        *(x, weight, lam, state, grad, parts),
        *(outputs, depth, positions.bit_length(), depth, weight.shape[1]),
        *(*_shape(x, grad), weight.numel(), positions, -(-positions // splits)),
        *penalty.numbers,
        *_constants(weight, conv, iterations, penalty),
        KEEP=True,
        SKIP=skip,
        RECIPROCAL=RECIPROCAL,
    )
    torch.sum(parts, 0, out=grad_weight)


def _grid(rows: int, columns: int, groups: int, splits: int = 1) -> Any:
    def grid(tile: dict[str, int]) -> tuple[int, int]:
        # These are on the first axis, the only one that can hold more than 65535 programs.
        return triton.cdiv(columns, tile["COLUMNS"]) * groups * triton.cdiv(rows, tile["ROWS"]), splits

    return grid


def _shape(x: Tensor, out: Tensor) -> tuple[int, ...]:
    return (*x.shape[2:], *out.shape[2:], *x.stride(), *out.stride(), out.numel())


def _constants(weight: Tensor, conv: Convolution, iterations: int, penalty: Penalty) -> tuple[Any, ...]:
    general = penalty != Penalty(penalty.eps)
    return (iterations, *weight.shape[2:], *conv.stride, *conv.padding, *conv.dilation, general)


def _device_of(x: Tensor) -> AbstractContextManager[Any]:
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()  # the interpreter's tensors are on the CPU


@operator.mixed_sum.register_kernel("cuda")
def compute(x: Tensor, weight: Tensor, lam: Tensor, skip: bool, *settings: Any) -> tuple[Tensor, Tensor]:
    """See :func:`timm_nrpm.nn.kernels.operator.compute`; the plain sums are PyTorch's."""
    if x.dtype != torch.float32:
        return operator.compute(x, weight, lam, skip, *settings)
    *shape, iterations, penalty, channels_last, keep = settings
    conv = operator.convolution(*shape)
    out, state = empty_results(x, weight, conv, iterations, keep, channels_last)
    if out.numel():
        with _device_of(x):
            plain = conv.plain(x, weight)
            forward(x, weight, plain, lam, skip, out, state, conv, iterations, Penalty(*penalty))
    return out, state


@operator.mixed_sum_backward.register_kernel("cuda")
def compute_backward(
    grad: Tensor, x: Tensor, weight: Tensor, lam: Tensor, state: Tensor, skip: bool, *settings: Any
) -> tuple[Tensor, Tensor]:
    """See :func:`timm_nrpm.nn.kernels.operator.compute_backward`; what comes through the plain sums is PyTorch's."""
    if x.dtype != torch.float32:
        return operator.compute_backward(grad, x, weight, lam, state, skip, *settings)
    *shape, iterations, penalty, need_x, need_weight = settings
    conv, needs = operator.convolution(*shape), (need_x, need_weight)
    grad_x, grad_weight = empty_gradients(x, weight, *needs)
    if not grad.numel():
        return grad_x.zero_(), grad_weight.zero_()
    arguments = (grad, x, weight, lam, skip, state)
    with _device_of(x):
        if need_x:
            backward_x(*arguments, grad_x, conv, iterations, Penalty(*penalty))
        if need_weight:
            backward_weight(*arguments, grad_weight, conv, iterations, Penalty(*penalty))
        through_plain = grad * torch.lerp(state[-1], torch.ones_like(lam), lam)
        parts = conv.plain_gradients(through_plain, x, weight, needs)
    for gradient, part in zip((grad_x, grad_weight), parts, strict=True):
        gradient += part
    return grad_x, grad_weight
