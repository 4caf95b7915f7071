"""Wrappers around a model, which one function removes or refuses before any work; and copies of a model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MethodType
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from torch.overrides import TorchFunctionMode

from timm_nrpm.nn.ensemble import Ensemble
from timm_nrpm.nn.pixel_model import PixelModel

Model = TypeVar("Model", bound=nn.Module)

INSIDE: tuple[tuple[type[nn.Module], str], ...] = (
    (nn.DataParallel, "module"),
    (DistributedDataParallel, "module"),
    (AveragedModel, "module"),
    (PixelModel, "model"),
)
"""Wrappers that compute what the module inside computes, and the attribute that holds it."""

BY_NAME = {
    "OptimizedModule": "_orig_mod",
    "ModelEmaV2": "module",
    "ModelEmaV3": "module",
    "TimmWrapperForImageClassification": "timm_model",
    "PeftModel": "base_model",
    "LoraModel": "model",
}
"""The same by class name, for `torch.compile`, timm's averages of weights, transformers and PEFT, which take long to
import, or may be missing."""

QUANTISED = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized", "torch.nn.quantized")
"""Packages that define torch's quantised layers."""


@dataclass(frozen=True)
class Subject:
    """A model without its wrappers, and the normalisation that came with it.

    Attributes:
        model: The module without its wrappers.
        mean, std: Mean and standard deviation, one number per channel; None for those in timm's config of the model.
    """

    model: nn.Module
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    def on_pixels(self) -> PixelModel:
        """The model as a PixelModel, which takes pixels in [0, 1]."""
        return PixelModel(self.model, self.mean, self.std)


def unwrapped(model: Any) -> nn.Module:
    """The model without what is around it: DataParallel, DDP, `torch.compile`, an average of weights, PixelModel or
    Sequential, transformers' wrapper of timm models, or PEFT's of a model with adapters inside.

    Raises:
        ValueError: `model` is no module, or is quantised.

    Example:
        >>> unwrapped(nn.DataParallel(model)) is model
        True
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"The model is a {type(model).__name__}: give a torch.nn.Module, such as a timm model.")
    while (inner := _inside(model)) is not None:
        model = inner
    for name, module in model.named_modules():
        if type(module).__module__.startswith(QUANTISED):
            raise ValueError(
                f"The model is quantised ({name or 'it'} is torch's quantised {type(module).__name__}), so it adds up "
                "integers and has no gradient: give the floating-point model."
            )
    return model


def subject_of(model: Any, mean: tuple[float, ...] | None = None, std: tuple[float, ...] | None = None) -> Subject:
    """The model without its wrappers, with the normalisation that was given or that a wrapper has.

    Args:
        model: Any module.
        mean, std: Normalisation from the caller, which takes precedence over that of a wrapper.

    Raises:
        ValueError: `model` is no module; it holds a timm model beside other modules, so that it is unknown what pixels
            it takes; or it is an ensemble, whose members normalise inside, and a normalisation is given.
    """
    given = mean, std
    inner: nn.Module | None = model
    while inner is not None:
        model = inner
        normalisation = _normalisation_of(model)
        if normalisation is not None:
            mean, std = mean or normalisation[0], std or normalisation[1]
        inner = _inside(model)
    model = unwrapped(model)
    if isinstance(model, Ensemble) and any(
        set(each) - {same} for each, same in zip(given, (0, 1), strict=True) if each
    ):
        raise ValueError(
            f"mean={given[0]} and std={given[1]} are given for an ensemble, whose members normalise inside: leave them "
            "out."
        )
    _refuse_other_modules(model, is_known=mean is not None and std is not None)
    return Subject(model, mean, std)


def _normalisation_of(wrapper: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """The mean and deviation that a wrapper normalises by; None if it does not."""
    if isinstance(wrapper, PixelModel):
        normalisation = wrapper.normalisation()
        return normalisation["mean"], normalisation["std"]
    if _normalises_first(wrapper):
        first: Any = wrapper[0]  # type: ignore[index]
        return tuple(map(float, first.mean)), tuple(map(float, first.std))
    return None


def _inside(model: nn.Module) -> nn.Module | None:
    """The module inside a wrapper; None if `model` is no wrapper."""
    for kind, name in INSIDE:
        if isinstance(model, kind):
            inner: nn.Module = getattr(model, name)
            return inner
    if type(model).__name__ in BY_NAME:
        named: nn.Module = getattr(model, BY_NAME[type(model).__name__])
        return named
    if type(model) is nn.Sequential and len(model) == 1 and (hasattr(model[0], "pretrained_cfg") or _inside(model[0])):
        return model[0]
    return model[1] if _normalises_first(model) else None  # type: ignore[index]


def _normalises_first(model: nn.Module) -> bool:
    """Whether `model` is a Sequential of torchvision's Normalize and a model."""
    if type(model) is not nn.Sequential or len(model) != 2 or type(model[0]).__name__ != "Normalize":
        return False
    return hasattr(model[0], "mean") and hasattr(model[0], "std")


def _refuse_other_modules(model: nn.Module, is_known: bool) -> None:
    """Raise a ValueError for a module that holds a timm model beside others, unless its normalisation is known."""
    if hasattr(model, "pretrained_cfg") or is_known:
        return
    for name, module in model.named_modules():
        if hasattr(module, "pretrained_cfg") and hasattr(module, "num_classes"):
            raise ValueError(
                f"This {type(model).__name__} holds a timm model, {type(module).__name__} as {name!r}, beside other "
                "modules, so it is unknown what pixels it takes: give the timm model itself, or mean= and std= of the "
                "normalisation that the whole expects, such as mean=(0.0,), std=(1.0,) if it normalises inside."
            )


class _Detached(TorchFunctionMode):
    """A mode that deep-copies computed tensors, such as pruning, weight_norm and hooks keep, as their values alone."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is Tensor.__deepcopy__ and not args[0].is_leaf:
            value, memo = args
            if id(value) not in memo:
                memo[id(value)] = value.detach().clone()
            return memo[id(value)]
        return func(*args, **(kwargs or {}))


def copied(model: Model, memo: dict[int, Any] | None = None) -> Model:
    """A deep copy of a model, which holds the values alone of tensors that were computed.

    Args:
        model: Any module.
        memo: Objects that the copy shares with the model, by their `id`, as in `copy.deepcopy`.

    Raises:
        ValueError: The `forward` of a module was replaced on the instance. The copy would share it, and go on computing
            with the modules of the original.
    """
    for name, module in model.named_modules():
        replaced = vars(module).get("forward")
        if replaced is not None and not (isinstance(replaced, MethodType) and replaced.__self__ is module):
            raise ValueError(
                f"The forward of {name or 'the model'} ({type(module).__name__}) was replaced on the instance, and a "
                "copy of the model would run the original's modules through it. Write a class with that forward, or "
                "undo it by `del module.forward`."
            )
    with _Detached():
        return copy.deepcopy(model, memo)
