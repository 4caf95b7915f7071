"""Carlini and Wagner's attack under L2 (arXiv 1608.04644)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from timm_nrpm.attacks.gradients import Forward, losses
from timm_nrpm.attacks.threats import wide


def carlini_wagner(
    follow: Forward, pixels: Tensor, labels: Tensor, *, steps: int, searches: int = 9, rate: float = 0.01
) -> Tensor:
    """Attack under L2 with the smallest change that fools the model, found by a binary search over the constant c for
    each image (Carlini and Wagner, arXiv 1608.04644, section VI.A).

    Args:
        follow: Attacked model, whose gradient is followed.
        pixels, labels: Images `[B, C, H, W]` in [0, 1], and their classes `[B]`.
        steps: Number of steps of Adam for each value of c.
        searches: Number of values of c that are tried.
        rate: Learning rate of Adam.

    Returns:
        Attacked pixels `[B, C, H, W]`: of the points that fool the model the one nearest to the image, or the image
        itself where there is none. The change is not bounded, so the caller has to check it against a threat.
    """
    low, c = pixels.new_zeros(len(pixels)), pixels.new_full((len(pixels),), 1e-2)
    high = torch.full_like(low, 1e10)
    result, nearest = pixels.clone(), torch.full_like(low, math.inf)
    inside = torch.atanh((2 * pixels - 1).clamp(-1 + 1e-6, 1 - 1e-6))
    for _ in range(searches):
        w = inside.clone().requires_grad_()
        optimizer, hit = torch.optim.Adam([w], lr=rate), torch.zeros_like(low, dtype=torch.bool)
        for _ in range(steps):
            x = (torch.tanh(w) + 1) / 2
            logits = follow(x)
            distance = (x - pixels).flatten(1).square().sum(1)
            margin = losses(logits, labels, "margin")
            (gradient,) = torch.autograd.grad((distance + c * (-margin).clamp(min=0)).sum(), w)
            w.grad = gradient.nan_to_num(0.0, 0.0, 0.0)
            optimizer.step()
            with torch.no_grad():
                wrong = logits.argmax(1) != labels
                hit |= wrong
                closer = wrong & (distance < nearest)
                nearest = torch.where(closer, distance, nearest)
                result = torch.where(wide(closer, x), x.detach(), result)
        high, low = torch.where(hit, torch.minimum(high, c), high), torch.where(hit, low, torch.maximum(low, c))
        c = torch.where(high < 1e9, (low + high) / 2, c * 10)
    return result
