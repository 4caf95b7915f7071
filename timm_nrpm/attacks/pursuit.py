"""A pursuit keeps the worst point that any attack has found for each image, and an ascent goes on from there.

An attack on a reprogrammed model fails where it starts from scratch and follows a single gradient: the model's own
gradient is erratic, and the gradients of similar models point elsewhere. So every point that an attack visits is shown
to the attacked model, the point with the largest margin is kept for each image, and the next attack continues from
there: a few steps up the loss of another, smoother model, or a random search by the attacked model's scores. A point
that stops one of them need not stop the other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from timm_nrpm.attacks.gradients import DENSE, Forward, direction, generators, losses, slope
from timm_nrpm.attacks.threats import Threat, wide


class Pursuit:
    """Images under attack, and the worst point found so far of each.

    Args:
        victim: Attacked model, from pixels to logits.
        pixels, labels: Images `[B, C, H, W]` in [0, 1], and their classes `[B]`.
        threat: What an attacker may change.
        average: Number of forwards whose mean logits count; more than one where the forward is random.

    Attributes:
        best: Worst point found so far of each image, `[B, C, H, W]`; at first the image itself.
        margin: Logit of the strongest other class minus that of the label at this point, `[B]`.
        first: Margin at the first point of each image that the model was shown, `[B]`, NaN before; the clean margin, if
            that point was the image itself.
        right: Whether the model was right on every point of each image that it was shown, `[B]`.
    """

    def __init__(self, victim: Forward, pixels: Tensor, labels: Tensor, threat: Threat, average: int = 1) -> None:
        self.victim, self.pixels, self.labels, self.threat, self.average = victim, pixels, labels, threat, average
        self.best = pixels.clone()
        self.margin = pixels.new_full((len(pixels),), -math.inf)
        self.first = pixels.new_full((len(pixels),), math.nan)
        self.right = torch.ones(len(pixels), dtype=torch.bool, device=pixels.device)
        self.targets: dict[int, Tensor] = {}  # likely targets, by the id of the followed model

    @property
    def standing(self) -> Tensor:
        """Indices of the images that no attack has broken yet."""
        return self.near(1.0)

    def near(self, share: float) -> Tensor:
        """Return the indices of the unbroken images with at most this share of their first margin left; with a share of
        1, of all unbroken images. Images that many attacks have hardly moved are rarely broken by more of the same."""
        far = self.margin < share * self.first  # False where no point was shown yet, since NaN compares as False
        return (self.right & ~far).nonzero().squeeze(1)

    @torch.no_grad()
    def look(self, rows: Tensor, images: Tensor) -> Tensor:
        """Show the attacked model a point of each of some images, and keep it where it is worse than the worst so far.

        Args:
            rows: Indices of the images, `[n]`.
            images: A point of each image, `[n, C, H, W]`; points outside the threat are projected into it first.

        Returns:
            Whether the model is right on each point, `[n]`; where a logit is not finite it counts as wrong.
        """
        right, _ = self.take(rows, *self._shown(rows, images))
        return right

    @torch.no_grad()
    def judge(self, rows: Tensor, images: Tensor) -> Tensor:
        """Do what :meth:`look` does, and return the margin at each point, `[n]`."""
        _, margin = self.take(rows, *self._shown(rows, images))
        return margin

    def _shown(self, rows: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return points within the threat `[n, C, H, W]`, and the attacked model's logits there `[n, N]`."""
        allowed = self.threat.allows(self.pixels[rows], images)
        if not bool(allowed.all()):
            inside = self.threat.project(self.pixels[rows], images.nan_to_num(0.0))
            images = torch.where(wide(allowed, images), images, inside)
        logits = self.victim(images)
        for _ in range(self.average - 1):
            logits = logits + self.victim(images)
        return images, logits / self.average

    @torch.no_grad()
    def take(self, rows: Tensor, images: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Do what :meth:`look` and :meth:`judge` do, with logits of the attacked model that are already known.

        Args:
            rows: Indices of the images, `[n]`.
            images: A point of each image, within the threat, `[n, C, H, W]`.
            logits: Logits at these points, `[n, N]`.

        Returns:
            Whether the model is right on each point, `[n]`, and the margins there, `[n]`; wrong and infinite where a
            logit is not finite.
        """
        finite = logits.isfinite().all(1)
        margin = torch.where(finite, losses(logits, self.labels[rows], "margin"), math.inf).to(self.margin)
        right = finite & (logits.argmax(1) == self.labels[rows])
        # Equal margins count as worse, so that a search drifts over a plateau instead of standing still on it.
        worse = margin >= self.margin[rows]
        self.best[rows[worse]], self.margin[rows[worse]] = images[worse].detach(), margin[worse]
        self.first[rows] = torch.where(self.first[rows].isnan(), margin, self.first[rows])
        self.right[rows] &= right
        return right, margin


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
    """Projected gradient ascent with momentum (arXiv 1710.06081, Algorithm 1) from the worst points so far, with a step
    size that shrinks to zero. The attacked model is shown the points on the way.

    Args:
        pursuit: Pursuit that the starting points come from, and that keeps the worst points found.
        rows: Indices of the images to attack, `[n]`.
        follow: Model whose loss is climbed.
        seeds: One seed for each of the rows, which decides its random start.
        steps: Number of gradients.
        loss: Loss to climb, one of `timm_nrpm.attacks.gradients.LOSSES`.
        size: Size of the first step, in units of the threat's eps.
        momentum: Factor of the previous direction when the gradient is added to it.
        target: Target class of the margin for each image of the pursuit, `[B]`; by default the strongest other class.
        fresh: Whether to start from random points within the threat instead of the worst points so far.
        average: Number of forwards that are averaged for each gradient.
        every: Number of steps after which the attacked model is shown the points.
        predicts: Whether `follow` has the attacked model's logits, so that the forward of each gradient shows it the
            points, too.
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
        kept = pursuit.take(rows, x, logits)[0] if predicts else torch.ones_like(rows, dtype=torch.bool)
        scale = gradient.flatten(1).abs().mean(1).clamp(min=1e-30)
        inertia = momentum * inertia + gradient / wide(scale, gradient)
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


def likely_targets(pursuit: Pursuit, rows: Tensor, follow: Forward, most: int = 9) -> Tensor:
    """Return the other classes, ordered by the gap of their logit to the label's over the length of the gap's gradient,
    the smallest ratio first (MALT, Melamed et al., arXiv 2407.02240, eq. 3). They are computed once for each image and
    followed model.

    Args:
        pursuit: Pursuit that holds the images.
        rows: Indices of the images to attack, `[n]`.
        follow: Model whose logits and gradients count.
        most: Largest number of classes.

    Returns:
        Classes for every image of the pursuit, `[B, min(most, N - 1)]`; -1 where they are not computed yet.
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
    ratios = []
    for i in range(classes.shape[1]):
        gap = own - logits.gather(1, classes[:, i : i + 1]).squeeze(1)
        (gradient,) = torch.autograd.grad(gap.sum(), x, retain_graph=True)
        ratios.append(gap.detach() / gradient.flatten(1).abs().sum(1).clamp(min=1e-30))
    if known is None:
        known = classes.new_full((len(pursuit.pixels), classes.shape[1]), -1)
    known[new] = classes.gather(1, torch.stack(ratios, 1).argsort(dim=1, stable=True))
    pursuit.targets[id(follow)] = known
    return known
