"""Reprogrammed convolutions of one and of three dimensions, and transposed ones, by the two-dimensional estimate."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import CondConv2d, pad_same
from torch import Tensor, nn

from timm_nrpm.config import Estimator, NRPMConfig
from timm_nrpm.nn.fitted import StandardUnits
from timm_nrpm.nn.functional import Convolution, mixed_conv2d, padded, precision_of
from timm_nrpm.nn.reprogrammed import Reprogrammed


class _Lifted(Reprogrammed):
    """A convolution of another number of dimensions, whose products are those of a two-dimensional one."""

    dimensions: int

    def forward(self, input: Tensor) -> Tensor:
        if self.is_plain():
            return super().forward(input)
        batch = input if input.ndim == self.dimensions + 2 else input.unsqueeze(0)
        z = self.mix(partial(self.estimated, batch), partial(self._linear, batch))
        return self.finish(z if input.ndim == batch.ndim else z.squeeze(0), self.bias)  # type: ignore[arg-type]

    def _mixed(self, x: Tensor, lam: Tensor, estimator: Estimator, units: StandardUnits | None) -> Tensor:
        images, weight, conv = self.images(x)
        weight = weight if units is None else units.scaled(weight.to(x.dtype))
        return self.back(mixed_conv2d(images, weight, None, conv, lam, estimator), x.shape[0])

    def _linear(self, x: Tensor) -> Tensor:
        images, weight, conv = self.images(x)
        return self.back(conv.plain(images, weight.to(x.dtype)), x.shape[0])

    def _field(self, centre: Tensor, x: Tensor) -> Tensor:
        return centre.expand(1, -1, *x.shape[2:])

    def channels(self) -> int:
        return self.in_channels  # type: ignore[return-value]

    def factors(self, input: Tensor) -> tuple[Tensor, Tensor]:
        images, weight, conv = self.images(input)
        columns = F.unfold(images, weight.shape[2:], conv.dilation, conv.padding, conv.stride)  # [B', G * D, L]
        inputs = columns.unflatten(1, (conv.groups, -1)).movedim(3, 1).unflatten(0, (len(input), -1)).flatten(1, 2)
        return inputs, weight.flatten(1).unflatten(0, (conv.groups, -1))

    def images(self, x: Tensor) -> tuple[Tensor, Tensor, Convolution]:
        """Images `[B', C', H, W]`, weight `[O, C' / groups, kH, kW]` and geometry in two dimensions."""
        raise NotImplementedError

    def back(self, z: Tensor, batch: int) -> Tensor:
        """The sums `[B', O, H', W']` of that convolution as those of this one, of a batch of so many."""
        raise NotImplementedError


class NRPMConv1d(_Lifted, nn.Conv1d):
    """`nn.Conv1d`, with any padding mode, mixed with the robust estimate; `[B, C, L]` to `[B, O, L']`."""

    channel, dimensions = -2, 1

    def images(self, x: Tensor) -> tuple[Tensor, Tensor, Convolution]:
        padding = self.padding
        if self.padding_mode != "zeros":
            x, padding = F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode), (0,)
        if not isinstance(padding, str):
            padding = (0, *padding)
        weight = self.weight.unsqueeze(2)
        rows, conv = padded(x.unsqueeze(2), weight, (1, *self.stride), padding, (1, *self.dilation), self.groups)
        return rows, weight, conv

    def back(self, z: Tensor, batch: int) -> Tensor:
        return z.squeeze(2)


class NRPMConv3d(_Lifted, nn.Conv3d):
    """`nn.Conv3d`, with any padding mode, mixed with the robust estimate; `[B, C, D, H, W]` to `[B, O, D', H', W']`.

    The planes under each place of the kernel become further channels of an image.
    """

    channel, dimensions = -4, 3

    def images(self, x: Tensor) -> tuple[Tensor, Tensor, Convolution]:
        if self.padding_mode != "zeros":
            x = F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode)
        elif self.padding == "same":
            x = F.pad(x, self._reversed_padding_repeated_twice)
        elif not isinstance(self.padding, str):
            x = F.pad(x, [each for each in reversed(self.padding) for _ in (0, 1)])
        planes = x.unfold(2, (self.kernel_size[0] - 1) * self.dilation[0] + 1, self.stride[0])
        planes = planes[..., :: self.dilation[0]]
        images = planes.permute(0, 2, 1, 5, 3, 4).flatten(0, 1).flatten(1, 2)  # [B * D', C * depth, H, W]
        weight = self.weight.flatten(1, 2)
        strides, dilations = self.stride[1:], self.dilation[1:]
        return images, weight, Convolution(strides, (0, 0), dilations, self.groups)

    def back(self, z: Tensor, batch: int) -> Tensor:
        return z.unflatten(0, (batch, -1)).transpose(1, 2)


class NRPMConvTranspose2d(Reprogrammed, nn.ConvTranspose2d):
    """`nn.ConvTranspose2d` mixed with the robust estimate of its sum; `[B, C, H, W]` to `[B, O, H', W']`.

    An output adds up the products of those kernel values alone that an input falls on: by its place modulo the stride
    it is one of several ordinary convolutions. The zeros beyond the border are products, as in padding.
    """

    channel = -3

    @classmethod
    def obstacle(cls, module: nn.Module, config: NRPMConfig) -> str:
        assert isinstance(module, nn.ConvTranspose2d)
        if config.standardize:
            return "standard units are not defined for a transposed convolution, whose outputs differ in their products"
        return "a transposed convolution with dilation has no estimate here" if module.dilation != (1, 1) else ""

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        if self.is_plain():
            return super().forward(input, output_size)
        batch = input if input.ndim == 4 else input.unsqueeze(0)
        extra = self._output_padding(
            input, output_size, self.stride, self.padding, self.kernel_size, 2, self.dilation  # type: ignore[arg-type]
        )  # fmt: skip
        z = self.mix(partial(self._phases, batch, extra), partial(self._transposed, batch, extra))
        return self.finish(z if input.ndim == 4 else z.squeeze(0), self.bias)

    def _transposed(self, x: Tensor, extra: list[int]) -> Tensor:
        weight = self.weight.to(x.dtype)
        return F.conv_transpose2d(x, weight, None, self.stride, self.padding, extra, self.groups)  # type: ignore[arg-type]

    def _phases(self, x: Tensor, extra: list[int], lam: Tensor, estimator: Estimator) -> Tensor:
        """The mixed sums, each phase of the stride by itself."""
        rows = self.rows()
        sizes = [(n - 1) * s + k for n, s, k in zip(x.shape[2:], self.stride, self.kernel_size, strict=True)]
        whole = x.new_zeros(x.shape[0], self.out_channels, *sizes, dtype=precision_of(x)[1])
        for i in range(min(self.stride[0], self.kernel_size[0])):
            for j in range(min(self.stride[1], self.kernel_size[1])):
                kernel = rows[..., i :: self.stride[0], j :: self.stride[1]].flip(-1, -2)
                padding = (kernel.shape[-2] - 1, kernel.shape[-1] - 1)
                conv = Convolution((1, 1), padding, (1, 1), self.groups)
                part = mixed_conv2d(x, kernel.contiguous(), None, conv, lam, estimator)
                whole[..., i :: self.stride[0], j :: self.stride[1]] = part
        before: Any = self.padding
        for dim, more in enumerate(extra, start=2):
            first, size = before[dim - 2], sizes[dim - 2]
            last = size - first + more
            whole = whole.narrow(dim, first, min(last, size) - first)
            whole = F.pad(whole, (0, 0) * (3 - dim) + (0, max(last - size, 0)))  # places that no input falls on
        return whole

    def rows(self) -> Tensor:
        grouped = self.weight.unflatten(0, (self.groups, -1)).transpose(1, 2)  # [G, O / G, C / G, kH, kW]
        return torch.flatten(grouped, 0, 1)

    def channels(self) -> int:
        return self.in_channels


class NRPMCondConv2d(Reprogrammed, CondConv2d):
    """timm's convolution whose weight is mixed for each image, mixed with the robust estimate of that image's sum;
    `[B, C, H, W]` to `[B, O, H', W']`."""

    channel = -3

    @classmethod
    def obstacle(cls, module: nn.Module, config: NRPMConfig) -> str:
        if config.standardize:
            return "standard units are not defined for a convolution whose weight is another one for each image"
        return "its bias is another one for each image" if module.bias is not None else ""

    def forward(self, x: Tensor, routing_weights: Tensor) -> Tensor:
        if self.is_plain():
            return super().forward(x, routing_weights)
        weight = (routing_weights @ self.weight).view(-1, *self.weight_shape[1:])
        if self.dynamic_padding:
            x = pad_same(x, self.kernel_size, self.stride, self.dilation)
        # The images become groups of channels of one image, each with its own weight.
        one = x.reshape(1, -1, *x.shape[2:])
        padding = (0, 0) if self.dynamic_padding else self.padding
        conv = Convolution(self.stride, padding, self.dilation, self.groups * x.shape[0])
        z = self.mix(partial(mixed_conv2d, one, weight, None, conv), partial(conv.plain, one, weight.to(x.dtype)))
        return self.finish(z.view(x.shape[0], self.out_channels, *z.shape[2:]), None)

    def rows(self) -> Tensor:
        return self.weight[0].view(self.weight_shape)

    def channels(self) -> int:
        return self.in_channels
