"""Fitting the standard units of reprogrammed layers to images: `calibrate_(..., standardize=True)` does it first."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from timm_nrpm.models.modes import evaluating
from timm_nrpm.models.moments import Moments
from timm_nrpm.nn.fitted import StandardUnits
from timm_nrpm.nn.layers import Reprogrammed
from timm_nrpm.nn.pixel_model import PixelModel

IMAGES, POSITIONS, KEPT = 32, 16, 512
"""Numbers of images of a batch, of sums in each, and of sums in all, drawn at random, whose products are measured."""

HELD = 1 << 24
"""Number of products that are held at once."""


def fit_units_(layers: Mapping[str, Reprogrammed], plain: PixelModel, images: Iterable[Tensor]) -> None:
    """Give layers standard units: centres, and mean distances of products, as in the plain model.

    Args:
        layers: Reprogrammed layers by name.
        plain: The plain model, whose layers have the same names.
        images: Batches of pixels `[B, C, H, W]` in [0, 1].
    """
    generator = torch.Generator().manual_seed(0)
    fits = {name: _Fit(layer, generator) for name, layer in layers.items()}
    hooks = [
        plain.model.get_submodule(name).register_forward_pre_hook(lambda _, inputs, fit=fit: fit.see(inputs[0]))
        for name, fit in fits.items()
    ]
    try:
        with evaluating(plain.model):
            for pixels in images:
                plain.model(plain.normalise(pixels.to(plain.mean.device)))
    finally:
        for hook in hooks:
            hook.remove()
    for fit in fits.values():
        fit.install_()


class _Fit:
    """The units of one layer, from its inputs in the plain model.

    Args:
        layer: The reprogrammed layer.
        generator: Generator of the draws.
    """

    def __init__(self, layer: Reprogrammed, generator: torch.Generator) -> None:
        self.layer, self.generator = layer, generator
        self.seen: Moments | None = None
        self.rows = self.weight = torch.tensor(())  # [n, G, D] and [G, O / G, D]

    def see(self, input: Tensor) -> None:
        """Count in an input of the layer, whose sums are drawn from with those of all earlier inputs."""
        channel = self.layer.channel
        batch = input.detach() if input.ndim > -channel else input.detach().unsqueeze(0)
        moments = Moments.of(batch, channel)
        self.seen = self.seen + moments if self.seen else moments
        centre = self.seen.mean.to(batch).view(-1, *[1] * (-channel - 1))
        inputs, self.weight = self.layer.factors(batch[self._drawn(len(batch), IMAGES)] - centre)
        new = [image[self._drawn(len(image), POSITIONS)] for image in inputs.to(self.weight)]
        rows = torch.cat([*new, self.rows] if self.rows.numel() else new)
        self.rows = rows[self._drawn(len(rows), KEPT)]

    def install_(self) -> None:
        """Give the layer the units of all inputs seen; a layer that was never called keeps its own."""
        if self.seen is None:
            return
        distances = []
        for rows, weights in zip(self.rows.float().unbind(1), self.weight.float(), strict=True):
            for part in weights.split(max(1, HELD // rows.numel())):
                products = rows.unsqueeze(1) * part  # [n, o, D]
                distances.append((products - products.mean(-1, keepdim=True)).abs().mean((0, 2)))
        distance = torch.cat(distances)
        units = self.layer.add_part("units")
        assert isinstance(units, StandardUnits)
        units.centre.copy_(self.seen.mean)
        units.distance.copy_(distance.where(distance > 0, 1))  # products that are all the same need no other unit

    def _drawn(self, count: int, most: int) -> Tensor:
        """Indices of at most so many of `count` things, drawn without replacement."""
        return torch.randperm(count, generator=self.generator)[:most]
