"""Reprogrammed layers: the original classes, with one lambda and the robust estimate (NRPM, Algorithm 1).

A layer becomes reprogrammed by a change of its class in place. So it stays the same object wherever it is referenced,
with the same Parameters, hooks, device and training mode, and restoring its class undoes the change without a trace.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import CondConv2d, Conv2dSame, ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame, pad_same
from timm.layers import Linear as TimmLinear
from torch import Tensor, nn

from timm_nrpm.config import Estimator, NRPMConfig
from timm_nrpm.nn.functional import is_plain, is_readable, mixed_conv2d, mixed_linear, padded


class _Clamp(torch.autograd.Function):
    """Clamp to [0, 1] whose gradient is zero only where a descent step would leave the interval.

    `torch.clamp` has no gradient outside the interval, so a lambda that an optimizer pushed past 1 would stay there.
    """

    @staticmethod
    def forward(ctx: Any, lam: Tensor) -> Tensor:
        ctx.save_for_backward(lam)
        return lam.clamp(0.0, 1.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (lam,) = ctx.saved_tensors
        return grad.masked_fill(((lam >= 1) & (grad < 0)) | ((lam <= 0) & (grad > 0)), 0.0)


def _load_keeping(
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


class _StraightThrough(torch.autograd.Function):
    """The value of the first argument with the gradient of the second."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, path: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, grad


class Correction(nn.Module):
    """A gain and an offset for every output, which calibration fits: `gain * z + offset`.

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
        _load_keeping(super()._load_from_state_dict, ("gain", "offset"), state_dict, prefix, *rest)


class Reprogrammed(nn.Module):
    """What a reprogrammed layer adds to its original class: lambda, the settings and a correction.

    Attributes:
        lam: Lambda, a Parameter with no dimensions. The layer uses its value clamped to [0, 1], which is also the one
            that :func:`timm_nrpm.lambdas` reports. It takes a gradient if `config.learnable`.
        config: Settings of the estimate; its `lam` and `layers` describe the model, not this layer.
        correction: Correction of the sum before the bias, fitted by calibration; None without calibration.
        linear_backward: Whether the gradient goes through the linear map alone, past the estimate, as an attack may
            need, since the estimate's own gradient is steep and erratic (backward pass differentiable approximation,
            arXiv 1802.00420, section 4.1).
        channel: Dimension of the outputs, counted from the end (-1 is the last).
    """

    lam: nn.Parameter
    config: NRPMConfig
    correction: Correction | None
    linear_backward: bool = False
    channel: int

    def is_plain(self) -> bool:
        """Whether the original operation gives the result bit for bit: K = 0, l2, or lam = 1 and not learned."""
        # This synchronises with a device once per layer, which costs less than the estimate that a plain layer saves.
        learned = self.lam.requires_grad and torch.is_grad_enabled()
        graph = torch.compiler.is_compiling() or (self.lam.is_cuda and torch.cuda.is_current_stream_capturing())
        lam = self.lam if learned or graph or self.lam.is_meta else self.lam.cpu()
        return is_plain(lam, self.config.iterations, self.config.penalty)

    def mix(self, mixed: Callable[[Tensor, Estimator], Tensor], linear: Callable[[], Tensor]) -> Tensor:
        """The mixed sum, with its own gradient or with that of the linear map.

        Args:
            mixed: Function from lambda and the settings of the estimate to the mixed sum.
            linear: Function that gives the linear map of the same input.
        """
        learned = self.lam.requires_grad and torch.is_grad_enabled()
        lam = _Clamp.apply(self.lam) if learned else self.lam.detach().clamp(0.0, 1.0)
        if not self.linear_backward:
            return mixed(lam, self.config.estimator)
        with torch.no_grad():
            value = mixed(lam, self.config.estimator)
        return _StraightThrough.apply(value, linear())

    def finish(self, z: Tensor, bias: Tensor | None) -> Tensor:
        """The sum plus bias, with any correction; none applies at lambda = 1, even while lambda is learned."""
        if self.correction is not None:
            z = self.correction(z, self.lam)
        return z if bias is None else z + bias.to(z.dtype).view(-1, *[1] * (-self.channel - 1))

    def add_correction(self) -> Correction:
        """Add a correction that does not change anything yet, and return it."""
        self.correction = Correction(self.get_parameter("weight").detach(), self.channel)
        return self.correction

    def drop_correction(self) -> None:
        # Assigning None to a child would keep its name, which `repr` would show.
        if self.correction is not None:
            del self.correction
            self.correction = None

    def extra_repr(self) -> str:
        c = self.config
        lam = "?" if self.lam.is_meta else f"{float(self.lam.detach().clamp(0.0, 1.0)):.4g}"
        return f"{super().extra_repr()}, lam={lam}, iterations={c.iterations}, eps={c.eps:g}, penalty={c.penalty}"

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: Any, missing: Any, *rest: Any
    ) -> None:
        lam = state_dict.get(prefix + "lam")
        if lam is not None and not bool((lam >= 0) & (lam <= 1)):
            rest[-1].append(f"{prefix}lam is {lam.tolist()}, and lambda must be in [0, 1].")
            return
        # The state of a calibrated model holds corrections; that of another reprogrammed model removes them.
        corrected = prefix + "correction.gain" in state_dict
        if corrected and self.correction is None:
            self.add_correction()
        elif lam is not None and not corrected:
            self.drop_correction()
        _load_keeping(super()._load_from_state_dict, ("lam",), state_dict, prefix, metadata, strict, missing, *rest)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # An optimizer may have left [0, 1]: save the value that the layer uses.
        if not self.lam.is_meta and not bool((self.lam >= 0) & (self.lam <= 1)):
            destination[prefix + "lam"] = self.lam.detach().clamp(0.0, 1.0)


class NRPMLinear(Reprogrammed, nn.Linear):
    """`nn.Linear` mixed with the robust estimate of its sum; `[..., D]` to `[..., O]`."""

    channel = -1

    def forward(self, input: Tensor) -> Tensor:
        if self.is_plain():
            return super().forward(input)
        z = self.mix(partial(mixed_linear, input, self.weight, None), partial(F.linear, input, self.weight))
        return self.finish(z, self.bias)


class NRPMTimmLinear(NRPMLinear, TimmLinear):
    """The same for timm's own Linear."""


class NRPMConv2d(Reprogrammed, nn.Conv2d):
    """`nn.Conv2d`, with any padding mode, mixed with the robust estimate; `[B, C, H, W]` to `[B, O, H', W']`."""

    channel = -3

    def forward(self, input: Tensor) -> Tensor:
        if self.is_plain():
            return super().forward(input)
        x, weight, padding = self.operands(input)
        batch = x if x.ndim == 4 else x.unsqueeze(0)
        batch, conv = padded(batch, weight, self.stride, padding, self.dilation, self.groups)
        operands = (conv.stride, conv.padding, conv.dilation, conv.groups)
        linear = partial(F.conv2d, batch, weight, None, *operands)
        z = self.mix(partial(mixed_conv2d, batch, weight, None, conv), linear)
        return self.finish(z if x.ndim == 4 else z.squeeze(0), self.bias)

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
    nn.Conv2d: NRPMConv2d,
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
    module.correction = None


def restore_layer_(module: Reprogrammed) -> None:
    """Undo `reprogram_layer_`."""
    module.drop_correction()
    for name in ("config", "lam", "correction"):
        delattr(module, name)
    module.__class__ = next(  # type: ignore[assignment]
        original for original, reprogrammed in REPROGRAMMED.items() if reprogrammed is type(module)
    )
