"""Auto-PGD (Croce and Hein, arXiv 2003.01690): ascents that halve their steps where the loss no longer rises."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from timm_nrpm.attacks.gradients import DENSE, Forward, direction, generators, slope
from timm_nrpm.attacks.threats import Threat, wide

MOMENTUM = 0.75
"""Weight of the new step; the rest is the weight of the previous step (arXiv 2003.01690, eq. 2)."""


RISES = 0.75
"""Share of the steps since the last checkpoint that must have raised the loss; with fewer, the step size is halved
(arXiv 2003.01690, condition 1)."""


def checkpoints(steps: int, norm: str = "Linf") -> set[int]:
    """Return the steps at which Auto-PGD decides whether to reduce its step size (arXiv 2003.01690, section 3.1; for L1
    arXiv 2103.01208)."""
    if norm == "L1":
        return set(range(0, steps, max(1, int(0.04 * steps)))) - {0}
    shares = [0.0, 0.22]
    while shares[-1] < 1:
        shares.append(shares[-1] + max(shares[-1] - shares[-2] - 0.03, 0.06))
    return {math.ceil(round(share * steps, 6)) for share in shares[1:]}  # in floats, 0.7 * 100 may exceed 70


def climb(
    follow: Forward,
    pixels: Tensor,
    labels: Tensor,
    threat: Threat,
    seeds: Sequence[int],
    *,
    steps: int,
    loss: str = "cross_entropy",
    target: Tensor | None = None,
    start: Tensor | None = None,
    average: int = 1,
    fooled: bool = True,
) -> tuple[Tensor, Tensor]:
    """Auto-PGD: projected gradient ascent with momentum that halves its step size where it no longer makes progress and
    then continues from the best point so far (Croce and Hein, arXiv 2003.01690, Algorithm 1).

    Under L1 it has no momentum, and moves fewer values at once the fewer values the best point has changed
    (arXiv 2103.01208, Algorithm 1).

    Args:
        follow: Model whose loss is climbed.
        pixels, labels: Images `[B, C, H, W]` in [0, 1], and their classes `[B]`.
        threat: Norm and bound of the change; the norm is Linf, L2 or L1.
        seeds: One seed for each image, which decides its random start. They are not used where `start` is given.
        steps: Number of steps.
        loss: Loss to climb, one of `LOSSES`.
        target: Target class of the margin for each image, `[B]`; by default the strongest other class.
        start: Images to start from, `[B, C, H, W]`; by default random images within the threat.
        average: Number of forwards that are averaged for each gradient.
        fooled: Whether `follow` makes the same predictions as the attacked model. An image that `follow` gets wrong is
            then finished, and its attack stops.

    Returns:
        Attacked pixels `[B, C, H, W]`, for a finished image those that `follow` got wrong and for any other those with
        the highest loss; and the highest loss of each image up to each step, `[steps + 1, B]`, NaN after the image is
        finished.
    """
    x = threat.around(pixels, generators(seeds)) if start is None else threat.project(pixels, start)
    result, trace = x.clone(), x.new_full((steps + 1, len(x)), math.nan)
    rows = torch.arange(len(x), device=x.device)  # indices of the images still attacked
    sparse = threat.norm == "L1"
    size = x.new_full((len(x),), (1.0 if sparse else 2.0) * threat.eps)
    best = x.new_full((len(x),), -math.inf)
    best_x, best_gradient, before = x.clone(), torch.zeros_like(x), x.clone()
    rises, last_best, halved = torch.zeros_like(size), best.clone(), torch.ones_like(size, dtype=torch.bool)
    previous, last_checkpoint = best.clone(), 0
    share, spread = torch.full_like(size, DENSE), torch.full_like(size, x[0].numel())  # only used under L1
    due = checkpoints(steps, threat.norm)
    for step in range(steps + 1):
        targets = None if target is None else target[rows]
        logits, values, gradient = slope(follow, x, labels[rows], loss, targets, average)
        better = values > best
        best, best_x = torch.where(better, values, best), torch.where(wide(better, x), x, best_x)
        best_gradient = torch.where(wide(better, x), gradient, best_gradient)
        rises, previous = (rises + (values > previous) if step else rises), values
        result[rows], trace[step, rows] = best_x, best
        if fooled:
            right = logits.argmax(1) == labels[rows]
            result[rows[~right]] = x[~right]
            states = (x, rows, size, best, best_x, best_gradient, before, rises, last_best, halved, previous, gradient)
            x, rows, size, best, best_x, best_gradient, before, rises, last_best, halved, previous, gradient = (
                state[right] for state in states
            )
            share, spread = share[right], spread[right]
        if step == steps or not len(rows):
            break
        if step in due and sparse:
            changed = (best_x != pixels[rows]).flatten(1).sum(1).to(size)
            fewer, spread = changed < 0.95 * spread, changed
            share = changed / x[0].numel() / 1.5
            size = torch.where(fewer, threat.eps, (size / 1.5).clamp(min=threat.eps / 10))
            x, gradient = torch.where(wide(fewer, x), best_x, x), torch.where(wide(fewer, x), best_gradient, gradient)
        elif step in due:
            stuck = rises < RISES * (step - last_checkpoint)
            stuck |= ~halved & (last_best >= best)
            size = torch.where(stuck, size / 2, size)
            x, gradient = torch.where(wide(stuck, x), best_x, x), torch.where(wide(stuck, x), best_gradient, gradient)
            rises, last_best, halved, last_checkpoint = torch.zeros_like(rises), best.clone(), stuck, step
        moved = threat.project(pixels[rows], x + wide(size, x) * direction(gradient, threat, x, share))
        if step and not sparse:
            moved = threat.project(pixels[rows], x + MOMENTUM * (moved - x) + (1 - MOMENTUM) * (x - before))
        before, x = x, moved
    return result.detach(), trace
