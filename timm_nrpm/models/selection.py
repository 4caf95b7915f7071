"""Which layers of a model are reprogrammed, and with which lambda."""

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


def call_order(model: nn.Module, layers: Mapping[str, nn.Module], example: Tensor | None) -> list[str] | None:
    """Names of the layers that a forward calls, first call first; None if there is no input to run it on."""
    like = next(model.parameters(), None)
    given = example is not None
    if example is None:
        if like is None or not hasattr(model, "pretrained_cfg"):
            return None
        size = get_model_input_config(model)["input_size"]  # of this model, not of its pretrained weights
        example = torch.zeros(1, *size, device=like.device, dtype=like.dtype)
    order: dict[str, None] = {}

    def note(name: str) -> Callable[..., None]:
        return lambda *_: order.setdefault(name)

    hooks = [m.register_forward_pre_hook(note(name)) for name, m in layers.items()]
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
            "cannot be told apart. Give an input it takes as example=.",
            ReprogrammingWarning,
            stacklevel=3,
        )
        return None
    finally:
        for hook in hooks:
            hook.remove()
    return list(order)


def select(layers: dict[str, nn.Module], config: NRPMConfig, skipped: Mapping[str, str]) -> dict[str, nn.Module]:
    """The layers that `config.layers` asks for."""
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
            found = fnmatch.filter(layers, pattern)
            if not found:
                raise ValueError(_no_match(f"layers={pattern!r}", pattern, layers, skipped))
            names.update(found)
    if not names:
        raise ValueError(
            f"layers={chosen!r} selects none of the {len(layers)} layers that can be reprogrammed"
            + (f" ({', '.join(list(layers)[:3])}, ...)." if layers else f": {_reasons(skipped)}.")
        )
    return {name: module for name, module in layers.items() if name in names}


def assign(layers: Mapping[str, nn.Module], config: NRPMConfig) -> dict[str, float]:
    """Lambda for each of `layers`."""
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
        found = [pattern] if pattern in layers else fnmatch.filter(layers, pattern)
        if not found:
            raise ValueError(_no_match(f"lam[{pattern!r}]", pattern, layers, {}))
        values |= dict.fromkeys(found, value)
    missing = [name for name in layers if name not in values]
    if missing:
        raise ValueError(f"lam names no value for {len(missing)} of the chosen layers: {', '.join(missing[:5])}.")
    return values


def _no_match(what: str, pattern: str, layers: Mapping[str, Any], skipped: Mapping[str, str]) -> str:
    refused = fnmatch.filter(skipped, pattern)
    if refused:
        return f"{what} matches only layers that cannot be reprogrammed: {_reasons({n: skipped[n] for n in refused})}."
    if any(name.startswith(f"{pattern}.") for name in layers):
        return f"{what} matches no layer itself: write {pattern + '.*'!r} for the layers inside."
    near = difflib.get_close_matches(pattern, layers, n=3, cutoff=0.3) or list(layers)[:3]
    return f"{what} matches none of the {len(layers)} layers that can be chosen. Near names: {', '.join(near)}."


def _reasons(skipped: Mapping[str, str]) -> str:
    return "; ".join(f"{name}: {why}" for name, why in list(skipped.items())[:3]) or "it has no linear map"
