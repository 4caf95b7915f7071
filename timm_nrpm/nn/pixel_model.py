"""A model that takes pixels in [0, 1] and normalises inside: what everything that measures a model works on."""

from __future__ import annotations

import math
from itertools import chain
from typing import TypedDict

import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn


class Normalisation(TypedDict):
    """Mean and standard deviation of each channel, as arguments of the library's functions."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


class PixelModel(nn.Module):
    """A model that takes pixels in [0, 1] and normalises inside, so that an attack's eps is in pixel units.

    Args:
        model: A classifier of normalised images `[B, C, H, W]`.
        mean, std: The normalisation, one number a channel; by default what timm says of the model, and (0, 1) if it
            says nothing.

    Attributes:
        non_finite: Whether a gradient of the pixels was ever not a number, or infinite. An attack that takes its sign
            then stands still there, and says nothing of it.
        forwards, backwards: How many images went through, and how many gradients came back.

    Raises:
        ValueError: A normalisation that is none of pixels in [0, 1], images with another number of channels, or a model
            that gives no logits of two classes at least.

    Example:
        >>> logits = PixelModel(model)(pixels)
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, model: nn.Module, mean: tuple[float, ...] | None = None, std: tuple[float, ...] | None = None
    ) -> None:
        super().__init__()
        if getattr(model, "num_classes", None) == 0:
            raise ValueError(
                f"This {type(model).__name__} has num_classes=0: it gives features, and no image is right or wrong by "
                "them. Create it with as many classes as the labels have."
            )
        data = resolve_model_data_config(model) if hasattr(model, "pretrained_cfg") else {"mean": (0.0,), "std": (1.0,)}
        floating = (t for t in chain(model.parameters(), model.buffers()) if t.is_floating_point())
        like = next(chain(floating, [torch.zeros((), dtype=torch.float32)]))
        self.model, self.dtype = model, like.dtype
        self.non_finite = False
        self.forwards = self.backwards = 0
        for name, given in (("mean", mean), ("std", std)):
            values = [float(value) for value in (data[name] if given is None else given)]
            # A mean outside [0, 1], or a deviation above 1, is one of pixels up to 255.
            low = 0.0 if name == "mean" else math.ulp(0.0)
            if not values or not all(low <= value <= 1 for value in values):
                raise ValueError(
                    f"{name}={tuple(values)} normalises no pixels in [0, 1]: give one number a channel, "
                    f"{'from 0 to 1' if name == 'mean' else 'above 0 and up to 1'}, such as 123.7 / 255 for 123.7."
                )
            values_of = torch.tensor(values, dtype=torch.float32, device=like.device)
            self.register_buffer(name, values_of.view(-1, 1, 1))

    def normalise(self, pixels: Tensor) -> Tensor:
        """Pixels as the model takes them."""
        return ((pixels - self.mean) / self.std).to(self.dtype)

    def forward(self, pixels: Tensor) -> Tensor:
        if len(self.mean) not in (1, pixels.shape[1]):
            raise ValueError(
                f"The images have {pixels.shape[1]} channels, and the model's normalisation has {len(self.mean)}: "
                "give the right one as mean= and std=."
            )
        self.forwards += len(pixels)
        if pixels.requires_grad:
            pixels.register_hook(self._look)
        logits = self.model(self.normalise(pixels))
        fit = isinstance(logits, Tensor) and logits.ndim == 2 and len(logits) == len(pixels) and logits.shape[1] > 1
        if not fit:
            said = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(
                f"The model gives {said} for {len(pixels)} images: give a classifier, whose logits are [B, N], of two "
                "classes at least, since one alone is never wrong."
            )
        if pixels.requires_grad and torch.is_grad_enabled() and not logits.requires_grad:
            logits = logits + 0 * pixels.flatten(1).sum(1, keepdim=True)  # cut off from the pixels: a gradient of zero
        return logits.to(pixels.dtype)

    def normalisation(self) -> Normalisation:
        """The numbers of each channel."""
        return {"mean": tuple(self.mean.flatten().tolist()), "std": tuple(self.std.flatten().tolist())}

    def _look(self, gradient: Tensor) -> None:
        self.backwards += len(gradient)
        self.non_finite = self.non_finite or not bool(gradient.isfinite().all())


def alike(model: nn.Module, net: PixelModel) -> PixelModel:
    """`model` on pixels, normalised as `net` does it, in evaluation mode."""
    other = PixelModel(model, (0.0,), (1.0,))
    other.mean, other.std = net.mean, net.std
    return other.eval()
