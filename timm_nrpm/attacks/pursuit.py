"""A pursuit: for each image the worst point that any attack has found, and two ways to make it worse.

An attack on a reprogrammed model is lost where it starts from nowhere and follows one gradient: the model's own is
erratic, and those of models like it point elsewhere. So what all attacks visit is shown to the attacked model, the
point with the largest margin is kept for each image, and the next attack goes on from there: a few steps up the loss of
another model that is smoother, or a random search by the attacked model's scores. What one of them cannot leave another
can.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from timm_nrpm.attacks.ascent import DENSE, Forward, direction, generators, losses, slope
from timm_nrpm.attacks.threats import Threat

LARGEST = 3
"""The squares of a search are at most this part of the shorter side of an image."""

HERITAGE = 0.6
"""Share of the queries of a herd in which a square comes from another of the herd instead of chance."""


class Pursuit:
    """Images under attack.

    Args:
        victim: The attacked model on pixels.
        pixels, labels: Images `[B, C, H, W]` in [0, 1], and their classes `[B]`.
        threat: What an attacker may change.
        average: Forwards whose mean logits count, more than one where the forward is random.

    Attributes:
        best: The worst point found so far of each image, `[B, C, H, W]`; at first the image itself.
        margin: By how much the strongest other class exceeds the label's there, in logits, `[B]`.
        first: The first margin that each image had, `[B]`; that of the image itself, if it was shown first.
        right: Whether the model was right on everything it was shown, `[B]`.
    """

    def __init__(self, victim: Forward, pixels: Tensor, labels: Tensor, threat: Threat, average: int = 1) -> None:
        self.victim, self.pixels, self.labels, self.threat, self.average = victim, pixels, labels, threat, average
        self.best = pixels.clone()
        self.margin = pixels.new_full((len(pixels),), -math.inf)
        self.first = pixels.new_full((len(pixels),), math.nan)
        self.right = torch.ones(len(pixels), dtype=torch.bool, device=pixels.device)
        self.targets: dict[int, Tensor] = {}  # of each model that was followed

    @property
    def standing(self) -> Tensor:
        """Numbers of the images that nothing has broken yet."""
        return self.near(1.0)

    def near(self, share: float) -> Tensor:
        """Numbers of the images that stand with at most this share of their first margin left; all that stand with 1.
        Images that many attacks have hardly moved are rarely broken by more of the same."""
        far = self.margin < share * self.first  # not where nothing was shown yet
        return (self.right & ~far).nonzero().squeeze(1)

    @torch.no_grad()
    def look(self, rows: Tensor, images: Tensor) -> Tensor:
        """Show the attacked model points of some images, and keep those that are worse than the worst so far.

        Args:
            rows: Numbers of the images, `[n]`.
            images: A point of each, `[n, C, H, W]`; one outside the threat is brought back within it first.

        Returns:
            Whether the model is right on each, `[n]`; where logits are no numbers it is not.
        """
        allowed = self.threat.allows(self.pixels[rows], images)
        if not bool(allowed.all()):
            inside = self.threat.project(self.pixels[rows], images.nan_to_num(0.0))
            images = torch.where(_wide(allowed, images), images, inside)
        logits = self.victim(images)
        for _ in range(self.average - 1):
            logits = logits + self.victim(images)
        return self.take(rows, images, logits / self.average)

    @torch.no_grad()
    def take(self, rows: Tensor, images: Tensor, logits: Tensor) -> Tensor:
        """What `look` does with logits `[n, N]` of the attacked model that are known already."""
        finite = logits.isfinite().all(1)
        margin = torch.where(finite, losses(logits, self.labels[rows], "margin"), math.inf).to(self.margin)
        right = finite & (logits.argmax(1) == self.labels[rows])
        # Equal margins count as worse, so that a search drifts over a plain instead of standing still on it.
        worse = margin >= self.margin[rows]
        self.best[rows[worse]], self.margin[rows[worse]] = images[worse].detach(), margin[worse]
        self.first[rows] = torch.where(self.first[rows].isnan(), margin, self.first[rows])
        self.right[rows] &= right
        return right


def ascend(
    pursuit: Pursuit,
    rows: Tensor,
    follow: Forward,
    seeds: Sequence[int],
    *,
    steps: int,
    loss: str,
    size: float,
    momentum: float,
    target: Tensor | None = None,
    fresh: bool = False,
    average: int = 1,
    every: int = 2,
    predicts: bool = False,
) -> None:
    """Projected ascent with momentum (arXiv 1710.06081, Algorithm 1) whose steps shorten to nothing, from the worst
    points so far, each of which the attacked model is shown on the way.

    Args:
        pursuit: Where points come from and go to.
        rows: Numbers of the images to attack, `[n]`.
        follow: The model whose loss is climbed.
        seeds: A seed for each of the rows.
        steps: Number of gradients.
        loss: One of `timm_nrpm.attacks.ascent.LOSSES`.
        size: The first step, in units of the threat's eps.
        momentum: Share of the last direction that goes into the next.
        target: Of the margin, a class for each image of the pursuit, `[B]`.
        fresh: Whether to start anywhere within the threat instead.
        average: Forwards for each gradient.
        every: Steps between two looks of the attacked model.
        predicts: Whether `follow` has the attacked model's logits, so that each gradient is a look, too.
    """
    if not len(rows):
        return
    threat = pursuit.threat
    seeds = list(seeds)
    x = threat.around(pursuit.pixels[rows], generators(seeds)) if fresh else pursuit.best[rows]
    inertia = torch.zeros_like(x)
    for step in range(steps):
        labels = pursuit.labels[rows]
        logits, _, gradient = slope(follow, x, labels, loss, None if target is None else target[rows], average)
        kept = pursuit.take(rows, x, logits) if predicts else torch.ones_like(rows, dtype=torch.bool)
        scale = gradient.flatten(1).abs().mean(1).clamp(min=1e-30)
        inertia = momentum * inertia + gradient / _wide(scale, gradient)
        left = 1 - step / steps
        share = x.new_full((len(rows),), DENSE * left)
        moved = x + size * threat.eps * left * direction(inertia, threat, x, share)
        x = threat.project(pursuit.pixels[rows], moved)
        if step == steps - 1 or (not predicts and (step + 1) % every == 0):
            kept &= pursuit.look(rows, x)
        if not bool(kept.all()):
            rows, x, inertia = rows[kept], x[kept], inertia[kept]
            if not len(rows):
                return


@torch.no_grad()
def search(pursuit: Pursuit, rows: Tensor, seeds: Sequence[int], *, queries: int, herd: int = 1) -> None:
    """Random search from the worst points so far: squares of random place and size are pushed to the bound, and stay so
    where the margin does not fall (after Square, Andriushchenko et al., arXiv 1912.00049, which starts from stripes).

    Args:
        pursuit: Where points come from and go to.
        rows: Numbers of the images to attack, `[n]`.
        seeds: A seed for each of the rows.
        queries: Forwards of the attacked model for each image.
        herd: How many consecutive numbers of the pursuit are points of one image. Squares are then often copied from
            another of them, which an evolutionary search calls crossover.
    """
    if not len(rows):
        return
    # An image's draws are its own, whichever images are beside it.
    channels = pursuit.pixels.shape[1]
    draws = [torch.rand(queries, 5 + channels, generator=g, dtype=torch.float32) for g in generators(seeds)]
    table = torch.stack(draws, 1).to(pursuit.pixels)  # [queries, n, 5 + C]
    places = torch.arange(len(rows), device=rows.device)
    for draw in table:
        places = places[pursuit.right[rows[places]]]
        if not len(places):
            return
        now = rows[places]
        tried = _pushed(pursuit, now, draw[places])
        if herd > 1:
            inherits = draw[places, 3] < HERITAGE
            tried = torch.where(_wide(inherits, tried), _inherited(pursuit, now, draw[places], herd), tried)
        pursuit.look(now, pursuit.threat.project(pursuit.pixels[now], tried))


def _pushed(pursuit: Pursuit, rows: Tensor, draw: Tensor) -> Tensor:
    """The worst points with a random square of each pushed to the bound, `[n, C, H, W]`. Small squares are more often
    drawn than large ones."""
    channels, height, width = pursuit.pixels.shape[1:]
    most = max(2, min(height, width) // LARGEST)
    side = torch.exp(draw[:, 0] * math.log(most + 1)).long().clamp(1, most).view(-1, 1, 1)
    place = draw[:, 1:3].view(-1, 2, 1, 1)
    top, left = ((place[:, i] * (span - side + 1)).long() for i, span in enumerate((height, width)))
    sign = (draw[:, 5:] > 0.5).to(pursuit.pixels) * 2 - 1  # [n, C]
    inside = _inside(pursuit, top, left, side)
    return pursuit.best[rows] + _amplitude(pursuit.threat, channels, side) * sign.view(*sign.shape, 1, 1) * inside


def _inherited(pursuit: Pursuit, rows: Tensor, draw: Tensor, herd: int) -> Tensor:
    """The worst points with a square of each from another of its herd, `[n, C, H, W]`. Squares of all sizes are drawn
    as often, and may lie partly beyond the edge: half of an image is a good share to inherit, and most of it is,
    too."""
    height, width = pursuit.pixels.shape[2:]
    most = max(height, width)
    side = 1 + (draw[:, 0] * most).long().clamp(max=most - 1).view(-1, 1, 1)
    place = draw[:, 1:3].view(-1, 2, 1, 1)
    top, left = ((place[:, i] * (span + side - 1)).long() - side + 1 for i, span in enumerate((height, width)))
    others = rows // herd * herd + (rows % herd + 1 + (draw[:, 4] * (herd - 1)).long()) % herd
    return torch.where(_inside(pursuit, top, left, side), pursuit.best[others], pursuit.best[rows])


def _inside(pursuit: Pursuit, top: Tensor, left: Tensor, side: Tensor) -> Tensor:
    """Which pixels are within squares whose places and sides are `[n, 1, 1]`, `[n, 1, H, W]`."""
    height, width = pursuit.pixels.shape[2:]
    down = torch.arange(height, device=side.device).view(1, -1, 1)
    across = torch.arange(width, device=side.device).view(1, 1, -1)
    return ((down >= top) & (down < top + side) & (across >= left) & (across < left + side)).unsqueeze(1)


def _amplitude(threat: Threat, channels: int, side: Tensor) -> Tensor:
    """By how much a square is pushed: under Linf across the whole bound, under L2 by half of it, under L1 to black or
    white, which the projection then pays for elsewhere; `[n, 1, 1, 1]`."""
    side = side.unsqueeze(1).float()
    if threat.norm == "Linf":
        return torch.full_like(side, 2 * threat.eps)
    if threat.norm == "L2":
        return threat.eps / 2 / (side * math.sqrt(channels))
    return torch.ones_like(side)


def _wide(values: Tensor, like: Tensor) -> Tensor:
    """`[B]` so that it goes with `[B, C, H, W]`."""
    return values.view(-1, *[1] * (like.ndim - 1))


def likely_targets(pursuit: Pursuit, rows: Tensor, follow: Forward, most: int = 9) -> Tensor:
    """Other classes, those first whose logit is nearest for the gradient's length (MALT, Melamed et al.,
    arXiv 2407.02240, eq. 3); worked out once for each image and model that is followed.

    Args:
        pursuit: The images.
        rows: Numbers of the images to attack.
        follow: The model.
        most: How many classes, at most.

    Returns:
        Classes of every image of the pursuit, `[B, min(most, N - 1)]`; -1 where it is not yet worked out.
    """
    known = pursuit.targets.get(id(follow))
    new = rows if known is None else rows[known[rows, 0] < 0]
    if known is not None and not len(new):
        return known
    x = pursuit.pixels[new].requires_grad_()
    labels = pursuit.labels[new].unsqueeze(1)
    logits = follow(x)
    own = logits.gather(1, labels).squeeze(1)
    others = logits.detach().scatter(1, labels, -math.inf)
    classes = others.topk(min(most, logits.shape[1] - 1), 1).indices
    far = []
    for i in range(classes.shape[1]):
        gap = own - logits.gather(1, classes[:, i : i + 1]).squeeze(1)
        (gradient,) = torch.autograd.grad(gap.sum(), x, retain_graph=True)
        far.append(gap.detach() / gradient.flatten(1).abs().sum(1).clamp(min=1e-30))
    if known is None:
        known = classes.new_full((len(pursuit.pixels), classes.shape[1]), -1)
    known[new] = classes.gather(1, torch.stack(far, 1).argsort(dim=1, stable=True))
    pursuit.targets[id(follow)] = known
    return known
