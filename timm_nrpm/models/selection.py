"""The choice of the layers that are reprogrammed, and of the lambda of each."""

from __future__ import annotations

import difflib
import fnmatch
import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from timm.models import get_model_input_config
from torch import Tensor, nn

from timm_nrpm.config import NRPMConfig
from timm_nrpm.errors import ReprogrammingWarning
from timm_nrpm.models.modes import evaluating


def example_of(model: nn.Module) -> Tensor | None:
    """An image of zeros `[1, C, H, W]` of the size that a timm model takes; None for a model that is not timm's."""
    parameter = next(model.parameters(), None)
    if parameter is None or not hasattr(model, "pretrained_cfg"):
        return None
    size = get_model_input_config(model)["input_size"]  # of this model, not of its pretrained weights
    return torch.zeros(1, *size, device=parameter.device, dtype=parameter.dtype)


def call_order(model: nn.Module, layers: Mapping[str, nn.Module], example: Tensor | None) -> list[str] | None:
    """Names of the layers that a forward pass calls, in the order of their first calls.

    Args:
        model: The model, which is run once.
        layers: Layers to look for, by name.
        example: Input of the model; by default an image of zeros for a timm model.

    Returns:
        The names, or None if there is no input that the model runs on.

    Raises:
        ValueError: The model does not run on `example`.
    """
    given = example is not None
    example = example_of(model) if example is None else example
    if example is None:
        return None
    order: dict[str, None] = {}

    def record_call(name: str) -> Callable[..., None]:
        return lambda *_: order.setdefault(name)

    hooks = [m.register_forward_pre_hook(record_call(name)) for name, m in layers.items()]
    try:
        with evaluating(model), torch.no_grad():
            model(example)
    except Exception as error:
        if given:
            raise ValueError(
                f"The model does not run on the example given, {list(example.shape)} of {example.dtype}: {error}"
            ) from error
        warnings.warn(
            f"The model does not run on an image of zeros, {list(example.shape)} ({error}): layers that it never calls "
            "cannot be detected. Give an input that it takes as example=.",
            ReprogrammingWarning,
            stacklevel=5,
        )
        return None
    finally:
        for hook in hooks:
            hook.remove()
    return list(order)


def select(layers: dict[str, nn.Module], config: NRPMConfig, skipped: Mapping[str, str]) -> dict[str, nn.Module]:
    """The layers that `config.layers` selects, by name.

    Args:
        layers: All layers that can be reprogrammed, by name.
        config: The settings.
        skipped: Reasons why other layers cannot be reprogrammed, by name.

    Raises:
        ValueError: `config.layers` is not understood, or selects nothing.
    """
    chosen = config.layers
    if chosen is None:
        names = set(layers)
    elif callable(chosen):
        names = {name for name, module in layers.items() if chosen(name, module)}
    elif isinstance(chosen, str) and chosen.startswith("first:"):
        count = re.fullmatch(r"first:([1-9]\d*)", chosen)
        if count is None:
            raise ValueError(f'layers={chosen!r} is not understood: write "first:4" for the first four layers.')
        names = set(list(layers)[: int(count[1])])
    else:
        names = set()
        for pattern in [chosen] if isinstance(chosen, str) else chosen:
            matches = fnmatch.filter(layers, pattern)
            if not matches:
                raise ValueError(_no_match(f"layers={pattern!r}", pattern, layers, skipped))
            names.update(matches)
    if not names:
        raise ValueError(
            f"layers={chosen!r} selects none of the {len(layers)} layers that can be reprogrammed"
            + (f" ({', '.join(list(layers)[:3])}, ...)." if layers else f": {_reasons(skipped)}.")
        )
    return {name: module for name, module in layers.items() if name in names}


def assign(layers: Mapping[str, nn.Module], config: NRPMConfig) -> dict[str, float]:
    """Lambda of each of `layers` by name, as `config.lam` gives it; a ValueError if it does not fit them."""
    lam = config.lam
    if isinstance(lam, float):
        return dict.fromkeys(layers, lam)
    if isinstance(lam, tuple):
        if len(lam) != len(layers):
            raise ValueError(f"lam has {len(lam)} numbers and {len(layers)} layers are chosen: {', '.join(layers)}.")
        return dict(zip(layers, lam, strict=True))
    assert isinstance(lam, Mapping)
    values: dict[str, float] = {}
    for pattern, value in sorted(lam.items(), key=lambda item: item[0] in layers):  # a layer's own name beats a glob
        matches = [pattern] if pattern in layers else fnmatch.filter(layers, pattern)
        if not matches:
            raise ValueError(_no_match(f"lam[{pattern!r}]", pattern, layers, {}))
        values |= dict.fromkeys(matches, value)
    missing = [name for name in layers if name not in values]
    if missing:
        raise ValueError(f"lam names no value for {len(missing)} of the chosen layers: {', '.join(missing[:5])}.")
    return values


def _no_match(argument: str, pattern: str, layers: Mapping[str, Any], skipped: Mapping[str, str]) -> str:
    """The error message for an argument whose pattern matches none of `layers`."""
    refused = fnmatch.filter(skipped, pattern)
    if refused:
        reasons = _reasons({name: skipped[name] for name in refused})
        return f"{argument} matches only layers that cannot be reprogrammed: {reasons}."
    if any(name.startswith(f"{pattern}.") for name in layers):
        return f"{argument} matches no layer itself: write {pattern + '.*'!r} for the layers inside."
    near = difflib.get_close_matches(pattern, layers, n=3, cutoff=0.3) or list(layers)[:3]
    return f"{argument} matches none of the {len(layers)} layers that can be chosen. Near names: {', '.join(near)}."


def _reasons(skipped: Mapping[str, str]) -> str:
    """Why the first three layers of `skipped` cannot be reprogrammed, in words."""
    return "; ".join(f"{name}: {why}" for name, why in list(skipped.items())[:3]) or "it has no linear map"
