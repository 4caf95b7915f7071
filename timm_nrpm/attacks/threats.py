"""What an attacker may change: a norm and a bound, and the projection of images into it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from timm_nrpm.checks import check_choice, check_integer, check_number
from timm_nrpm.choices import BOUNDS, NORMS
from timm_nrpm.config import bound_of

COUNTED = ("L0", "patch")
"""Norms whose bound is a number of pixels; the pixels that change may take any value."""

SLACK = 1e-5
"""Largest excess over a bound that counts as float32 rounding: relative to the bound, and in pixel units. Numbers of
pixels are exact."""


@dataclass(frozen=True)
class Threat:
    """What an attacker may change.

    Args:
        norm: Norm of the change: `"Linf"`, the largest change of a pixel; `"L2"` or `"L1"`, the length of the change of
            a whole image; `"L0"`, the number of positions that change, all of whose channels may take any value; or
            `"patch"`, the side of the square, anywhere in the image, in which they lie.
        eps: Bound of the norm, in pixel units of [0, 1]; under L0 a number of positions, of a patch that of its side.
            The default under Linf is 8/255; the other norms have none. For CIFAR 0.5 is usual under L2, 12 under L1.

    Raises:
        ValueError: `norm` is not known, or `eps` is missing or outside its range.

    Example:
        >>> str(Threat("Linf", 8 / 255)), str(Threat("L0", 10))
        ('Linf 0.03137', 'L0 10')
    """

    norm: str = "Linf"
    eps: float = None  # type: ignore[assignment]  # __post_init__ puts a number in its place

    def __post_init__(self) -> None:
        check_choice("norm", self.norm, NORMS)
        why, most = f"; under {self.norm} it is {BOUNDS[self.norm]}", 1 if self.norm == "Linf" else math.inf
        eps = check_number("eps", bound_of(self.norm, self.eps), above=0, most=most, why=why)
        if self.norm in COUNTED:
            eps = check_integer("eps", int(eps) if eps.is_integer() else eps, least=1, why=why)
        object.__setattr__(self, "eps", eps)

    def __str__(self) -> str:
        return f"{self.norm} {self.eps:.4g}"

    def distance(self, pixels: Tensor, attacked: Tensor) -> Tensor:
        """Return how far each image was moved, `[B]`, in the units of `eps`."""
        change = (attacked - pixels).double()
        if self.norm in COUNTED:
            changed = (change != 0).any(1)  # [B, H, W]
            if self.norm == "L0":
                return changed.flatten(1).sum(1)
            return torch.maximum(_extent(changed.any(2)), _extent(changed.any(1)))
        flat = change.flatten(1)
        if self.norm == "Linf":
            return flat.abs().amax(1)
        return flat.abs().sum(1) if self.norm == "L1" else flat.norm(dim=1)

    def allows(self, pixels: Tensor, attacked: Tensor) -> Tensor:
        """Return whether each attacked image, `[B]`, has all its pixels in [0, 1] and is within the bound."""
        inside = ((attacked >= 0) & (attacked <= 1)).flatten(1).all(1)  # a NaN is not
        return inside & (self.distance(pixels, attacked) <= self.eps * (1 + SLACK) + SLACK * (self.norm not in COUNTED))

    def project(self, pixels: Tensor, moved: Tensor) -> Tensor:
        """Return `moved`, brought back within the bound and to [0, 1], `[B, C, H, W]`.

        These are the nearest such images, except under L2, where the change is scaled down and then clamped to [0, 1].
        """
        change = moved - pixels
        if self.norm == "Linf":
            return (pixels + change.clamp(-self.eps, self.eps)).clamp(0, 1)
        if self.norm == "L2":
            length = change.flatten(1).norm(dim=1).clamp(min=1e-12)
            return (pixels + change * wide((self.eps / length).clamp(max=1), change)).clamp(0, 1)
        if self.norm == "L1":
            return (pixels + _within_l1(change, -pixels, 1 - pixels, self.eps)).clamp(0, 1)
        change = moved.clamp(0, 1) - pixels
        sizes = change.square().sum(1).flatten(1)  # [B, H * W]
        if self.norm == "patch":
            height, width = sides(self, pixels)
            # In float64, so that of places with nearly the same change the one that holds all of it is chosen.
            places = F.avg_pool2d(sizes.double().view(len(change), 1, *change.shape[2:]), (height, width), 1)
            place = places.flatten(1).argmax(1)
            return pixels + change * inside(pixels, place // places.shape[3], place % places.shape[3], height, width)
        kept = torch.zeros_like(sizes).scatter_(1, sizes.topk(min(int(self.eps), sizes.shape[1])).indices, 1.0)
        return pixels + change * kept.view(len(change), 1, *change.shape[2:])

    def around(self, pixels: Tensor, generators: list[torch.Generator]) -> Tensor:
        """Draw images within the bound, each by its own generator on the CPU, `[B, C, H, W]`."""
        if self.norm == "Linf":
            draws = [2 * torch.rand(pixels.shape[1:], generator=g, dtype=torch.float32) - 1 for g in generators]
            return self.project(pixels, pixels + self.eps * torch.stack(draws).to(pixels))
        draws = [torch.randn(pixels.shape[1:], generator=g, dtype=torch.float32) for g in generators]
        change = torch.stack(draws).to(pixels)
        if self.norm not in COUNTED:  # scale the change to the full length
            flat = change.flatten(1)
            length = flat.norm(dim=1) if self.norm == "L2" else flat.abs().sum(1)
            change = change * wide(self.eps / length.clamp(min=1e-12), change)
        return self.project(pixels, pixels + change)


def check_threat(threat: Threat | None) -> Threat:
    """Return the threat, by default Linf with eps 8/255, or raise a ValueError if it is not a :class:`Threat`."""
    threat = threat or Threat()
    if not isinstance(threat, Threat):
        raise ValueError(f'threat={threat!r} is no Threat: write Threat("Linf", 8 / 255).')
    return threat


def wide(values: Tensor, like: Tensor) -> Tensor:
    """Reshape `[B]`, or `[B, C]`, so that it broadcasts with `[B, C, H, W]`."""
    return values.view(*values.shape, *[1] * (like.ndim - values.ndim))


def sides(threat: Threat, pixels: Tensor) -> tuple[int, int]:
    """Height and width of a patch, which in a small image is the whole of it."""
    height, width = pixels.shape[2:]
    return min(int(threat.eps), height), min(int(threat.eps), width)


def inside(like: Tensor, top: Tensor, left: Tensor, height: int | Tensor, width: int | Tensor) -> Tensor:
    """Mask `[B, 1, H, W]` of rectangles in images `[B, C, H, W]`, from their top left corners `[B]` and their sides."""
    down = torch.arange(like.shape[2], device=like.device).view(1, -1, 1)
    across = torch.arange(like.shape[3], device=like.device).view(1, 1, -1)
    top, left = top.view(-1, 1, 1), left.view(-1, 1, 1)
    return ((down >= top) & (down < top + height) & (across >= left) & (across < left + width)).unsqueeze(1)


def _extent(changed: Tensor) -> Tensor:
    """Distance from the first to the last changed line, both counted, `[B]`; 0 without any."""
    places = torch.arange(changed.shape[1], device=changed.device)
    last = torch.where(changed, places + 1, 0).amax(1)
    first = torch.where(changed, places, changed.shape[1]).amin(1)
    return (last - first).clamp(min=0)


def _within_l1(change: Tensor, low: Tensor, high: Tensor, eps: float) -> Tensor:
    """Return the nearest change that has an L1 norm of at most `eps` and lies between `low` and `high`.

    It is `clip(soft(change, t))`, where t >= 0 is the smallest threshold that makes it short enough. The threshold is
    found by bisection.
    """

    def cut(threshold: Tensor) -> Tensor:
        short = change.sign() * (change.abs() - wide(threshold, change)).clamp(min=0)
        return torch.minimum(torch.maximum(short, low), high)

    below = torch.zeros(len(change), device=change.device, dtype=change.dtype)
    above = change.flatten(1).abs().amax(1)
    fits = cut(below).flatten(1).abs().sum(1) <= eps
    for _ in range(40):
        middle = (below + above) / 2
        long = cut(middle).flatten(1).abs().sum(1) > eps
        below, above = torch.where(long, middle, below), torch.where(long, above, middle)
    return cut(torch.where(fits, torch.zeros_like(above), above))
