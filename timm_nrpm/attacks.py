"""Attacks on pixels in [0, 1]: torchattacks', given the model whose gradient they follow.

The only importer of torchattacks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torchattacks
from timm.data import resolve_model_data_config
from torch import Tensor, nn


class PixelModel(nn.Module):
    """A model that takes pixels in [0, 1] and normalises inside, so that an attack's eps is in pixel units.

    Args:
        model: Takes normalised images `[B, C, H, W]`.
        mean, std: One number a channel; by default what timm says of the model, and (0, 1) if it says nothing.

    Attributes:
        non_finite: Whether a gradient of the pixels was ever not a number, or infinite. An attack that takes its sign
            then stands still there, and says nothing of it.

    Raises:
        ValueError: Images with another number of channels than the normalisation.

    Example:
        >>> logits = PixelModel(model)(pixels)
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, model: nn.Module, mean: tuple[float, ...] | None = None, std: tuple[float, ...] | None = None
    ) -> None:
        super().__init__()
        data = resolve_model_data_config(model) if hasattr(model, "pretrained_cfg") else {"mean": (0.0,), "std": (1.0,)}
        like = next(model.parameters())
        self.model, self.dtype = model, like.dtype
        self.non_finite = False
        for name, given in (("mean", mean), ("std", std)):
            values = torch.tensor(data[name] if given is None else given, device=like.device)
            self.register_buffer(name, values.view(-1, 1, 1))

    def forward(self, pixels: Tensor) -> Tensor:
        if len(self.mean) not in (1, pixels.shape[1]):
            raise ValueError(
                f"The images have {pixels.shape[1]} channels, and the model's normalisation has {len(self.mean)}: "
                "give the right one as mean= and std=."
            )
        if pixels.requires_grad:
            pixels.register_hook(self._look)
        return self.model(((pixels - self.mean) / self.std).to(self.dtype)).to(pixels.dtype)

    def _look(self, gradient: Tensor) -> None:
        self.non_finite = self.non_finite or not bool(gradient.isfinite().all())


@dataclass(frozen=True)
class Attack:
    """A named attack.

    Attributes:
        name: What a report calls it.
        run: Pixels and labels to attacked pixels, made on whichever model the attack reads gradients from.
    """

    name: str
    run: Callable[[Tensor, Tensor], Tensor]


def fgsm(name: str, model: nn.Module, eps: float) -> Attack:
    """One signed gradient step of size `eps` (Goodfellow et al., arXiv 1412.6572)."""
    return Attack(name, torchattacks.FGSM(model, eps=eps))


def pgd(name: str, model: nn.Module, eps: float, steps: int, seed: int) -> Attack:
    """Projected gradient ascent in the Linf ball, random start, step `eps / 4` (Madry et al., arXiv 1706.06083).

    The paper's 2/255 at eps = 8/255 is `eps / 4`.
    """
    attack = torchattacks.PGD(model, eps=eps, alpha=eps / 4, steps=steps, random_start=True)

    def run(pixels: Tensor, labels: Tensor) -> Tensor:
        # torchattacks draws from the global generator: seed it for this call alone.
        with torch.random.fork_rng(devices=[pixels.device] if pixels.is_cuda else []):
            torch.manual_seed(seed)
            return attack(pixels, labels)

    return Attack(name, run)
