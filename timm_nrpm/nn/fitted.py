"""What calibration may add to a reprogrammed layer: a correction of its sum, and standard units of its products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from timm_nrpm.nn.functional import is_readable

Part = TypeVar("Part", bound="Fitted")


class Fitted(nn.Module):
    """Numbers for every channel of a layer, in two buffers.

    Args:
        channel: Dimension of the channels, counted from the end (-1 is the last).
        first, second: The numbers, each `[channels]`.

    Attributes:
        KEYS: Names of the buffers.
    """

    KEYS: ClassVar[tuple[str, str]]

    def __init__(self, channel: int, first: Tensor, second: Tensor) -> None:
        super().__init__()
        self.channel = channel
        for name, values in zip(self.KEYS, (first, second), strict=True):
            self.register_buffer(name, values)

    @classmethod
    def of(cls: type[Part], weight: Tensor, channel: int, inputs: int) -> Part:
        """A part that changes nothing yet, in the device and dtype of a weight `[O, ...]`.

        Args:
            weight: The layer's weight.
            channel: Dimension of the channels, in the input and in the sum, counted from the end.
            inputs: Number of channels of the input.
        """
        raise NotImplementedError

    def along(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        """Numbers `[channels]` in a shape that broadcasts along the channels."""
        return values.to(dtype).view(-1, *[1] * (-self.channel - 1))

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        load_keeping(super()._load_from_state_dict, self.KEYS, state_dict, prefix, *rest)


class Correction(Fitted):
    """A gain and an offset for every output `[O]`: `gain * z + offset`."""

    KEYS = ("gain", "offset")
    gain: Tensor
    offset: Tensor

    @classmethod
    def of(cls, weight: Tensor, channel: int, inputs: int) -> Correction:
        return cls(channel, weight.new_ones(len(weight)), weight.new_zeros(len(weight)))

    def forward(self, z: Tensor, lam: Tensor) -> Tensor:
        """`z` corrected, or `z` itself where `lam` is 1; the device chooses, since a graph cannot branch on a value."""
        gain, offset = self.gain, self.offset
        if not is_readable(lam):
            gain, offset = torch.where(lam < 1, gain, 1), torch.where(lam < 1, offset, 0)
        elif lam >= 1:
            return z
        return torch.addcmul(self.along(offset, z.dtype), self.along(gain, z.dtype), z)


class StandardUnits(Fitted):
    """The units in which a layer's products are estimated: `a * (x - centre) / distance`.

    In these units one eps suits every output of every layer: products of inputs that are never negative, such as pixels
    and what follows a ReLU, are far from each other by their means alone, and those of one output are often ten times
    as large as those of another.

    Attributes:
        centre: Mean of each channel of the input, `[C]`.
        distance: Mean distance of the products of each output to their mean, `[O]`, above 0.
    """

    KEYS = ("centre", "distance")
    centre: Tensor
    distance: Tensor

    @classmethod
    def of(cls, weight: Tensor, channel: int, inputs: int) -> StandardUnits:
        return cls(channel, weight.new_zeros(inputs), weight.new_ones(len(weight)))

    def scaled(self, weight: Tensor) -> Tensor:
        """A weight `[O, ...]` whose products are in these units."""
        return weight / self.distance.to(weight.dtype).view(-1, *[1] * (weight.ndim - 1))


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
