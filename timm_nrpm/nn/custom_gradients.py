"""Functions whose gradient is another than their derivative."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Clamp(torch.autograd.Function):
    """Clamp to [0, 1] whose gradient is zero only where a descent step would leave the interval.

    `torch.clamp` has no gradient outside the interval, so a lambda that an optimizer pushed past 1 would stay there.
    """

    @staticmethod
    def forward(ctx: Any, lam: Tensor) -> Tensor:
        ctx.save_for_backward(lam)
        return lam.clamp(0.0, 1.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (lam,) = ctx.saved_tensors
        return grad.masked_fill(((lam >= 1) & (grad < 0)) | ((lam <= 0) & (grad > 0)), 0.0)


class StraightThrough(torch.autograd.Function):
    """The value of the first argument with the gradient of the second."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, path: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, grad
