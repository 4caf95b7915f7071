"""What calibration may add to a reprogrammed layer: a correction of its sum, and standard units of its products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from timm_nrpm.nn.functional import is_readable


class Correction(nn.Module):
    """A gain and an offset for every output: `gain * z + offset`.

    Args:
        like: Tensor whose first dimension counts the outputs, and whose device and dtype the correction takes.
        channel: Dimension of the outputs in `z`, counted from the end (-1 is the last).
    """

    gain: Tensor
    offset: Tensor

    def __init__(self, like: Tensor, channel: int) -> None:
        super().__init__()
        self.channel = channel
        self.register_buffer("gain", like.new_ones(len(like)))
        self.register_buffer("offset", like.new_zeros(len(like)))

    def forward(self, z: Tensor, lam: Tensor) -> Tensor:
        """`z` corrected, or `z` itself where `lam` is 1; the device chooses, since a graph cannot branch on a value."""
        gain, offset = self.gain, self.offset
        if not is_readable(lam):
            gain, offset = torch.where(lam < 1, gain, 1), torch.where(lam < 1, offset, 0)
        elif lam >= 1:
            return z
        shape = (-1, *[1] * (-self.channel - 1))
        return torch.addcmul(offset.to(z.dtype).view(shape), gain.to(z.dtype).view(shape), z)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        load_keeping(super()._load_from_state_dict, tuple(self._buffers), state_dict, prefix, *rest)


class StandardUnits(nn.Module):
    """The units in which a layer's products are estimated: `a * (x - centre) / distance`.

    In these units one eps suits every output of every layer: products of inputs that are never negative, such as pixels
    and what follows a ReLU, are far from each other by their means alone, and those of one output are often ten times
    as large as those of another.

    Args:
        like: Tensor whose first dimension counts the outputs, and whose device and dtype the units take.
        channels: Number of channels of the input.
        channel: Dimension of the channels in the input and of the outputs in the sum, counted from the end.

    Attributes:
        centre: Mean of each channel of the input, `[C]`.
        distance: Mean distance of the products of each output to their mean, `[O]`, above 0.
    """

    centre: Tensor
    distance: Tensor

    def __init__(self, like: Tensor, channels: int, channel: int) -> None:
        super().__init__()
        self.channel = channel
        self.register_buffer("centre", like.new_zeros(channels))
        self.register_buffer("distance", like.new_ones(len(like)))

    def centre_like(self, x: Tensor) -> Tensor:
        """The centre in the dtype of an input `x`, with its dimensions."""
        return self.centre.to(x.dtype).view(-1, *[1] * (-self.channel - 1))

    def scaled(self, weight: Tensor) -> Tensor:
        """A weight `[O, ...]` whose products are in these units."""
        return weight / self.distance.to(weight.dtype).view(-1, *[1] * (weight.ndim - 1))

    def back(self, z: Tensor, rest: Tensor) -> Tensor:
        """A sum of products in the layer's own units, from one in these and the `rest`, that of the centre."""
        return torch.addcmul(rest, self.distance.to(z.dtype).view(-1, *[1] * (-self.channel - 1)), z)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        load_keeping(super()._load_from_state_dict, tuple(self._buffers), state_dict, prefix, *rest)


def load_keeping(
    load: Callable[..., None],
    names: tuple[str, ...],
    state: Any,
    prefix: str,
    metadata: Any,
    strict: Any,
    missing: Any,
    *rest: Any,
) -> None:
    """Load a state, and keep the values of those `names` that it lacks, as a checkpoint of the plain model does."""
    load(state, prefix, metadata, strict, missing, *rest)
    missing[:] = [key for key in missing if key not in {prefix + name for name in names}]
