"""What a reprogrammed layer adds to its original class: one lambda and the robust estimate (NRPM, Algorithm 1).

A layer becomes reprogrammed by a change of its class in place. So it stays the same object wherever it is referenced,
with the same Parameters, hooks, device and training mode, and restoring its class undoes the change without a trace.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from timm.layers import register_notrace_module
from torch import Tensor, nn

from timm_nrpm.config import Estimator, NRPMConfig
from timm_nrpm.nn.custom_gradients import Clamp, StraightThrough
from timm_nrpm.nn.fitted import Correction, Fitted, Part, StandardUnits, load_keeping
from timm_nrpm.nn.functional import is_plain, precision_of

PARTS: dict[str, type[Fitted]] = {"correction": Correction, "units": StandardUnits}
"""The parts of a reprogrammed layer that calibration fits, by the names of their attributes."""


@register_notrace_module
class Reprogrammed(nn.Module):
    """What a reprogrammed layer adds to its original class: lambda, the settings, and what calibration fits.

    To timm's symbolic traces a layer is one operation, since it chooses by the value of lambda what it computes.

    Attributes:
        lam: Lambda, a Parameter with no dimensions. The layer uses its value clamped to [0, 1], which is also the one
            that :func:`timm_nrpm.lambdas` reports. It takes a gradient if `config.learnable`.
        config: Settings of the estimate; its `lam` and `layers` describe the model, not this layer.
        correction: Correction of the sum before the bias, fitted by calibration; None without one.
        units: Units in which the products are estimated if `config.standardize`, fitted by calibration; None without
            them, or before it.
        linear_backward: Whether the gradient goes through the linear map alone, past the estimate, as an attack may
            need, since the estimate's own gradient is steep and erratic (backward pass differentiable approximation,
            arXiv 1802.00420, section 4.1).
        channel: Dimension of the outputs, counted from the end (-1 is the last).
    """

    lam: nn.Parameter
    config: NRPMConfig
    correction: Correction | None
    units: StandardUnits | None
    linear_backward: bool = False
    channel: int

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """A new layer of the original class, since only `reprogram_` knows a lambda.

        Code that makes another layer like a given one, such as PEFT's adapter of a convolution, calls the type of that.
        """
        if not args and not kwargs:  # as copying and unpickling do
            return super().__new__(cls)
        return next(original for original in cls.__mro__ if not issubclass(original, Reprogrammed))(*args, **kwargs)

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
        lam = Clamp.apply(self.lam) if learned else self.lam.detach().clamp(0.0, 1.0)
        if not self.linear_backward:
            return mixed(lam, self.config.estimator)
        with torch.no_grad():
            value = mixed(lam, self.config.estimator)
        return StraightThrough.apply(value, linear())

    def finish(self, z: Tensor, bias: Tensor | None) -> Tensor:
        """The sum plus bias, with any correction; none applies at lambda = 1, even while lambda is learned."""
        if self.correction is not None:
            z = self.correction(z, self.lam)
        return z if bias is None else z + bias.to(z.dtype).view(-1, *[1] * (-self.channel - 1))

    def estimated(self, x: Tensor, lam: Tensor, estimator: Estimator) -> Tensor:
        """The mixed sum, in standard units if the config asks for them.

        Raises:
            ValueError: No calibration has fitted these units.
        """
        if not self.config.standardize:
            return self._mixed(x, lam, estimator, None)
        if self.units is None:
            raise ValueError(
                "This model has standardize=True, and its units are not known yet: call "
                "timm_nrpm.calibrate_(model, images), which takes them from images."
            )
        compute, dtype = precision_of(x)
        with torch.autocast(x.device.type, enabled=False):  # products over their distance may be no number of a half
            x = x.to(compute)
            centre = self.units.along(self.units.centre, compute)
            z = self._mixed(x - centre, lam, estimator, self.units)  # before padding, since that is no input
            rest = self._linear(self._field(centre, x))
            return torch.addcmul(rest, self.units.along(self.units.distance, compute), z).to(dtype)

    def _mixed(self, x: Tensor, lam: Tensor, estimator: Estimator, units: StandardUnits | None) -> Tensor:
        """The mixed sum of `x` and the weight, which is in other units if they are given."""
        raise NotImplementedError

    def _linear(self, x: Tensor) -> Tensor:
        """The linear map without a bias."""
        raise NotImplementedError

    def _field(self, centre: Tensor, x: Tensor) -> Tensor:
        """An input like one of `x` that has the centre of each channel everywhere."""
        raise NotImplementedError

    def add_part(self, part: type[Part]) -> Part:
        """Add one of the parts that calibration fits, which does not change anything yet, and return it."""
        added = part.of(self.rows().detach(), self.channel, self.channels())
        setattr(self, next(name for name, each in PARTS.items() if each is part), added)
        return added

    @classmethod
    def obstacle(cls, module: nn.Module, config: NRPMConfig) -> str:
        """Why a layer of the original class cannot be reprogrammed; empty if it can."""
        return ""

    def rows(self) -> Tensor:
        """The weight, with one row for each output first, `[O, ...]`."""
        weight: Tensor = self.weight  # type: ignore[assignment]
        return weight

    def channels(self) -> int:
        """Number of channels of the input."""
        raise NotImplementedError

    def parts(self) -> dict[str, Fitted]:
        """The parts that calibration has fitted, by the names of their attributes."""
        return {name: part for name in PARTS if (part := getattr(self, name)) is not None}

    def keep_parts(self, names: Iterable[str]) -> None:
        """Have these parts and no others; one that is there already stays as it is."""
        wanted = set(names)
        for name, part in PARTS.items():
            has = getattr(self, name) is not None
            if name in wanted and not has:
                self.add_part(part)
            elif name not in wanted and has:
                delattr(self, name)  # assigning None to a child would keep its name, which `repr` would show
                setattr(self, name, None)

    def factors(self, input: Tensor) -> tuple[Tensor, Tensor]:
        """The factors of every product: inputs `[B, L, G, D]`, at L positions for G groups of outputs, and weights
        `[G, O / G, D]`."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        c = self.config
        lam = "?" if self.lam.is_meta else f"{float(self.lam.detach().clamp(0.0, 1.0)):.4g}"
        units = ", standardize=True" if c.standardize else ""
        estimate = f"lam={lam}, iterations={c.iterations}, eps={c.eps:g}, penalty={c.penalty}{units}"
        return f"{super().extra_repr()}, {estimate}"

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: Any, missing: Any, *rest: Any
    ) -> None:
        lam = state_dict.get(prefix + "lam")
        if lam is not None and not bool((lam >= 0) & (lam <= 1)):
            rest[-1].append(f"{prefix}lam is {lam.tolist()}, and lambda must be in [0, 1].")
            return
        # The state of a calibrated model holds such parts; that of another reprogrammed model removes them. Half of a
        # part, and units that were not asked for, are unexpected.
        known = {name: part for name, part in PARTS.items() if name != "units" or self.config.standardize}
        held = {n for n, part in known.items() if all(f"{prefix}{n}.{key}" in state_dict for key in part.KEYS)}
        self.keep_parts(held if lam is not None else held | self.parts().keys())
        if "units" in held and not bool((state_dict[f"{prefix}units.distance"] > 0).all()):
            rest[-1].append(f"{prefix}units.distance holds numbers that are not above 0.")
            return
        load_keeping(super()._load_from_state_dict, ("lam",), state_dict, prefix, metadata, strict, missing, *rest)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # An optimizer may have left [0, 1]: save the value that the layer uses.
        if not self.lam.is_meta and not bool((self.lam >= 0) & (self.lam <= 1)):
            destination[prefix + "lam"] = self.lam.detach().clamp(0.0, 1.0)
