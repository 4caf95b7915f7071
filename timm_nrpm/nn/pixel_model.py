"""A model that takes pixels in [0, 1] and normalises them itself, which every measurement of a model uses."""

from __future__ import annotations

import math
from itertools import chain
from typing import TypedDict

import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn


class Normalisation(TypedDict):
    """Mean and standard deviation of each channel, as keyword arguments of this package's functions."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


class PixelModel(nn.Module):
    """A model that takes pixels in [0, 1] and normalises them itself, so that an attack's eps is in pixel units.

    Args:
        model: A classifier of normalised images `[B, C, H, W]`.
        mean, std: Mean and standard deviation, one number per channel; by default those in timm's config of the model,
            or 0 and 1 if it has none.

    Attributes:
        non_finite: Whether any gradient of the pixels was ever NaN or infinite. An attack that takes its sign does not
            move there, and does not report it.
        forwards, backwards: Number of images in all forward passes, and in all backward passes to the pixels.

    Raises:
        ValueError: The normalisation cannot be that of pixels in [0, 1], the images have another number of channels, or
            the model does not give logits of at least two classes.

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
                f"This {type(model).__name__} has num_classes=0: it gives features and no logits. Create it with as "
                "many classes as the labels have."
            )
        data = resolve_model_data_config(model) if hasattr(model, "pretrained_cfg") else {"mean": (0.0,), "std": (1.0,)}
        floating = (t for t in chain(model.parameters(), model.buffers()) if t.is_floating_point())
        like = next(chain(floating, [torch.zeros((), dtype=torch.float32)]))
        self.model = model
        self.non_finite = False
        self.forwards = self.backwards = 0
        for name, argument in (("mean", mean), ("std", std)):
            values = [float(value) for value in (data[name] if argument is None else argument)]
            # A mean outside [0, 1], or a deviation above 1, belongs to pixels up to 255.
            low = 0.0 if name == "mean" else math.ulp(0.0)
            if not values or not all(low <= value <= 1 for value in values):
                raise ValueError(
                    f"{name}={tuple(values)} normalises no pixels in [0, 1]: give one number per channel, "
                    f"{'from 0 to 1' if name == 'mean' else 'above 0 and up to 1'}, such as 123.7 / 255 for 123.7."
                )
            buffer = torch.tensor(values, dtype=torch.float32, device=like.device)
            self.register_buffer(name, buffer.view(-1, 1, 1))

    def normalise(self, pixels: Tensor) -> Tensor:
        """The pixels normalised, in the dtype that the model has now."""
        floating = (t for t in chain(self.model.parameters(), self.model.buffers()) if t.is_floating_point())
        return ((pixels - self.mean) / self.std).to(next(floating, pixels).dtype)

    def forward(self, pixels: Tensor) -> Tensor:
        if len(self.mean) not in (1, pixels.shape[1]):
            raise ValueError(
                f"The images have {pixels.shape[1]} channels, and the model's normalisation has {len(self.mean)}: "
                "give one number per channel as mean= and std=."
            )
        if torch.compiler.is_compiling():  # a graph, which counts nothing and may have any number of images
            logits: Tensor = self.model(self.normalise(pixels))
            return logits.to(pixels.dtype)
        self.forwards += len(pixels)
        if pixels.requires_grad:
            pixels.register_hook(self._record_gradient)
        logits = self.model(self.normalise(pixels))
        valid = isinstance(logits, Tensor) and logits.ndim == 2 and len(logits) == len(pixels) and logits.shape[1] > 1
        if not valid:
            output = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(
                f"The model gives {output} for {len(pixels)} images: give a classifier whose logits are [B, N], of two "
                "classes at least, since a single class is never wrong."
            )
        if pixels.requires_grad and torch.is_grad_enabled() and not logits.requires_grad:
            logits = logits + 0 * pixels.flatten(1).sum(1, keepdim=True)  # a gradient of 0
        return logits.to(pixels.dtype)

    def normalisation(self) -> Normalisation:
        """Mean and standard deviation of each channel, as plain numbers."""
        return {"mean": tuple(self.mean.flatten().tolist()), "std": tuple(self.std.flatten().tolist())}

    def _record_gradient(self, gradient: Tensor) -> None:
        self.backwards += len(gradient)
        self.non_finite = self.non_finite or not bool(gradient.isfinite().all())


def alike(model: nn.Module, net: PixelModel) -> PixelModel:
    """`model` as a PixelModel with the normalisation of `net`, in evaluation mode."""
    other = PixelModel(model, (0.0,), (1.0,))
    other.mean, other.std = net.mean, net.std
    return other.eval()
