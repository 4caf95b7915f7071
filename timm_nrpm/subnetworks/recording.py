"""What the layers of a network receive: the output of the layer before, with all that comes in between."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from timm_nrpm.models.work import first_input


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

    Raises:
        ValueError: In a forward, a layer receives what is not divided by images.
    """
    found: dict[str, Tensor] = {}
    modules = dict(model.named_modules())
    batch = [0]

    def count(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        batch[0] = len(first_input(args, kwargs))

    def hook(name: str) -> Callable[..., None]:
        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = first_input(args, kwargs).detach().float()
            if len(x) % batch[0]:
                raise ValueError(
                    f"{name} receives {list(x.shape)} for {batch[0]} images: its first dimension is not that of "
                    "images, so what it receives of each image is unknown."
                )
            if isinstance(module, nn.modules.conv._ConvNd):
                x = x.flatten(2).transpose(1, 2)
            # Windows of an image, as in Swin, stand in a row.
            found[name] = x.reshape(batch[0], -1, x.shape[-1]).mean(1) if pooled else x.reshape(batch[0], -1)

        return note

    handles = [model.register_forward_pre_hook(count, with_kwargs=True)]
    handles += [modules[name].register_forward_pre_hook(hook(name), with_kwargs=True) for name in names]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
