"""The estimator on CUDA in float32, as Triton kernels over an implicit convolution: nothing is unfolded.

Every program holds a tile of products in registers and walks along the dimension that it sums over. In the forward pass
the tile is outputs by positions, and the program walks along the summands, K times. For the gradient of the input it is
channels by pixels, along outputs and taps; for the gradient of the weight, outputs by summands by positions, along
positions. No two programs write to the same place, so results do not vary from run to run.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from timm_nrpm.nn.estimator import Penalty
from timm_nrpm.nn.kernels import cuda_kernels, operator
from timm_nrpm.nn.kernels.convolution import Convolution, empty_gradients, empty_results, state_as, strided_as

RECIPROCAL = "divide"
"""How the kernels compute 1 / u, one of `cuda_kernels.RECIPROCALS`; the others wait for a measurement on a GPU, which
`scripts/gpu_check.py` makes."""

SPLITS = 64  # largest number of ranges of positions, whose parts of the weight's gradient are summed at the end
PROGRAMS = 1024  # number of programs that fill a large GPU: with this many, positions are not split further


def forward(
    x: Tensor,
    weight: Tensor,
    plain: Tensor,
    lam: Tensor | None,
    conv: Convolution,
    iterations: int,
    penalty: Penalty,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """See :func:`timm_nrpm.nn.kernels.operator.robust_sum`; lambda is read on the device."""
    return _launch_forward(x, weight, plain, lam, None, conv, iterations, penalty, keep, False)


def mixed(
    x: Tensor,
    weight: Tensor,
    plain: Tensor,
    lam: Tensor,
    bias: Tensor | None,
    conv: Convolution,
    iterations: int,
    penalty: Penalty,
) -> Tensor:
    """Algorithm 1 in one kernel, `lam * plain + (1 - lam) * sums + bias`, without a gradient.

    Nothing calls it yet: whether it is faster than three kernels is for `scripts/gpu_check.py` to measure.
    """
    return _launch_forward(x, weight, plain, lam, bias, conv, iterations, penalty, False, True)[0]


def _launch_forward(
    x: Tensor,
    weight: Tensor,
    plain: Tensor,
    lam: Tensor | None,
    bias: Tensor | None,
    conv: Convolution,
    iterations: int,
    penalty: Penalty,
    keep: bool,
    mix: bool,
) -> tuple[Tensor, Tensor]:
    out, state = empty_results(plain, iterations, keep)
    if not out.numel():
        return out, state
    weight, plain = weight.contiguous(), strided_as(plain, out)
    rows, columns = len(weight) // conv.groups, out.numel() // len(weight)
    cuda_kernels.forward[_grid(rows, columns, conv.groups)](
        *(x, weight, plain, lam, bias, out, state),
        *(rows, columns, columns.bit_length(), weight[0].numel(), weight.shape[1]),
        *_shape(x, out),
        *penalty.numbers,
        *_constants(weight, conv, iterations, penalty),
        KEEP=keep,
        HAS_LAM=lam is not None,
        MIXED=mix,
        HAS_BIAS=bias is not None,
        RECIPROCAL=RECIPROCAL,
    )
    return out, state


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    plain: Tensor,
    lam: Tensor | None,
    out: Tensor,
    state: Tensor,
    conv: Convolution,
    iterations: int,
    penalty: Penalty,
    needs: tuple[bool, bool],
) -> tuple[Tensor, Tensor]:
    """See :func:`timm_nrpm.nn.kernels.operator.robust_sum_backward`."""
    grad_x, grad_weight = empty_gradients(x, weight, *needs)
    if not out.numel():
        return grad_x.zero_(), grad_weight.zero_()
    weight, plain, grad = weight.contiguous(), strided_as(plain, out), strided_as(grad, out)
    state = state_as(state, out)
    x = strided_as(x, grad_x) if needs[0] else x
    tensors = (x, weight, plain, lam, out, state, grad)
    depth, positions = weight[0].numel(), out.numel() // len(weight)
    outputs, constants = len(weight) // conv.groups, _constants(weight, conv, iterations, penalty)
    flags = {"KEEP": True, "HAS_LAM": lam is not None, "RECIPROCAL": RECIPROCAL}
    if needs[0]:
        rows, columns = weight.shape[1], x.numel() // x.shape[1]
        cuda_kernels.backward_x[_grid(rows, columns, conv.groups)](
            *(*tensors, grad_x, rows, columns, columns.bit_length(), depth, outputs),
            *_shape(x, out),
            *penalty.numbers,
            *constants,
            **flags,
        )
    if needs[1]:
        programs = conv.groups * triton.cdiv(outputs, 16) * triton.cdiv(depth, 64)
        splits = max(1, min(SPLITS, positions // 256, triton.cdiv(PROGRAMS, programs)))
        parts = grad_weight.new_empty(splits, *grad_weight.shape)
        cuda_kernels.backward_weight[_grid(outputs, depth, conv.groups, splits)](
            *(*tensors, parts, outputs, depth, positions.bit_length(), depth, weight.shape[1]),
            *(*_shape(x, out), weight.numel(), positions, -(-positions // splits)),
            *penalty.numbers,
            *constants,
            **flags,
        )
        torch.sum(parts, 0, out=grad_weight)
    return grad_x, grad_weight


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


@operator.robust_sum.register_kernel("cuda")
def _(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    if x.dtype != torch.float32:
        return operator.compute(x, *arguments)
    weight, plain, lam, *shape, iterations, penalty, keep = arguments
    with torch.cuda.device(x.device):
        return forward(x, weight, plain, lam, operator.convolution(*shape), iterations, Penalty(*penalty), keep)


@operator.robust_sum_backward.register_kernel("cuda")
def _(grad: Tensor, x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    if x.dtype != torch.float32:
        return operator.compute_backward(grad, x, *arguments)
    weight, plain, lam, out, state, *shape, iterations, penalty, need_x, need_weight = arguments
    conv, needs = operator.convolution(*shape), (need_x, need_weight)
    with torch.cuda.device(x.device):
        return backward(grad, x, weight, plain, lam, out, state, conv, iterations, Penalty(*penalty), needs)
