"""Attacks that climb a loss within any threat, made for models whose own gradient misleads.

The model that an attack follows and the model that it is meant to fool may differ. Each image has random draws of its
own, so that its result depends neither on the batch nor on how many processes share the images.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from timm_nrpm.attacks.threats import Threat

Forward = Callable[[Tensor], Tensor]
"""Function from pixels `[B, C, H, W]` to logits `[B, N]`."""

LOSSES = ("cross_entropy", "margin")

MOMENTUM = 0.75
"""Weight of the new step; the rest is the weight of the previous step (arXiv 2003.01690, eq. 2)."""

DENSE = 0.2
"""Share of the values, those with the largest gradient, that the first steps under L1 move (arXiv 2103.01208)."""

RISES = 0.75
"""Share of the steps since the last checkpoint that must have raised the loss; with fewer, the step size is halved
(arXiv 2003.01690, condition 1)."""


def losses(logits: Tensor, labels: Tensor, loss: str, target: Tensor | None = None) -> Tensor:
    """Return the loss that an attack climbs for each image, `[B]`.

    The margin is the logit of the strongest other class, or of `target`, minus that of the label (Carlini and Wagner,
    arXiv 1608.04644): unlike the cross-entropy of a confident model, it never has a gradient of zero.
    """
    if loss == "cross_entropy":
        return F.cross_entropy(logits, labels, reduction="none")
    own = logits.gather(1, labels.unsqueeze(1)).squeeze(1)
    if target is not None:
        return logits.gather(1, target.unsqueeze(1)).squeeze(1) - own
    return logits.scatter(1, labels.unsqueeze(1), -math.inf).amax(1) - own


def generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """Return one random generator for each image, on the CPU, seeded by the image's seed."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def slope(
    follow: Forward, x: Tensor, labels: Tensor, loss: str, target: Tensor | None, average: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the logits `[B, N]`, the losses `[B]` and the gradient of the losses `[B, C, H, W]` at images `x`.

    The logits are the mean over `average` forwards (expectation over transformation, arXiv 1707.07397, for a forward
    that is random). Entries of the gradient that are not finite are set to 0.
    """
    x = x.detach().requires_grad_()
    logits = torch.stack([follow(x) for _ in range(average)]).mean(0)
    values = losses(logits, labels, loss, target)
    (gradient,) = torch.autograd.grad(values.sum(), x)
    return logits.detach(), values.detach(), gradient.nan_to_num(0.0, 0.0, 0.0)


def direction(gradient: Tensor, threat: Threat, x: Tensor, share: Tensor) -> Tensor:
    """Return the steepest step `[B, C, H, W]` of length 1 in the threat's norm, from images `x`.

    Under L1 the step is spread over a share `[B]` of the values. Values that cannot move further in the direction of
    the gradient without leaving [0, 1] are left out (arXiv 2103.01208, section 3).
    """
    if threat.norm == "Linf":
        return gradient.sign()
    if threat.norm == "L2":
        return gradient / _wide(gradient.flatten(1).norm(dim=1).clamp(min=1e-12), gradient)
    flat = gradient.where((gradient > 0) & (x < 1) | (gradient < 0) & (x > 0), 0.0).flatten(1)
    last = (share * flat.shape[1]).long().clamp(1, flat.shape[1]) - 1
    least = flat.abs().sort(1, descending=True).values.gather(1, last.unsqueeze(1))
    flat = flat.sign() * (flat.abs() >= least)
    return (flat / flat.abs().sum(1, keepdim=True).clamp(min=1e-12)).view_as(gradient)


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
        best, best_x = torch.where(better, values, best), torch.where(_wide(better, x), x, best_x)
        best_gradient = torch.where(_wide(better, x), gradient, best_gradient)
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
            x, gradient = torch.where(_wide(fewer, x), best_x, x), torch.where(_wide(fewer, x), best_gradient, gradient)
        elif step in due:
            stuck = rises < RISES * (step - last_checkpoint)
            stuck |= ~halved & (last_best >= best)
            size = torch.where(stuck, size / 2, size)
            x, gradient = torch.where(_wide(stuck, x), best_x, x), torch.where(_wide(stuck, x), best_gradient, gradient)
            rises, last_best, halved, last_checkpoint = torch.zeros_like(rises), best.clone(), stuck, step
        moved = threat.project(pixels[rows], x + _wide(size, x) * direction(gradient, threat, x, share))
        if step and not sparse:
            moved = threat.project(pixels[rows], x + MOMENTUM * (moved - x) + (1 - MOMENTUM) * (x - before))
        before, x = x, moved
    return result.detach(), trace


def greedy_pixels(
    follow: Forward,
    pixels: Tensor,
    labels: Tensor,
    threat: Threat,
    *,
    rounds: int,
    average: int = 1,
    fooled: bool = True,
) -> Tensor:
    """Attack under L0 along the gradient: set pixels to the corner of the colour cube that the gradient of the margin
    points to, beginning with those where it predicts the largest gain (after JSMA, Papernot et al., arXiv 1511.07528).

    Args:
        follow: Model whose margin is climbed.
        pixels, labels: Images `[B, C, H, W]` in [0, 1], and their classes `[B]`.
        threat: Threat under L0; its bound is the number of positions that may change.
        rounds: Number of gradients. The positions are shared evenly among them.
        average, fooled: The same as in :func:`climb`.

    Returns:
        Attacked pixels `[B, C, H, W]`, at most `threat.eps` of whose positions changed.
    """
    count = min(int(threat.eps), pixels[0, 0].numel())
    x, free = pixels.clone(), torch.ones_like(pixels[:, 0]).flatten(1)  # [B, H * W]
    active = torch.arange(len(x), device=x.device)
    for part in torch.arange(count).tensor_split(min(rounds, count)):
        images = x[active]
        logits, _, gradient = slope(follow, images, labels[active], "margin", None, average)
        if fooled:
            right = logits.argmax(1) == labels[active]
            active, images, gradient = active[right], images[right], gradient[right]
        if not len(active):
            break
        corner = (gradient > 0).to(images)
        gain = (gradient * (corner - images)).sum(1).flatten(1) * free[active]
        chosen = torch.zeros_like(gain).scatter_(1, gain.topk(len(part)).indices, 1.0)
        free[active] = free[active] * (1 - chosen)
        mask = chosen.view(len(images), 1, *images.shape[2:])
        x[active] = torch.where(mask > 0, corner, images)
    return threat.project(pixels, x)


@torch.no_grad()
def random_pixels(
    follow: Forward, pixels: Tensor, labels: Tensor, threat: Threat, seeds: Sequence[int], *, queries: int
) -> Tensor:
    """Attack under L0 without gradients: set random pixels to random corners of the colour cube, draw ever fewer of
    them anew, and keep a draw where the margin grows (Sparse-RS, Croce et al., arXiv 2006.12834).

    Args:
        follow: Attacked model.
        pixels, labels: Images `[B, C, H, W]` in [0, 1], and their classes `[B]`.
        threat: Threat under L0; its bound is the number of positions that may change.
        seeds: One seed for each image, which decides its draws.
        queries: Largest number of forwards for each image after the first one.

    Returns:
        Attacked pixels `[B, C, H, W]`, at most `threat.eps` of whose positions changed.
    """
    total, count = pixels[0, 0].numel(), min(int(threat.eps), pixels[0, 0].numel())
    draws = generators(seeds)
    flat = pixels.flatten(2)  # [B, C, H * W]

    def painted(rows: Tensor, places: list[Tensor], colours: list[Tensor]) -> Tensor:
        images = flat[rows].clone()
        for image, place, colour in zip(images, places, colours, strict=True):
            image[:, place] = colour.to(image)
        return images.view(len(rows), *pixels.shape[1:])

    places = [torch.randperm(total, generator=g)[:count].to(pixels.device) for g in draws]
    colours = [torch.randint(2, (pixels.shape[1], count), generator=g) for g in draws]
    rows = torch.arange(len(pixels), device=pixels.device)
    result = painted(rows, places, colours)
    logits = follow(result)
    margin = losses(logits, labels, "margin")
    for query in range(queries):
        rows = (margin <= 0).nonzero().squeeze(1)
        if not len(rows):
            break
        redrawn = max(1, round(count * 0.3 * (1 - query / queries) ** 2))
        proposals = []
        for row in rows.tolist():
            place, colour, g = places[row].clone(), colours[row].clone(), draws[row]
            slots = torch.randperm(count, generator=g)[:redrawn]
            outside = torch.ones(total, dtype=torch.bool)
            outside[place.cpu()] = False
            free = outside.nonzero().squeeze(1)
            if len(free) >= redrawn:
                place[slots] = free[torch.randperm(len(free), generator=g)[:redrawn]].to(place)
            colour[:, slots] = torch.randint(2, (len(colour), redrawn), generator=g)
            proposals.append((place, colour))
        images = painted(rows, [p for p, _ in proposals], [c for _, c in proposals])
        values = losses(follow(images), labels[rows], "margin")
        for i, (row, better) in enumerate(zip(rows.tolist(), (values > margin[rows]).tolist(), strict=True)):
            if better:
                places[row], colours[row] = proposals[i]
                result[row], margin[row] = images[i], values[i]
    return result


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
                result = torch.where(_wide(closer, x), x.detach(), result)
        high, low = torch.where(hit, torch.minimum(high, c), high), torch.where(hit, low, torch.maximum(low, c))
        c = torch.where(high < 1e9, (low + high) / 2, c * 10)
    return result


def _wide(values: Tensor, like: Tensor) -> Tensor:
    """Reshape `[B]` so that it broadcasts with `[B, C, H, W]`."""
    return values.view(-1, *[1] * (like.ndim - 1))
