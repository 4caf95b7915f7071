"""Reprogrammed linear maps and two-dimensional convolutions, and the table of all reprogrammed classes."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import CondConv2d, Conv2dSame, ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame, pad_same
from timm.layers import Linear as TimmLinear
from torch import Tensor, nn

from timm_nrpm.config import Estimator, NRPMConfig
from timm_nrpm.nn.convolutions import NRPMCondConv2d, NRPMConv1d, NRPMConv3d, NRPMConvTranspose2d
from timm_nrpm.nn.fitted import StandardUnits
from timm_nrpm.nn.functional import Convolution, mixed_conv2d, mixed_linear, padded
from timm_nrpm.nn.reprogrammed import PARTS, Reprogrammed


class NRPMLinear(Reprogrammed, nn.Linear):
    """`nn.Linear` mixed with the robust estimate of its sum; `[..., D]` to `[..., O]`."""

    channel = -1

    def forward(self, input: Tensor) -> Tensor:
        if self.is_plain():
            return super().forward(input)
        z = self.mix(partial(self.estimated, input), partial(self._linear, input))
        return self.finish(z, self.bias)

    def _mixed(self, x: Tensor, lam: Tensor, estimator: Estimator, units: StandardUnits | None) -> Tensor:
        weight = self.weight if units is None else units.scaled(self.weight.to(x.dtype))
        return mixed_linear(x, weight, None, lam, estimator)

    def _linear(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))

    def _field(self, centre: Tensor, x: Tensor) -> Tensor:
        return centre

    def channels(self) -> int:
        return self.in_features

    def factors(self, input: Tensor) -> tuple[Tensor, Tensor]:
        return input.reshape(len(input), -1, 1, self.in_features), self.weight.unsqueeze(0)


class NRPMTimmLinear(NRPMLinear, TimmLinear):
    """The same for timm's own Linear."""


class NRPMConv2d(Reprogrammed, nn.Conv2d):
    """`nn.Conv2d`, with any padding mode, mixed with the robust estimate; `[B, C, H, W]` to `[B, O, H', W']`."""

    channel = -3

    def forward(self, input: Tensor) -> Tensor:
        if self.is_plain():
            return super().forward(input)
        batch = input if input.ndim == 4 else input.unsqueeze(0)
        z = self.mix(partial(self.estimated, batch), partial(self._linear, batch))
        return self.finish(z if input.ndim == 4 else z.squeeze(0), self.bias)

    def _mixed(self, x: Tensor, lam: Tensor, estimator: Estimator, units: StandardUnits | None) -> Tensor:
        x, weight, conv = self._padded(x)
        return mixed_conv2d(
            x, weight if units is None else units.scaled(weight.to(x.dtype)), None, conv, lam, estimator
        )

    def _linear(self, x: Tensor) -> Tensor:
        x, weight, conv = self._padded(x)
        return F.conv2d(x, weight.to(x.dtype), None, conv.stride, conv.padding, conv.dilation, conv.groups)

    def _field(self, centre: Tensor, x: Tensor) -> Tensor:
        return centre.expand(1, -1, *x.shape[2:])

    def channels(self) -> int:
        return self.in_channels

    def _padded(self, batch: Tensor) -> tuple[Tensor, Tensor, Convolution]:
        """Input, weight and geometry of the convolution that the original class computes."""
        x, weight, padding = self.operands(batch)
        x, conv = padded(x, weight, self.stride, padding, self.dilation, self.groups)
        return x, weight, conv

    def factors(self, input: Tensor) -> tuple[Tensor, Tensor]:
        x, weight, conv = self._padded(input)
        columns = F.unfold(x, weight.shape[2:], conv.dilation, conv.padding, conv.stride)  # [B, G * D, L]
        return columns.unflatten(1, (conv.groups, -1)).movedim(3, 1), weight.flatten(1).unflatten(0, (conv.groups, -1))

    def operands(self, x: Tensor) -> tuple[Tensor, Tensor, Any]:
        """Input, weight and zero padding of the convolution that the original class computes."""
        if self.padding_mode == "zeros":
            return x, self.weight, self.padding
        return F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode), self.weight, 0


class NRPMConv2dSame(NRPMConv2d, Conv2dSame):
    """The same for timm's convolution with TensorFlow's padding."""

    def operands(self, x: Tensor) -> tuple[Tensor, Tensor, Any]:
        return pad_same(x, self.kernel_size, self.stride, self.dilation), self.weight, 0  # type: ignore[arg-type]


class _Standardized(NRPMConv2d):
    """The same for timm's convolutions that standardize their weight, and scale it where they have a gain."""

    def operands(self, x: Tensor) -> tuple[Tensor, Tensor, Any]:
        gain, rows = getattr(self, "gain", None), self.weight.flatten(1).unsqueeze(0)  # [1, O, D]
        scale = None if gain is None else (gain * self.scale).flatten()
        weight = F.batch_norm(rows, None, None, weight=scale, training=True, momentum=0.0, eps=self.eps)  # type: ignore[arg-type]
        if getattr(self, "same_pad", False):
            x = pad_same(x, self.kernel_size, self.stride, self.dilation)  # type: ignore[arg-type]
        return x, weight.view_as(self.weight), self.padding


class NRPMStdConv2d(_Standardized, StdConv2d):
    """BiT's convolution."""


class NRPMStdConv2dSame(_Standardized, StdConv2dSame):
    """Hybrid vision transformers' convolution."""


class NRPMScaledStdConv2d(_Standardized, ScaledStdConv2d):
    """NFNet's convolution."""


class NRPMScaledStdConv2dSame(_Standardized, ScaledStdConv2dSame):
    """NFNet's convolution with TensorFlow's padding."""


REPROGRAMMED: dict[type[nn.Module], type[Reprogrammed]] = {
    nn.Linear: NRPMLinear,
    TimmLinear: NRPMTimmLinear,
    nn.Conv1d: NRPMConv1d,
    nn.Conv2d: NRPMConv2d,
    nn.Conv3d: NRPMConv3d,
    nn.ConvTranspose2d: NRPMConvTranspose2d,
    CondConv2d: NRPMCondConv2d,
    Conv2dSame: NRPMConv2dSame,
    StdConv2d: NRPMStdConv2d,
    StdConv2dSame: NRPMStdConv2dSame,
    ScaledStdConv2d: NRPMScaledStdConv2d,
    ScaledStdConv2dSame: NRPMScaledStdConv2dSame,
}
"""The reprogrammed class of each original class. A subclass is left alone, since it may compute something else."""

LINEAR_MAPS = (
    nn.Linear,
    nn.modules.conv._ConvNd,
    CondConv2d,
    nn.Bilinear,
    nn.MultiheadAttention,
    nn.RNNBase,
    nn.RNNCellBase,
)
"""Modules that hold a linear map; those whose exact type is not in REPROGRAMMED are reported as plain."""


def reprogram_layer_(module: nn.Module, config: NRPMConfig, lam: float) -> None:
    """Turn `module`, whose exact type is in REPROGRAMMED, into its reprogrammed class."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    module.__class__ = REPROGRAMMED[type(module)]
    assert isinstance(module, Reprogrammed)
    module.config = config
    module.lam = nn.Parameter(
        torch.tensor(lam, dtype=torch.float32, device=weight.device), requires_grad=config.learnable
    )
    module.correction = module.units = None


def restore_layer_(module: Reprogrammed) -> None:
    """Undo `reprogram_layer_`."""
    module.keep_parts(())
    for name in ("config", "lam", *PARTS):
        delattr(module, name)
    module.__class__ = next(  # type: ignore[assignment]
        original for original, reprogrammed in REPROGRAMMED.items() if reprogrammed is type(module)
    )
