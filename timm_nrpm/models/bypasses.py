"""Layers whose weight a model reads past the layer, unless a switch of the model has it call the layer.

The attentions of BEiT, EVA and Swin V2 join three biases and give them to the linear map with the weight of their layer
`qkv`. With timm's own switch they call the layer and add the biases to what it gives. That rounds differently, so the
switch is on only while the layer is not plain.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from timm_nrpm.nn.layers import Reprogrammed

SWITCH, LAYER = "qkv_bias_separate", "qkv"


@contextmanager
def opened(model: nn.Module) -> Iterator[None]:
    """Have the model call these layers within the context."""
    closed = [module for module in model.modules() if getattr(module, SWITCH, None) is False]
    for module in closed:
        setattr(module, SWITCH, True)
    try:
        yield
    finally:
        for module in closed:
            setattr(module, SWITCH, False)


def follow_(model: nn.Module) -> None:
    """Have the switches of all reprogrammed layers follow whether these are plain."""
    for module in model.modules():
        switched = getattr(module, SWITCH, None) is False and isinstance(getattr(module, LAYER, None), Reprogrammed)
        if switched:
            module.register_forward_pre_hook(_follow)


def unfollow_(module: nn.Module) -> None:
    """Undo :func:`follow_` for one module."""
    hooks = module._forward_pre_hooks
    for number in [number for number, hook in hooks.items() if hook is _follow]:
        del hooks[number]
        setattr(module, SWITCH, False)


def _follow(module: nn.Module, _: Any) -> None:
    setattr(module, SWITCH, not getattr(module, LAYER).is_plain())
