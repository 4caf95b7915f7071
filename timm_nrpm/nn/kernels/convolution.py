"""How a convolution reads its input, which every kernel needs to know besides the tensors."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Pair = tuple[int, ...]
Needs = tuple[bool, bool]  # whether the gradients of the input and of the weight are needed


@dataclass(frozen=True)
class Convolution:
    """Stride, zero padding, dilation and groups, as in `torch.nn.functional.conv2d`.

    A linear map `[N, D]` to `[N, O]` is the 1x1 convolution `[1, D, 1, N]` to `[1, O, 1, N]`, so the kernels compute
    convolutions alone.
    """

    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1

    def is_pointwise(self, weight: Tensor) -> bool:
        """Whether every output position reads one input position, its own: 1x1, or a linear map."""
        return (tuple(weight.shape[2:]), self.stride, self.padding) == ((1, 1), (1, 1), (0, 0))

    def shape(self, x: Tensor, weight: Tensor) -> tuple[int, ...]:
        """The shape of the output, `[B, O, H', W']`."""
        sizes = zip(x.shape[2:], weight.shape[2:], self.stride, self.padding, self.dilation, strict=True)
        return (x.shape[0], weight.shape[0], *((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sizes))

    def plain(self, x: Tensor, weight: Tensor) -> Tensor:
        """The plain sums, `[B, O, H', W']`, in the type of `x` whatever autocast says."""
        with _without_autocast(x):
            return F.conv2d(x, weight, None, self.stride, self.padding, self.dilation, self.groups)

    def plain_gradients(self, grad: Tensor, x: Tensor, weight: Tensor, needs: Needs) -> tuple[Tensor, Tensor]:
        """The gradients of the plain sums; one that is not needed has no elements."""
        with _without_autocast(x):
            grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
                *(grad, x, weight, None, self.stride, self.padding, self.dilation, False, (0, 0), self.groups),
                (*needs, False),
            )
        return grad_x if needs[0] else x.new_empty(0), grad_weight if needs[1] else weight.new_empty(0)

    def columns(self, x: Tensor, weight: Tensor) -> Tensor:
        """`x` `[B, C, H, W]` unfolded to `[G, D, B * L]`, for L output positions and D = C / G * kH * kW."""
        return self.columns_of_images(x, weight).permute(1, 2, 0, 3).flatten(2)

    def columns_of_images(self, x: Tensor, weight: Tensor) -> Tensor:
        """`x` `[B, C, H, W]` unfolded to `[B, G, D, L]`."""
        if self.is_pointwise(weight):
            columns = x.flatten(2)  # [B, C, L]
        else:
            columns = F.unfold(x, _pair(weight.shape[2:]), self.dilation, self.padding, self.stride)
        return columns.unflatten(1, (self.groups, -1))

    def sum_columns(self, columns: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """The adjoint of `columns`, which adds up to the shape of `x`."""
        columns = columns.unflatten(2, (len(x), -1)).permute(2, 0, 1, 3).flatten(1, 2)  # [B, C * kH * kW, L]
        if self.is_pointwise(weight):
            return columns.reshape(x.shape)
        return F.fold(columns, x.shape[2:], _pair(weight.shape[2:]), self.dilation, self.padding, self.stride)

    def outputs(self, z: Tensor) -> Tensor:
        """`z` `[B, G * O, H', W']` rearranged to `[G, O, B * L]`."""
        return z.flatten(2).unflatten(1, (self.groups, -1)).permute(1, 2, 0, 3).flatten(2)

    def sum_outputs(self, m: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The inverse of `outputs`."""
        m = m.unflatten(2, (shape[0], math.prod(shape[2:])))  # [G, O, B, L]
        return m.permute(2, 0, 1, 3).reshape(shape)


def empty_results(
    x: Tensor, weight: Tensor, conv: Convolution, iterations: int, keep: bool, channels_last: bool
) -> tuple[Tensor, Tensor]:
    """Uninitialised results of the forward pass: the sums, and the state, which is empty unless `keep`."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    out = torch.empty(conv.shape(x, weight), dtype=x.dtype, device=x.device, memory_format=layout)
    if not keep:
        return out, x.new_empty(0)
    return out, x.new_empty_strided((2 * iterations + 2, *out.shape), (out.numel(), *out.stride()))


def empty_gradients(x: Tensor, weight: Tensor, need_x: bool, need_weight: bool) -> tuple[Tensor, Tensor]:
    """Uninitialised results of the backward pass; a gradient that is not needed has no elements."""
    grad_x = torch.empty_like(x) if need_x else x.new_empty(0)
    contiguous = torch.contiguous_format
    return grad_x, torch.empty_like(weight, memory_format=contiguous) if need_weight else weight.new_empty(0)


def strided_as(tensor: Tensor, like: Tensor) -> Tensor:
    """`tensor` if it has the strides of `like`, or a copy that has them."""
    if all(n < 2 or a == b for n, a, b in zip(tensor.shape, tensor.stride(), like.stride(), strict=True)):
        return tensor
    return torch.empty_like(like).copy_(tensor)


def in_planes(state: Tensor) -> Tensor:
    """The state with its planes one behind the other, as it was, unless a hook on saved tensors has moved it."""
    dense = any(state[0].is_contiguous(memory_format=f) for f in (torch.contiguous_format, torch.channels_last))
    return state if dense and state.stride(0) == state[0].numel() else state.contiguous()


def _without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """The context in which autocast is off; none at all where it is off already, since entering it takes a while."""
    device = x.device.type
    enabled = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if enabled else nullcontext()


def _pair(sizes: tuple[int, ...]) -> Pair:
    return sizes[0], sizes[1]
