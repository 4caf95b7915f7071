"""A second attack under L0, which shares no code with the suite and takes no gradient: single pixels, one by one.

In each round every pixel of every image in the beam is put to 0 and to 1, or a colour of an image to each corner of its
cube. A cheap model ranks all of these changes, the target judges the first of them, and those that leave the true class
the smallest margin are the next beam. With the target as the cheap model the search in a round is exhaustive.
"""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor, nn

PROPOSED, BEAM = 48, 2
"""Number of changes of an image that the target judges in a round, and of images that are changed further."""

ROWS = 1024
"""Number of images in a batch."""


@torch.no_grad()
def survives(target: nn.Module, cheap: nn.Module, pixels: Tensor, label: int, count: int) -> bool:
    """Whether an image `[C, H, W]` is still right after the search for `count` pixels.

    Args:
        target: The model that is attacked, on pixels in [0, 1].
        cheap: The model that ranks, on pixels in [0, 1].
        pixels: The image.
        label: Its class.
        count: Number of positions that may change.
    """
    beam = pixels[None]
    for _ in range(count):
        changed = torch.cat([_all_changes(image) for image in beam]).unique(dim=0)  # two orders make the same image
        if cheap is not target:
            changed = changed[_margins(cheap, changed, label).argsort()[: PROPOSED * len(beam)]]
        margins = _margins(target, changed, label)
        order = margins.argsort()[:BEAM]
        beam = changed[order]
        if float(margins[order[0]]) <= 0:
            return int((beam[0] != pixels).any(0).sum()) > count  # a search that changed too much has shown nothing
    return True


def _all_changes(image: Tensor) -> Tensor:
    """The image with one position at a corner of the cube of its colours, `[H * W * 2^C, C, H, W]`."""
    channels, height, width = image.shape
    corners = torch.tensor(list(product((0.0, 1.0), repeat=channels)))
    places = height * width
    changed = image.reshape(1, 1, channels, places).repeat(places, len(corners), 1, 1)
    rows = torch.arange(places)
    changed[rows, :, :, rows] = corners.expand(places, -1, -1)
    return changed.reshape(-1, channels, height, width)


def _margins(model: nn.Module, pixels: Tensor, label: int) -> Tensor:
    """The logit of the class less the largest other, `[N]`."""
    logits = torch.cat([model(part) for part in pixels.split(ROWS)])
    others = logits.clone()
    others[:, label] = -torch.inf
    return logits[:, label] - others.amax(1)
