"""Fitting the standard units of reprogrammed layers to images, the first thing that calibration does."""

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
        plain.model.get_submodule(name).register_forward_pre_hook(
            lambda _, inputs, named, fit=fit: fit.see(inputs[0] if inputs else named["input"]), with_kwargs=True
        )
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
        self.rows: list[Tensor] = []  # inputs of a sum, `[G, D]`
        self.keys: list[float] = []  # a random number for each; those with the smallest are kept, of all that came
        self.weight = torch.tensor(())  # [G, O / G, D]

    def see(self, input: Tensor) -> None:
        """Count in an input of the layer, whose sums are drawn from together with those of all earlier inputs."""
        channel = self.layer.channel
        batch = input.detach() if input.ndim > -channel else input.detach().unsqueeze(0)
        moments = Moments.of(batch, channel)
        self.seen = self.seen + moments if self.seen else moments
        centre = self.seen.mean.to(batch).view(-1, *[1] * (-channel - 1))
        for image in batch[self._drawn(len(batch), IMAGES)]:  # one by one, since all its windows take memory
            inputs, self.weight = self.layer.factors((image - centre).unsqueeze(0))
            self.rows += inputs[0, self._drawn(inputs.shape[1], POSITIONS)].float().unbind(0)
        self.keys += torch.rand(len(self.rows) - len(self.keys), generator=self.generator).tolist()
        kept = sorted(range(len(self.keys)), key=self.keys.__getitem__)[:KEPT]
        self.rows, self.keys = [self.rows[i] for i in kept], [self.keys[i] for i in kept]

    def install_(self) -> None:
        """Give the layer the units of all inputs seen; a layer that was never called keeps those of its products."""
        units = self.layer.add_part(StandardUnits)
        if self.seen is None:
            return
        distances = []
        for rows, weights in zip(torch.stack(self.rows, 1), self.weight.float(), strict=True):  # one group: [n, D]
            for part in weights.split(max(1, HELD // rows.numel())):
                products = rows.unsqueeze(1) * part  # [n, o, D]
                distances.append((products - products.mean(-1, keepdim=True)).abs().mean((0, 2)))
        distance = torch.cat(distances)
        distance = distance.where(distance > 0, 1)  # products that are all the same need no other unit
        units.centre.copy_(self.seen.mean)
        units.distance.copy_(distance).clamp_(min=torch.finfo(units.distance.dtype).tiny)

    def _drawn(self, count: int, most: int) -> Tensor:
        """Indices of at most so many of `count` things, drawn without replacement."""
        return torch.randperm(count, generator=self.generator)[:most]
