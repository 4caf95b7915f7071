"""Attacks on pixels in [0, 1]: torchattacks', given the model whose gradient they follow, and our own.

The only importer of torchattacks, and only where it is called: it takes SciPy and a second to import.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from timm_nrpm.reprogramming import attackable, plain_copy, reprogrammed_layers


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

    def normalise(self, pixels: Tensor) -> Tensor:
        """Pixels as the model takes them."""
        return ((pixels - self.mean) / self.std).to(self.dtype)

    def forward(self, pixels: Tensor) -> Tensor:
        if len(self.mean) not in (1, pixels.shape[1]):
            raise ValueError(
                f"The images have {pixels.shape[1]} channels, and the model's normalisation has {len(self.mean)}: "
                "give the right one as mean= and std=."
            )
        if pixels.requires_grad:
            pixels.register_hook(self._look)
        return self.model(self.normalise(pixels)).to(pixels.dtype)

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
    import torchattacks

    return Attack(name, torchattacks.FGSM(model, eps=eps))


def pgd(name: str, model: nn.Module, eps: float, steps: int, seed: int) -> Attack:
    """Projected gradient ascent in the Linf ball, random start, step `eps / 4` (Madry et al., arXiv 1706.06083).

    The paper's 2/255 at eps = 8/255 is `eps / 4`.
    """
    import torchattacks

    attack = torchattacks.PGD(model, eps=eps, alpha=eps / 4, steps=steps, random_start=True)

    def run(pixels: Tensor, labels: Tensor) -> Tensor:
        # torchattacks draws from the global generator: seed it for this call alone.
        with torch.random.fork_rng(devices=[pixels.device] if pixels.is_cuda else []):
            torch.manual_seed(seed)
            return attack(pixels, labels)

    return Attack(name, run)


@contextmanager
def gradient_source(net: PixelModel, gradient: str) -> Iterator[PixelModel]:
    """The model whose gradient an attack follows: `net` with its "own" or, as "bpda", that of its linear maps; or the
    "plain" model, lambda = 1 with its statistics from before calibration."""
    if gradient == "plain":
        source = PixelModel(plain_copy(net.model))
        source.mean, source.std = net.mean, net.std
        yield source.eval()
        return
    layers = reprogrammed_layers(net).values() if gradient == "bpda" else ()
    for layer in layers:
        layer.linear_backward = True
    try:
        yield net
    finally:
        for layer in layers:
            layer.linear_backward = False


def perturb(
    net: PixelModel,
    pixels: Tensor,
    labels: Tensor,
    start: Tensor,
    *,
    eps: float,
    steps: int,
    step_size: float,
    gradient: str = "own",
    divergence: bool = False,
    turns: Tensor | None = None,
) -> Tensor:
    """Examples to train on: projected gradient ascent in the Linf ball (Madry et al., arXiv 1706.06083).

    torchattacks' attacks draw their start from the global generator, so that two processes would start elsewhere than
    one; and they know neither the linear gradient nor mixtures.

    Args:
        net: In any mode; the attack sees it in evaluation mode, and leaves it as it was.
        pixels, labels: `[B, C, H, W]` in [0, 1], and `[B]`.
        start: What is added to the pixels at first, `[B, C, H, W]`.
        eps, step_size: In pixel units.
        gradient: `"own"`, `"bpda"`, `"plain"`, or `"mixture"`, in which an image follows one of these.
        divergence: Whether to climb the Kullback-Leibler divergence from the clean prediction, as TRADES does, rather
            than the cross-entropy of the labels.
        turns: Of a mixture, integers `[B]`: an image whose turn is t follows the (t mod 3)-th; by default its place.

    Returns:
        Pixels `[B, C, H, W]` in [0, 1], at most `eps` from `pixels`. A gradient that is not a number moves nothing.
    """
    kinds = ("own", "bpda", "plain")
    if gradient == "mixture":
        attacked = torch.empty_like(pixels)
        which = (torch.arange(len(pixels), device=pixels.device) if turns is None else turns) % len(kinds)
        for i, kind in enumerate(kinds):
            rows = (which == i).nonzero().squeeze(1)
            if len(rows):
                some = (pixels[rows], labels[rows], start[rows])
                options = {"eps": eps, "steps": steps, "step_size": step_size}
                attacked[rows] = perturb(net, *some, **options, gradient=kind, divergence=divergence)  # type: ignore[arg-type]
        return attacked
    with attackable(net), gradient_source(net, gradient) as source:
        with torch.no_grad():
            clean = F.log_softmax(source(pixels), 1) if divergence else None
        attacked = (pixels + start).clamp(0, 1)
        for _ in range(steps):
            attacked = attacked.detach().requires_grad_()
            logits = source(attacked)
            if clean is None:
                loss = F.cross_entropy(logits, labels, reduction="sum")
            else:
                loss = F.kl_div(F.log_softmax(logits, 1), clean, reduction="sum", log_target=True)
            (slope,) = torch.autograd.grad(loss, attacked)
            with torch.no_grad():
                moved = attacked + step_size * slope.nan_to_num(0.0).sign()
                attacked = torch.clamp(moved, pixels - eps, pixels + eps).clamp(0, 1)
    return attacked.detach()
