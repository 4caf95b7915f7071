"""The estimator as one PyTorch operator over a convolution, with its exact gradient: `timm_nrpm::robust_sum`.

Being an operator, it is a single node to autograd, `torch.compile` and `torch.export`. `cuda.py` registers the
implementation for CUDA; the one for every other device is chosen here.

With the products `p` of an output, `t_k = p - m_k`, `S_k = sum omega(t_k)`, and `m_{k+1} = sum omega(t_k) p / S_k`:

    d m_{k+1} / d p   = (omega(t_k) + (p - m_{k+1}) omega'(t_k)) / S_k
    d m_{k+1} / d m_k = c_k = - sum (p - m_{k+1}) omega'(t_k) / S_k

So the gradient of a product is a sum over the steps, each weighted by `r_k = c_{K-1} ... c_{k+1} / S_k`. The backward
pass computes the products again; the forward pass keeps 2K numbers per output, the *state* `[2K, B, O, H', W']`:
`m_1 ... m_{K-1}`, then `r_0 ... r_{K-1}`, then the product of all c, which is the derivative with respect to `m_0`.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from timm_nrpm.nn.estimator import Penalty
from timm_nrpm.nn.kernels import native, tiled
from timm_nrpm.nn.kernels.convolution import Convolution, empty_gradients, empty_results

SETTINGS = "int[] stride, int[] padding, int[] dilation, int groups, int iterations, float[] penalty"


def _implementation(x: Tensor) -> ModuleType:
    return native if native.serves(x) else tiled


def convolution(stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int) -> Convolution:
    return Convolution((stride[0], stride[1]), (padding[0], padding[1]), (dilation[0], dilation[1]), groups)


def compute(
    x: Tensor,
    weight: Tensor,
    plain: Tensor,
    lam: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    iterations: int,
    penalty: Sequence[float],
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """Robust estimates of the sums of a convolution.

    Args:
        x: Input, `[B, C, H, W]`.
        weight: Weight, `[O, C / groups, kH, kW]`.
        plain: Plain sums, `[B, O, H', W']`, from which the iteration starts.
        lam: Lambda, without dimensions. If it is 1, nothing is estimated and `plain` is returned, so that a graph,
            which cannot branch on a value, still skips the work. None always estimates.
        stride, padding, dilation, groups: The fields of :class:`timm_nrpm.nn.kernels.convolution.Convolution`.
        iterations: Number of steps, K >= 1.
        penalty: The fields of :class:`timm_nrpm.nn.estimator.Penalty`.
        keep: Whether a gradient will be needed.

    Returns:
        Robust sums, `[B, O, H', W']`, and the state (empty unless `keep`).
    """
    if lam is not None and bool(lam >= 1):
        out, state = empty_results(plain, iterations, keep)
        state[-1:].fill_(1)
        return out.copy_(plain), state
    conv = convolution(stride, padding, dilation, groups)
    return _implementation(x).forward(x, weight, plain, conv, iterations, Penalty(*penalty), keep)


robust_sum = torch.library.custom_op(
    "timm_nrpm::robust_sum",
    compute,
    mutates_args=(),
    schema=f"(Tensor x, Tensor weight, Tensor plain, Tensor? lam, {SETTINGS}, bool keep) -> (Tensor, Tensor)",
)


@robust_sum.register_fake
def _(x: Tensor, weight: Tensor, plain: Tensor, *settings: Any) -> tuple[Tensor, Tensor]:
    *_, iterations, _penalty, keep = settings
    return empty_results(plain, iterations, keep)


def compute_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    plain: Tensor,
    lam: Tensor | None,
    out: Tensor,
    state: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    iterations: int,
    penalty: Sequence[float],
    need_x: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of `robust_sum` with respect to `x` and `weight`; one that is not needed is empty."""
    if lam is not None and bool(lam >= 1):
        grad_x, grad_weight = empty_gradients(x, weight, need_x, need_weight)
        return grad_x.zero_(), grad_weight.zero_()
    conv, needs = convolution(stride, padding, dilation, groups), (need_x, need_weight)
    return _implementation(x).backward(grad, x, weight, plain, out, state, conv, iterations, Penalty(*penalty), needs)


robust_sum_backward = torch.library.custom_op(
    "timm_nrpm::robust_sum_backward",
    compute_backward,
    mutates_args=(),
    schema="(Tensor grad, Tensor x, Tensor weight, Tensor plain, Tensor? lam, Tensor out, Tensor state, "
    f"{SETTINGS}, bool need_x, bool need_weight) -> (Tensor, Tensor)",
)


@robust_sum_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, *settings: Any) -> tuple[Tensor, Tensor]:
    *_, need_x, need_weight = settings
    return empty_gradients(x, weight, need_x, need_weight)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, plain, lam, *settings = inputs
    ctx.settings = settings[:-1]  # without keep
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, plain, lam, *output)


def _backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    # Second derivatives would silently lack what x and weight contribute.
    if torch.is_grad_enabled():
        raise RuntimeError("The robust estimate has first derivatives only: call backward without create_graph.")
    nothing = (None,) * 8
    if grad is None:
        return None, None, None, *nothing
    x, weight, plain, lam, out, state = ctx.saved_tensors
    needs = ctx.needs_input_grad[:2]
    grad_x = grad_weight = None
    if any(needs):
        grad_x, grad_weight = robust_sum_backward(grad, x, weight, plain, lam, out, state, *ctx.settings, *needs)
    return grad_x if needs[0] else None, grad_weight if needs[1] else None, grad * state[-1], *nothing


robust_sum.register_autograd(_backward, setup_context=_setup)
