"""The mode that a model is in meanwhile, and whether gradients go through it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """`model.eval()` inside, and every module's own training mode again afterwards."""
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def check_gradients(model: nn.Module) -> None:
    """Raise a ValueError for a model through whose weights no gradient goes."""
    if any(p.is_inference() for p in model.parameters()):
        raise ValueError(
            f"The weights of this {type(model).__name__} were made under torch.inference_mode, and no gradient goes "
            "through them: make or load the model outside of it."
        )


@contextmanager
def attackable(model: nn.Module) -> Iterator[None]:
    """`evaluating`, and no Parameter takes a gradient: an attack needs that of the pixels alone.

    Raises:
        ValueError: Weights made under `torch.inference_mode`, through which no gradient goes.
    """
    check_gradients(model)
    learning = [p for p in model.parameters() if p.requires_grad]
    with torch.inference_mode(False), evaluating(model), torch.enable_grad():
        for parameter in learning:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in learning:
                parameter.requires_grad_(True)
