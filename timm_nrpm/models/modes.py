"""Temporary modes of a model, and a check that gradients pass through it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put `model` into evaluation mode, and restore each module's own mode afterwards."""
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def check_gradients(model: nn.Module) -> None:
    """Raise a ValueError if no gradient can pass through the weights of `model`."""
    if any(p.is_inference() for p in model.parameters()):
        raise ValueError(
            f"The weights of this {type(model).__name__} were made under torch.inference_mode, and no gradient goes "
            "through them: make or load the model outside of it."
        )


@contextmanager
def attackable(model: nn.Module) -> Iterator[None]:
    """Put `model` into evaluation mode and freeze its Parameters, since an attack needs only the gradient of pixels.

    Raises:
        ValueError: The weights were made under `torch.inference_mode`, so that no gradient passes through them.
    """
    check_gradients(model)
    trainable = [p for p in model.parameters() if p.requires_grad]
    with torch.inference_mode(False), evaluating(model), torch.enable_grad():
        for parameter in trainable:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in trainable:
                parameter.requires_grad_(True)
