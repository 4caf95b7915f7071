"""Random search: squares of random place and size are pushed to the bound of the threat, by the scores alone."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from timm_nrpm.attacks.gradients import generators
from timm_nrpm.attacks.pursuit import Pursuit
from timm_nrpm.attacks.threats import Threat, inside, wide

LARGEST = 3
"""The side of a search's squares is at most the shorter side of an image divided by this number."""

HERITAGE = 0.6
"""Share of a herd's queries in which a square is copied from another point of the herd instead of drawn at random."""


@torch.no_grad()
def search(pursuit: Pursuit, rows: Tensor, seeds: Sequence[int], *, queries: int, herd: int = 1) -> None:
    """Random search from the worst points so far: squares of random place and size are pushed to the bound, and are
    kept where the margin does not fall (after Square, Andriushchenko et al., arXiv 1912.00049, which starts from
    stripes).

    Args:
        pursuit: Pursuit that the starting points come from, and that keeps the worst points found.
        rows: Indices of the images to attack, `[n]`.
        seeds: One seed for each of the rows.
        queries: Number of forwards of the attacked model for each image.
        herd: Number of consecutive rows of the pursuit that are points of one image. If it is more than 1, squares are
            often copied from another of these points, which an evolutionary search calls crossover.
    """
    if not len(rows):
        return
    # Each image has its own draws, whichever images are beside it.
    channels = pursuit.pixels.shape[1]
    draws = [torch.rand(queries, 5 + channels, generator=g, dtype=torch.float32) for g in generators(seeds)]
    table = torch.stack(draws, 1).to(pursuit.pixels)  # [queries, n, 5 + C]
    places = torch.arange(len(rows), device=rows.device)
    for draw in table:
        places = places[pursuit.right[rows[places]]]
        if not len(places):
            return
        active = rows[places]
        proposals = _pushed(pursuit, active, draw[places])
        if herd > 1:
            inherits = draw[places, 3] < HERITAGE
            copies = _inherited(pursuit, active, draw[places], herd)
            proposals = torch.where(wide(inherits, proposals), copies, proposals)
        pursuit.look(active, pursuit.threat.project(pursuit.pixels[active], proposals))


def _pushed(pursuit: Pursuit, rows: Tensor, draw: Tensor) -> Tensor:
    """Return the worst points with a random square of each pushed to the bound, `[n, C, H, W]`. Small squares are drawn
    more often than large ones."""
    channels, height, width = pursuit.pixels.shape[1:]
    most = max(2, min(height, width) // LARGEST)
    side = torch.exp(draw[:, 0] * math.log(most + 1)).long().clamp(1, most).view(-1, 1, 1)
    place = draw[:, 1:3].view(-1, 2, 1, 1)
    top, left = ((place[:, i] * (span - side + 1)).long() for i, span in enumerate((height, width)))
    sign = (draw[:, 5:] > 0.5).to(pursuit.pixels) * 2 - 1  # [n, C]
    pushed = inside(pursuit.pixels, top, left, side, side)
    return pursuit.best[rows] + _amplitude(pursuit.threat, channels, side) * sign.view(*sign.shape, 1, 1) * pushed


def _inherited(pursuit: Pursuit, rows: Tensor, draw: Tensor, herd: int) -> Tensor:
    """Return the worst points with a square of each copied from another point of its herd, `[n, C, H, W]`. Squares of
    all sizes are drawn equally often and may extend beyond the edge, since half of an image, or even most of it, is
    also a good share to copy."""
    height, width = pursuit.pixels.shape[2:]
    most = max(height, width)
    side = 1 + (draw[:, 0] * most).long().clamp(max=most - 1).view(-1, 1, 1)
    place = draw[:, 1:3].view(-1, 2, 1, 1)
    top, left = ((place[:, i] * (span + side - 1)).long() - side + 1 for i, span in enumerate((height, width)))
    others = rows // herd * herd + (rows % herd + 1 + (draw[:, 4] * (herd - 1)).long()) % herd
    return torch.where(inside(pursuit.pixels, top, left, side, side), pursuit.best[others], pursuit.best[rows])


def _amplitude(threat: Threat, channels: int, side: Tensor) -> Tensor:
    """Return how far a square is pushed, `[n, 1, 1, 1]`: under Linf across the whole bound, under L2 by half of the
    bound, under L1 to black or white, for which the projection then reduces the change elsewhere."""
    side = side.unsqueeze(1).float()
    if threat.norm == "Linf":
        return torch.full_like(side, 2 * threat.eps)
    if threat.norm == "L2":
        return threat.eps / 2 / (side * math.sqrt(channels))
    return torch.ones_like(side)
