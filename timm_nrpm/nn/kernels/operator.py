"""Algorithm 1 over a convolution as one PyTorch operator with its exact gradient: `timm_nrpm::mixed_sum`.

It computes `lam * z + (1 - lam) * z_robust`, where `z` are the plain sums and `z_robust` their robust estimates. Being
an operator, it is a single node to autograd, `torch.compile` and `torch.export`. `cuda.py` registers the implementation
for CUDA; the one for every other device is chosen here.

With the products `p` of an output, `t_k = p - m_k`, `S_k = sum omega(t_k)`, and `m_{k+1} = sum omega(t_k) p / S_k`:

    d m_{k+1} / d p   = (omega(t_k) + (p - m_{k+1}) omega'(t_k)) / S_k
    d m_{k+1} / d m_k = c_k = - sum (p - m_{k+1}) omega'(t_k) / S_k

So the gradient of a product is a sum over the steps, each weighted by `r_k = c_{K-1} ... c_{k+1} / S_k`, and a part
that all products of an output share, `lam + (1 - lam) c_{K-1} ... c_0`: what comes through the plain sum, which is
mixed in and is where the steps start. The backward pass computes the products again; the forward pass keeps 2K + 2
numbers per output, the *state* `[2K + 2, B, O, H', W']`: `m_0 ... m_K`, then `r_0 ... r_{K-1}`, then the product of all
c.
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
    lam: Tensor,
    skip: bool,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    iterations: int,
    penalty: Sequence[float],
    channels_last: bool,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """Sums of a convolution, mixed with their robust estimates.

    Args:
        x: Input, `[B, C, H, W]`.
        weight: Weight, `[O, C / groups, kH, kW]`.
        lam: Lambda, without dimensions, of the type of `x`.
        skip: Whether nothing is estimated where lambda is 1, so that a graph, which cannot branch on a value, still
            skips the work.
        stride, padding, dilation, groups: The fields of :class:`timm_nrpm.nn.kernels.convolution.Convolution`.
        iterations: Number of steps, K >= 1.
        penalty: The fields of :class:`timm_nrpm.nn.estimator.Penalty`.
        channels_last: Whether the output has that memory format.
        keep: Whether a gradient will be needed.

    Returns:
        Mixed sums, `[B, O, H', W']`, and the state (empty unless `keep`).
    """
    conv, value = convolution(stride, padding, dilation, groups), float(lam)
    out, state = empty_results(x, weight, conv, iterations, keep, channels_last)
    if skip and value >= 1:
        return out.copy_(conv.plain(x, weight)), state.zero_()
    if out.numel():
        _implementation(x).forward(x, weight, value, out, state, conv, iterations, Penalty(*penalty))
    return out, state


mixed_sum = torch.library.custom_op(
    "timm_nrpm::mixed_sum",
    compute,
    mutates_args=(),
    schema=f"(Tensor x, Tensor weight, Tensor lam, bool skip, {SETTINGS}, bool channels_last, bool keep)"
    " -> (Tensor, Tensor)",
)


@mixed_sum.register_fake
def _(x: Tensor, weight: Tensor, lam: Tensor, skip: bool, *settings: Any) -> tuple[Tensor, Tensor]:
    *shape, iterations, _penalty, channels_last, keep = settings
    return empty_results(x, weight, convolution(*shape), iterations, keep, channels_last)


def compute_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    lam: Tensor,
    state: Tensor,
    skip: bool,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    iterations: int,
    penalty: Sequence[float],
    need_x: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of `mixed_sum` with respect to `x` and `weight`; one that is not needed is empty."""
    conv, needs, value = convolution(stride, padding, dilation, groups), (need_x, need_weight), float(lam)
    grad_x, grad_weight = empty_gradients(x, weight, *needs)
    if skip and value >= 1:
        for gradient, plain in zip((grad_x, grad_weight), conv.plain_gradients(grad, x, weight, needs), strict=True):
            gradient.copy_(plain)
        return grad_x, grad_weight
    grad_x.zero_(), grad_weight.zero_()
    if grad.numel():
        _implementation(x).backward(
            grad, x, weight, value, state, grad_x, grad_weight, conv, iterations, Penalty(*penalty)
        )
    return grad_x, grad_weight


mixed_sum_backward = torch.library.custom_op(
    "timm_nrpm::mixed_sum_backward",
    compute_backward,
    mutates_args=(),
    schema="(Tensor grad, Tensor x, Tensor weight, Tensor lam, Tensor state, bool skip, "
    f"{SETTINGS}, bool need_x, bool need_weight) -> (Tensor, Tensor)",
)


@mixed_sum_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, *settings: Any) -> tuple[Tensor, Tensor]:
    *_, need_x, need_weight = settings
    return empty_gradients(x, weight, need_x, need_weight)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, lam, *settings = inputs
    ctx.settings = settings[:-2]  # without the format and keep
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, lam, output[1])


def _backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    # Second derivatives would silently lack what x and weight contribute.
    if torch.is_grad_enabled():
        raise RuntimeError("The robust estimate has first derivatives only: call backward without create_graph.")
    nothing = (None,) * 9
    if grad is None:
        return None, None, None, *nothing
    x, weight, lam, state = ctx.saved_tensors
    needs = ctx.needs_input_grad[:2]
    grad_x = grad_weight = grad_lam = None
    if any(needs):
        grad_x, grad_weight = mixed_sum_backward(grad, x, weight, lam, state, *ctx.settings, *needs)
    if ctx.needs_input_grad[2]:
        *_, iterations, _penalty = ctx.settings
        grad_lam = (state[0] - state[iterations]).mul_(grad).sum() * weight[0].numel()
    return grad_x if needs[0] else None, grad_weight if needs[1] else None, grad_lam, *nothing


mixed_sum.register_autograd(_backward, setup_context=_setup)
