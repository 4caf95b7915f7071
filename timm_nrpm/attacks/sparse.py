"""Attacks that change few pixels, under L0, and the attacks on few pixels by their norm.

A gradient says little about a pixel that jumps to another colour: on a plain LeNet the pixels that it ranks first miss
a third of the images that better chosen pixels break. So the attacked model judges what the gradient proposes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from timm_nrpm.attacks.gradients import Forward, generators, losses, slope
from timm_nrpm.attacks.patches import climbing_patch, paste, random_patch
from timm_nrpm.attacks.pursuit import Pursuit
from timm_nrpm.attacks.threats import Threat, wide

PROPOSED = 8
"""Number of changes that the gradient proposes for an image in a round of exchanges."""


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


def exchange(pursuit: Pursuit, rows: Tensor, follow: Forward, *, rounds: int, fresh: bool, average: int = 1) -> None:
    """Attack under L0 by judged exchanges: in each round the gradient proposes some pixels and their corners of the
    colour cube, and the attacked model judges them one by one. While fewer pixels have changed than may, the best is
    added. After that the best takes the place of the pixel that the gradient would miss least, if the margin grows;
    otherwise that of another one is tried in the next round, and once all have had their turn, the next pixels are
    proposed.

    Args:
        pursuit: Pursuit under L0 that keeps the worst points found.
        rows: Indices of the images to attack, `[n]`.
        follow: Model whose margin's gradient proposes.
        rounds: Number of gradients. If more positions may change than half of this number, the surplus is changed first
            by :func:`greedy_pixels`.
        fresh: Whether to start from the images themselves instead of the worst points so far.
        average: Number of forwards that are averaged for each gradient.
    """
    count = min(int(pursuit.threat.eps), pursuit.pixels[0, 0].numel())
    x, surplus = pursuit.best[rows], count - max(1, rounds // 2)
    if fresh:
        x = pursuit.pixels[rows]
    if fresh and surplus > 0:
        few = Threat("L0", surplus)
        x = greedy_pixels(follow, x, pursuit.labels[rows], few, rounds=rounds, average=average, fooled=False)
    margin, vain = pursuit.judge(rows, x), torch.zeros_like(rows)
    for _ in range(rounds):
        active = pursuit.right[rows]
        rows, x, margin, vain = rows[active], x[active], margin[active], vain[active]
        if not len(rows):
            return
        _, _, gradient = slope(follow, x, pursuit.labels[rows], "margin", None, average)
        corner = (gradient > 0).to(x)
        changed = (x != pursuit.pixels[rows]).any(1).flatten(1)
        full = changed.sum(1) >= count
        undone = torch.where(wide(full, x), _without_one(pursuit.pixels[rows], x, gradient, changed, vain % count), x)
        gain = (gradient * (corner - x)).sum(1).flatten(1).masked_fill(changed & ~full.unsqueeze(1), -torch.inf)
        order = gain.argsort(dim=1, descending=True, stable=True)
        most, taken = torch.full_like(margin, -torch.inf), x
        for rank in range(min(PROPOSED, order.shape[1])):
            ranks = (vain // count * PROPOSED + rank) % order.shape[1]
            images = torch.where(_only(order.gather(1, ranks.unsqueeze(1)).squeeze(1), x), corner, undone)
            margins = pursuit.judge(rows, images)
            better = margins > most
            most, taken = torch.where(better, margins, most), torch.where(wide(better, x), images, taken)
        better = (most > margin) | ~full
        x, margin = torch.where(wide(better, x), taken, x), torch.where(better, most, margin)
        vain = torch.where(better, 0, vain + 1)


def _without_one(pixels: Tensor, x: Tensor, gradient: Tensor, changed: Tensor, rank: Tensor) -> Tensor:
    """Undo one change of each image: the one of this rank `[B]` among those that the gradient would miss least."""
    missed = (gradient * (pixels - x)).sum(1).flatten(1).masked_fill(~changed, -torch.inf)
    place = missed.argsort(dim=1, descending=True, stable=True).gather(1, rank.unsqueeze(1)).squeeze(1)
    return torch.where(_only(place, x), pixels, x)


def _only(place: Tensor, like: Tensor) -> Tensor:
    """Mask `[B, 1, H, W]` of one position `[B]` of each image."""
    return F.one_hot(place, like[0, 0].numel()).view(len(like), 1, *like.shape[2:]) > 0


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


class Ascent(Protocol):
    """An attack along the gradient that changes few pixels."""

    def __call__(
        self,
        follow: Forward,
        pixels: Tensor,
        labels: Tensor,
        threat: Threat,
        *,
        rounds: int,
        average: int,
        fooled: bool,
    ) -> Tensor: ...


class Judged(Protocol):
    """An attack on few pixels that shows the attacked model what it tries, and goes on from what that judges best."""

    __name__: str

    def __call__(
        self, pursuit: Pursuit, rows: Tensor, follow: Forward, *, rounds: int, fresh: bool, average: int
    ) -> None: ...


class Search(Protocol):
    """An attack by random draws that changes few pixels."""

    __name__: str

    def __call__(
        self, follow: Forward, pixels: Tensor, labels: Tensor, threat: Threat, seeds: Sequence[int], *, queries: int
    ) -> Tensor: ...


@dataclass(frozen=True)
class Sparse:
    """The attacks under a norm that counts pixels.

    Attributes:
        ascent, judged, search: The attacks.
    """

    ascent: Ascent
    judged: Judged
    search: Search


SPARSE = {"L0": Sparse(greedy_pixels, exchange, random_pixels), "patch": Sparse(climbing_patch, paste, random_patch)}
"""The attacks by norm; every other norm is climbed by steps."""
