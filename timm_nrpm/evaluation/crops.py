"""Crops of images that are larger than a model's input: their predictions, and scores of their content."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from timm_nrpm.nn.pixel_model import PixelModel

NOTHING = -1
"""Prediction where a logit is not finite, which is never right."""


class Scene:
    """Images larger than the model's input, and what is known of their crops.

    Args:
        net: Model of crops.
        pixels: Images `[B, C, H, W]` in [0, 1].
        size: Height and width of a crop.
        radius: Largest distance of a crop from the middle of the image, in pixels, down and across.

    Attributes:
        predictions: Class of each crop, `[B, D, D]` with D = 2 * radius + 1; only valid where `known` is true.
        confidences: Largest probability of a class in each crop, likewise.
        known: Whether a crop was classified.
    """

    def __init__(self, net: PixelModel, pixels: Tensor, size: tuple[int, int], radius: int) -> None:
        self.net, self.size, self.radius = net, size, radius
        self.pixels = pixels.to(net.mean.device, torch.promote_types(pixels.dtype, torch.float32))
        self.corner = [(side - crop) // 2 - radius for side, crop in zip(pixels.shape[2:], size, strict=True)]
        across = 2 * radius + 1
        self.predictions = torch.full((len(pixels), across, across), NOTHING)
        self.confidences = torch.zeros(self.predictions.shape)
        self.known = torch.zeros(self.predictions.shape, dtype=torch.bool)

    def look(self, wanted: Tensor) -> None:
        """Classify the crops `[n, 3]`, given as image, row and column, that are not known, as many at a time as there
        are images."""
        new = wanted[~self.known[tuple(wanted.T)]].unique(dim=0)
        for part in new.split(len(self.pixels)) if len(new) else ():
            crops = torch.stack([self._crop(*place) for place in part.tolist()])
            logits = self.net(crops)
            valid = logits.isfinite().all(1)
            rows = tuple(part.T)
            self.predictions[rows] = torch.where(valid, logits.argmax(1), NOTHING).cpu()
            self.confidences[rows] = torch.where(valid, logits.softmax(1).amax(1), 0.0).float().cpu()
            self.known[rows] = True

    def _crop(self, image: int, row: int, column: int) -> Tensor:
        top, left = self.corner[0] + row, self.corner[1] + column
        return self.pixels[image, :, top : top + self.size[0], left : left + self.size[1]]

    def all_crops(self) -> Tensor:
        """The places `[n, 3]` of all crops."""
        return torch.ones_like(self.known).nonzero()


def _by_response(scene: Scene) -> Tensor:
    """Score of each crop `[B, D, D]`: how far the small square in its middle is, in mean brightness, from the square of
    twice the side around it. It costs no pass of the model."""
    grey = scene.pixels.double().mean(1, keepdim=True)
    across = scene.predictions.shape[1]
    means = []
    for side in (max(1, min(scene.size) // 8), max(2, min(scene.size) // 4)):
        top, left = (corner + (crop - side) // 2 for corner, crop in zip(scene.corner, scene.size, strict=True))
        part = grey[:, :, top : top + across + side - 1, left : left + across + side - 1]
        means.append(F.avg_pool2d(part, side, stride=1).squeeze(1))
    return (means[0] - means[1]).abs().cpu()


def _by_confidence(scene: Scene) -> Tensor:
    """Score of each crop `[B, D, D]`: the model's largest probability of a class, which costs a pass for every crop."""
    scene.look(scene.all_crops())
    return scene.confidences


RULES: Mapping[str, Callable[[Scene], Tensor]] = {"response": _by_response, "confidence": _by_confidence}
"""Scores of a crop by name."""
