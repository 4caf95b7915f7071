"""Evolution: several points of one image at once, which take squares from each other.

Random search from one point ends on a hill of the margin that no small change leaves. Others of the same image end on
other hills, and what one of them has found in a corner of the image mostly serves the others too. So a search over a
herd, where a square comes more often from another point than from chance, gets where as many searches side by side do
not (after GenAttack, Alzantot et al., arXiv 1805.11090, which crosses single values and follows no gradient first).
Squares go to the bound, and the top of a hill may lie within it, so a few small steps up a gradient come between the
parts of the search (a memetic algorithm).
"""

from __future__ import annotations

import torch
from torch import Tensor

from timm_nrpm.attacks.ascent import Forward
from timm_nrpm.attacks.pursuit import Pursuit, ascend, search
from timm_nrpm.data.ordering import seed_of

HERD = 10
"""Points of an image."""

PARTS = 4
"""Of the search of a herd; between two of them all its points climb."""

CLIMB = 0.25
"""The first step of these climbs, in units of eps; each has a quarter of the steps of the first ascents."""

GAIN = 0.2
"""Share of the margin that half of the queries must gain, for a herd to have the other half."""


class Herd(Pursuit):
    """Some images of a pursuit, each of them `HERD` times in a row; when one point breaks an image, its herd is done.

    Args:
        pursuit: Where the images are from.
        rows: Their numbers, `[n]`.
    """

    def __init__(self, pursuit: Pursuit, rows: Tensor) -> None:
        each = rows.repeat_interleave(HERD)
        pixels, labels = pursuit.pixels[each], pursuit.labels[each]
        super().__init__(pursuit.victim, pixels, labels, pursuit.threat, pursuit.average)

    @torch.no_grad()
    def take(self, rows: Tensor, images: Tensor, logits: Tensor) -> Tensor:
        """As of every pursuit, but right only where the model is right on the whole herd."""
        super().take(rows, images, logits)
        self.right = self.right.view(-1, HERD).all(1).repeat_interleave(HERD)
        return self.right[rows]


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
    """A herd of each image: its worst point so far, and others that ascend from anywhere; then a search over all, in
    parts between which all climb by small steps.

    Args:
        pursuit: Where points come from and go to.
        rows: Numbers of the images to attack, `[n]`.
        follow: The model whose margin they climb.
        seeds: A seed for each of the rows.
        steps: Gradients of the first ascents.
        queries: Forwards of the attacked model for each point.
        every: Steps of an ascent between two looks of the attacked model.
        average: Forwards for each gradient.
    """
    if not len(rows):
        return
    herd = Herd(pursuit, rows)
    points = torch.arange(len(herd.pixels), device=rows.device)
    drawn = [seed_of(seed, point) for seed in seeds for point in range(HERD)]
    others = points[points % HERD > 0]
    ascend(
        herd,
        others,
        follow,
        [drawn[i] for i in others.tolist()],
        steps=steps,
        loss="margin",
        size=2.0,
        momentum=0.75,
        fresh=True,
        average=average,
        every=every,
    )
    herd.best[::HERD], herd.margin[::HERD] = pursuit.best[rows], pursuit.margin[rows]
    goes_on = torch.ones_like(rows, dtype=torch.bool)
    for part in range(PARTS):
        if part == PARTS // 2:
            goes_on = herd.margin.view(-1, HERD).amax(1) >= (1 - GAIN) * pursuit.margin[rows]  # margins are negative
        left = points[herd.right & goes_on.repeat_interleave(HERD)]
        asked = queries * (part + 1) // PARTS - queries * part // PARTS
        search(herd, left, [seed_of(drawn[i], part + 1) for i in left.tolist()], queries=asked, herd=HERD)
        left = left[herd.right[left]]
        if part < PARTS - 1:
            ascend(
                herd,
                left,
                follow,
                [drawn[i] for i in left.tolist()],
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
