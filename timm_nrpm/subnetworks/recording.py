"""What the layers of a network receive: the output of the layer before, with all that comes in between."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from timm_nrpm.models.modes import evaluating


@contextmanager
def received(model: nn.Module, names: Iterable[str], *, pooled: bool) -> Iterator[Mapping[str, Tensor]]:
    """Record what layers receive in the last forward: the output of the layer before each, with its normalisation, its
    activation and the residual sum.

    Args:
        model: The network.
        names: Names of convolutional or linear layers.
        pooled: Whether to take the mean over all places of an image or over all tokens, one number for each channel.

    Yields:
        A mapping from names to `[B, C]` if pooled, and else `[B, N]` of all N values, after each forward.
    """
    found: dict[str, Tensor] = {}
    modules = dict(model.named_modules())

    def hook(name: str) -> Callable[..., None]:
        def note(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].detach().float()
            if not pooled:
                found[name] = x.flatten(1)
            elif isinstance(module, nn.modules.conv._ConvNd):
                found[name] = x.flatten(2).mean(2)
            else:
                found[name] = x.reshape(len(x), -1, x.shape[-1]).mean(1)

        return note

    handles = [modules[name].register_forward_pre_hook(hook(name)) for name in names]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def products(model: nn.Module, names: Iterable[str], example: Tensor) -> dict[str, int]:
    """Number of products of a weight and an input that layers add up for one image.

    Args:
        model: The network, which runs once.
        names: Names of convolutional or linear layers.
        example: An input of the network `[1, ...]`.

    Example:
        >>> products(plain, ["fc"], torch.zeros(1, 1, 8, 8))
        {'fc': 320}
    """
    found: dict[str, int] = {}
    modules = dict(model.named_modules())

    def hook(name: str) -> Callable[..., None]:
        def note(module: nn.Module, _: object, output: Tensor) -> None:
            weight: Tensor = module.weight  # type: ignore[assignment]
            found[name] = found.get(name, 0) + output[0].numel() * weight[0].numel()

        return note

    handles = [modules[name].register_forward_hook(hook(name)) for name in names]
    try:
        with evaluating(model), torch.no_grad():
            model(example)
    finally:
        for handle in handles:
            handle.remove()
    return found
