"""Evolution: a search over several points of one image, its herd, which copy squares from each other.

Random search from one point ends on a hill of the margin that no small change can leave. Other points of the same image
end on other hills, and a square that serves one of them in a corner of the image mostly serves the others too. So a
search over a herd, in which a square is more often copied from another point than drawn at random, finds points that
the same number of separate searches does not find (after GenAttack, Alzantot et al., arXiv 1805.11090, which crosses
single values and follows no gradient first). Squares always go to the bound, but the top of a hill may lie inside it.
So all points climb by a few small gradient steps between the parts of the search (a memetic algorithm).
"""

from __future__ import annotations

import torch
from torch import Tensor

from timm_nrpm.attacks.gradients import Forward
from timm_nrpm.attacks.pursuit import Pursuit, ascend
from timm_nrpm.attacks.random_search import search
from timm_nrpm.data.ordering import seed_of

HERD = 10
"""Number of points in the herd of an image."""

PARTS = 4
"""Number of parts of a herd's search; between two parts all its points climb."""

CLIMB = 0.25
"""Step size at the start of these climbs, in units of eps. Each climb has a quarter of the steps of a first ascent."""

GAIN = 0.2
"""Share of the margin that a herd must gain in the first half of its queries to be given the second half."""


class Herd(Pursuit):
    """Some images of a pursuit, each repeated `HERD` times in a row. When one point breaks its image, the search of the
    whole herd ends.

    Args:
        pursuit: Pursuit that the images are taken from.
        rows: Indices of these images in the pursuit, `[n]`.
    """

    def __init__(self, pursuit: Pursuit, rows: Tensor) -> None:
        repeated = rows.repeat_interleave(HERD)
        pixels, labels = pursuit.pixels[repeated], pursuit.labels[repeated]
        super().__init__(pursuit.victim, pixels, labels, pursuit.threat, pursuit.average)

    @torch.no_grad()
    def take(self, rows: Tensor, images: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Do what :meth:`Pursuit.take` does, but count a point as right only where its whole herd is right."""
        _, margin = super().take(rows, images, logits)
        self.right = self.right.view(-1, HERD).all(1).repeat_interleave(HERD)
        return self.right[rows], margin


def evolve(
    pursuit: Pursuit,
    rows: Tensor,
    follow: Forward,
    seeds: list[int],
    *,
    steps: int,
    queries: int,
    every: int = 2,
    average: int = 1,
) -> None:
    """Attack each image by a herd: its worst point so far, and other points that first ascend from random starts. Then
    search over all of them, in parts between which all points climb by small steps.

    Args:
        pursuit: Pursuit that the starting points come from, and that keeps the worst points found.
        rows: Indices of the images to attack, `[n]`.
        follow: Model whose margin the points climb.
        seeds: One seed for each of the rows.
        steps: Number of gradients of each first ascent.
        queries: Number of forwards of the attacked model for each point in the search.
        every: Number of steps of an ascent after which the attacked model is shown the points.
        average: Number of forwards that are averaged for each gradient.
    """
    if not len(rows):
        return
    herd = Herd(pursuit, rows)
    points = torch.arange(len(herd.pixels), device=rows.device)
    point_seeds = [seed_of(seed, point) for seed in seeds for point in range(HERD)]
    others = points[points % HERD > 0]
    ascend(
        herd,
        others,
        follow,
        [point_seeds[i] for i in others.tolist()],
        steps=steps,
        loss="margin",
        size=2.0,
        momentum=0.75,
        fresh=True,
        average=average,
        every=every,
    )
    herd.best[::HERD], herd.margin[::HERD] = pursuit.best[rows], pursuit.margin[rows]
    continues = torch.ones_like(rows, dtype=torch.bool)
    for part in range(PARTS):
        if part == PARTS // 2:
            continues = herd.margin.view(-1, HERD).amax(1) >= (1 - GAIN) * pursuit.margin[rows]  # margins are negative
        left = points[herd.right & continues.repeat_interleave(HERD)]
        part_seeds = [seed_of(point_seeds[i], part + 1) for i in left.tolist()]
        part_queries = queries * (part + 1) // PARTS - queries * part // PARTS
        search(herd, left, part_seeds, queries=part_queries, herd=HERD)
        left = left[herd.right[left]]
        if part < PARTS - 1:
            ascend(
                herd,
                left,
                follow,
                [point_seeds[i] for i in left.tolist()],
                steps=steps // 4,
                loss="margin",
                size=CLIMB,
                momentum=0.5,
                average=average,
                every=every,
            )
    margin, place = herd.margin.view(-1, HERD).max(1)
    worse = margin >= pursuit.margin[rows]
    best = herd.best[points[::HERD] + place]
    pursuit.best[rows[worse]], pursuit.margin[rows[worse]] = best[worse], margin[worse]
    pursuit.right[rows] &= herd.right[::HERD]
