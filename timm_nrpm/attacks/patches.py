"""Attacks that change one square of an image, as a sticker does."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from timm_nrpm.attacks.gradients import Forward, generators, losses, slope
from timm_nrpm.attacks.pursuit import Pursuit
from timm_nrpm.attacks.threats import Threat, inside, sides, wide

PLACES = 4
"""Largest number of places at which an ascent tries a patch."""

STEP = 0.5
"""Size of the first step of a patch's pixels, which may move from 0 to 1."""

JUDGED, CLIMBED = 64, 3
"""Largest numbers of places at which the attacked model judges a patch, and from which the patch climbs."""

EVERY = 3
"""Number of steps of a patch's pixels after which the attacked model is shown them."""

MOVED = 0.3
"""Share of the queries of a random search that move the patch, rather than colour a part of it anew."""


def climbing_patch(
    follow: Forward,
    pixels: Tensor,
    labels: Tensor,
    threat: Threat,
    *,
    rounds: int,
    average: int = 1,
    fooled: bool = True,
) -> Tensor:
    """Attack by a patch along the gradient: at the places where the gradient of the margin promises most, set the patch
    to the corner of the colour cube that it points to, and climb from there by steps that shrink to zero (after LaVAN,
    Karmon et al., arXiv 1801.02608, with places chosen by the gradient).

    Args:
        follow: Model whose margin is climbed.
        pixels, labels: Images `[B, C, H, W]` in [0, 1], and their classes `[B]`.
        threat: Threat by a patch; its bound is the side of the square.
        rounds: Number of gradients, which the places share evenly after the first; two at least.
        average, fooled: The same as in :func:`timm_nrpm.attacks.apgd.climb`.

    Returns:
        Attacked pixels `[B, C, H, W]`, which differ in one square; those with the highest margin.
    """
    height, width = sides(threat, pixels)
    result = pixels.clone()
    logits, best, gradient = slope(follow, pixels, labels, "margin", None, average)
    rows = torch.arange(len(pixels), device=pixels.device)
    if fooled:
        rows = rows[logits.argmax(1) == labels]
    corner, promise = _promises(pixels, gradient, height, width)
    places = min(PLACES, max(1, rounds // 3), promise[0].numel())
    for part in torch.arange(max(rounds - 1, 1)).tensor_split(places):
        place = promise.flatten(1).argmax(1)
        top, left = place // promise.shape[2], place % promise.shape[2]
        promise = promise.masked_fill(_near(promise, top, left, height, width), -torch.inf)
        mask = inside(pixels, top, left, height, width)
        x = torch.where(mask, corner, pixels)
        for step in range(len(part)):
            if not len(rows):
                return result
            logits, values, gradient = slope(follow, x[rows], labels[rows], "margin", None, average)
            better = values > best[rows]
            best[rows[better]], result[rows[better]] = values[better], x[rows[better]]
            if fooled:
                right = logits.argmax(1) == labels[rows]
                result[rows[~right]], best[rows[~right]] = x[rows[~right]], torch.inf
                rows, gradient = rows[right], gradient[right]
            if step == len(part) - 1:
                break
            size = STEP * (1 - step / len(part))
            x[rows] = torch.where(mask[rows], (x[rows] + size * gradient.sign()).clamp(0, 1), pixels[rows])
    return result


def paste(pursuit: Pursuit, rows: Tensor, follow: Forward, *, rounds: int, fresh: bool, average: int = 1) -> None:
    """Attack by a patch at judged places: the attacked model judges the patch of corners that the gradient points to at
    the places where it promises most, and the patch climbs from there at the best of them, by steps that shrink to
    zero.

    Args:
        pursuit: Pursuit under the threat of a patch, that keeps the worst points found.
        rows: Indices of the images to attack, `[n]`.
        follow: Model whose margin is climbed.
        rounds: Number of gradients, which up to three places share evenly after the first; two at least.
        fresh: Whether to look for places; otherwise the worst patch so far climbs on where it is.
        average: Number of forwards that are averaged for each gradient.
    """
    pixels = pursuit.pixels[rows]
    height, width = sides(pursuit.threat, pixels)
    if not fresh:
        rows = rows[(pursuit.best[rows] != pixels).flatten(1).any(1)]
        _climb(pursuit, rows, follow, pursuit.best[rows], _place(pursuit, rows, height, width), rounds, average)
        return
    _, _, gradient = slope(follow, pixels, pursuit.labels[rows], "margin", None, average)
    corner, promise = _promises(pixels, gradient, height, width)
    order = _peaks_first(promise, 2 * (min(height, width) // 4) + 1)[:, :JUDGED]
    margins = []
    for place in order.unbind(1):
        mask = inside(pixels, place // promise.shape[2], place % promise.shape[2], height, width)
        margins.append(pursuit.judge(rows, torch.where(mask, corner, pixels)))
    judged = torch.full_like(promise, -torch.inf).flatten(1).scatter(1, order, torch.stack(margins, 1))
    judged = judged.view_as(promise)
    places = min(CLIMBED, max(1, rounds // 3), promise[0].numel())
    for part in torch.arange(max(rounds - 1, 1)).tensor_split(places):
        active = pursuit.right[rows]
        rows, pixels, corner, judged, promise = (each[active] for each in (rows, pixels, corner, judged, promise))
        known = wide(judged.flatten(1).amax(1) > -torch.inf, judged)  # whether a judged place is left
        place = torch.where(known, judged, promise).flatten(1).argmax(1)
        top, left = place // judged.shape[2], place % judged.shape[2]
        near = _near(judged, top, left, height, width)
        judged, promise = judged.masked_fill(near, -torch.inf), promise.masked_fill(near, -torch.inf)
        mask = inside(pixels, top, left, height, width)
        _climb(pursuit, rows, follow, torch.where(mask, corner, pixels), mask, len(part), average)


def _peaks_first(promise: Tensor, window: int) -> Tensor:
    """All places of each image by what they promise, `[B, H' * W']`: first those that promise most within a window
    around them, since neighbours see nearly the same, and then the others."""
    peaks = (promise == F.max_pool2d(promise, window, 1, window // 2)).flatten(1)
    order = promise.flatten(1).argsort(dim=1, descending=True, stable=True)
    last = ~peaks.gather(1, order)
    return order.gather(1, last.int().argsort(dim=1, stable=True))


def _climb(pursuit: Pursuit, rows: Tensor, follow: Forward, x: Tensor, mask: Tensor, steps: int, average: int) -> None:
    """Climb with the pixels of a patch, whose mask `[n, 1, H, W]` says where it is."""
    for step in range(steps):
        if not len(rows):
            return
        _, _, gradient = slope(follow, x, pursuit.labels[rows], "margin", None, average)
        size = STEP * (1 - step / steps)
        x = torch.where(mask, (x + size * gradient.sign()).clamp(0, 1), x)
        if step == steps - 1 or (step + 1) % EVERY == 0:
            right = pursuit.look(rows, x)
            rows, x, mask = rows[right], x[right], mask[right]


def _place(pursuit: Pursuit, rows: Tensor, height: int, width: int) -> Tensor:
    """Mask `[n, 1, H, W]` of a patch that covers what differs at the worst points so far."""
    changed = (pursuit.best[rows] != pursuit.pixels[rows]).any(1)
    top = changed.any(2).int().argmax(1).clamp(max=changed.shape[1] - height)
    left = changed.any(1).int().argmax(1).clamp(max=changed.shape[2] - width)
    return inside(pursuit.pixels[rows], top, left, height, width)


def _promises(pixels: Tensor, gradient: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """The corners of the colour cube that a gradient points to `[B, C, H, W]`, and what it promises for a patch of them
    at each place, `[B, H', W']`."""
    corner = (gradient > 0).to(pixels)
    gains = (gradient * (corner - pixels)).sum(1, keepdim=True)
    return corner, F.avg_pool2d(gains, (height, width), 1).squeeze(1)


def _near(promise: Tensor, top: Tensor, left: Tensor, height: int, width: int) -> Tensor:
    """Places less than half of a patch from one that was tried, `[B, H', W']`."""
    down = torch.arange(promise.shape[1], device=promise.device).view(1, -1, 1) - top.view(-1, 1, 1)
    across = torch.arange(promise.shape[2], device=promise.device).view(1, 1, -1) - left.view(-1, 1, 1)
    return (down.abs() <= height // 2) & (across.abs() <= width // 2)


@torch.no_grad()
def random_patch(
    follow: Forward, pixels: Tensor, labels: Tensor, threat: Threat, seeds: Sequence[int], *, queries: int
) -> Tensor:
    """Attack by a patch without gradients: a square of random place and colours is moved, by ever less, or coloured
    anew in a part that gets smaller, and a draw is kept where the margin grows (Sparse-RS for patches, Croce et al.,
    arXiv 2006.12834, section 4).

    Args:
        follow: Attacked model.
        pixels, labels: Images `[B, C, H, W]` in [0, 1], and their classes `[B]`.
        threat: Threat by a patch; its bound is the side of the square.
        seeds: One seed for each image, which decides its draws.
        queries: Largest number of forwards for each image after the first one.

    Returns:
        Attacked pixels `[B, C, H, W]`, which differ in one square.
    """
    height, width = sides(threat, pixels)
    spans = pixels.new_tensor([pixels.shape[2] - height, pixels.shape[3] - width])
    channels = pixels.shape[1]
    draws = generators(seeds)
    table = torch.stack([torch.rand(queries + 1, 5 + channels, generator=g) for g in draws], 1).to(pixels)
    colours = torch.stack([torch.randint(2, (channels, height, width), generator=g) for g in draws]).to(pixels)
    places = (table[0, :, :2] * (spans + 1)).floor().minimum(spans)
    result = _pasted(pixels, colours, places)
    margin = losses(follow(result), labels, "margin")
    for query, draw in enumerate(table[1:]):
        rows = (margin <= 0).nonzero().squeeze(1)
        if not len(rows):
            break
        left = 1 - query / queries
        draw, colour, place = draw[rows], colours[rows].clone(), places[rows]
        moves = draw[:, 4] < MOVED
        shift = ((2 * draw[:, :2] - 1) * (1 + left * spans / 2)).round()
        place = torch.where(moves.unsqueeze(1), (place + shift).clamp(min=0).minimum(spans), place)
        part_height, part_width = (max(1, round(0.6 * left * side)) for side in (height, width))
        part = pixels.new_tensor([height - part_height + 1, width - part_width + 1])
        corner = (draw[:, 2:4] * part).floor().minimum(part - 1).long()
        painted = inside(colour, corner[:, 0], corner[:, 1], part_height, part_width)
        painted = painted & ~moves.view(-1, 1, 1, 1)
        colour = torch.where(painted, wide(draw[:, 5:].round(), colour), colour)
        images = _pasted(pixels[rows], colour, place)
        values = losses(follow(images), labels[rows], "margin")
        better = values > margin[rows]
        kept = rows[better]
        colours[kept], places[kept], result[kept] = colour[better], place[better], images[better]
        margin[kept] = values[better]
    return result


def _pasted(pixels: Tensor, colours: Tensor, places: Tensor) -> Tensor:
    """Images with a patch `[B, C, h, w]` of each pasted at its place `[B, 2]`."""
    result = pixels.clone()
    height, width = colours.shape[2:]
    for image, colour, (top, left) in zip(result, colours, places.long().tolist(), strict=True):
        image[:, top : top + height, left : left + width] = colour
    return result
