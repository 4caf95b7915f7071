"""What tuning minimises: adversarial training losses, as compared in the paper (arXiv 2410.04577, Table 5).

A loss takes `f`, which maps pixels `[B, C, H, W]` to logits `[B, N]`, the images, the same images attacked, and labels
`[B]`. It returns the value to minimise, and the logits of the clean and of the attacked images where it needs them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate.utils import gather
from torch import Tensor, nn

from timm_nrpm.attacks.gradients import generators
from timm_nrpm.attacks.library import perturb
from timm_nrpm.attacks.threats import Threat
from timm_nrpm.config import TuneConfig
from timm_nrpm.data.ordering import seed_of
from timm_nrpm.nn.pixel_model import PixelModel

Forward = Callable[[Tensor], Tensor]


class Loss(NamedTuple):
    """A loss to minimise, and the logits `[B, N]` of the clean and of the attacked images; None where it needs none."""

    value: Tensor
    clean: Tensor | None
    attacked: Tensor | None


def clean(f: Forward, pixels: Tensor, attacked: Tensor, labels: Tensor) -> Loss:
    """Cross-entropy of the clean images."""
    logits = f(pixels)
    return Loss(F.cross_entropy(logits, labels), logits, None)


def adversarial(f: Forward, pixels: Tensor, attacked: Tensor, labels: Tensor) -> Loss:
    """Cross-entropy of the attacked images: FGSM (arXiv 1412.6572) and PGD-AT (Madry et al., arXiv 1706.06083)."""
    logits = f(attacked)
    return Loss(F.cross_entropy(logits, labels), None, logits)


def both(f: Forward, pixels: Tensor, attacked: Tensor, labels: Tensor) -> Loss:
    """Sum of the cross-entropies of the clean and of the attacked images: adversarial training as it was first proposed
    (Goodfellow et al., arXiv 1412.6572, section 6, times 2), and as in the NRPM authors' code for MNIST."""
    logits, moved = f(pixels), f(attacked)
    return Loss(F.cross_entropy(logits, labels) + F.cross_entropy(moved, labels), logits, moved)


def trades(f: Forward, pixels: Tensor, attacked: Tensor, labels: Tensor, beta: float) -> Loss:
    """`CE(f(x), y) + beta * KL(f(x) || f(x'))` (Zhang et al., arXiv 1901.08573, eq. 5, beta = 1 / lambda)."""
    logits, moved = f(pixels), f(attacked)
    apart = _divergence(logits, moved).mean()
    return Loss(F.cross_entropy(logits, labels) + beta * apart, logits, moved)


def mart(f: Forward, pixels: Tensor, attacked: Tensor, labels: Tensor, beta: float) -> Loss:
    """`BCE(f(x'), y) + beta * KL(f(x) || f(x')) * (1 - p_y(x))` (Wang et al., ICLR 2020, eq. 11).

    The boosted cross-entropy is `-log p_y(x') - log(1 - max of the other p_k(x'))`.
    """
    logits, moved = f(pixels), f(attacked)
    label = labels.unsqueeze(1)
    others = F.softmax(moved, 1).scatter(1, label, 0.0).amax(1)
    boosted = F.cross_entropy(moved, labels, reduction="none") - torch.log1p(-others.clamp(max=1 - 1e-6))
    uncertain = 1 - F.softmax(logits, 1).gather(1, label).squeeze(1)
    return Loss((boosted + beta * _divergence(logits, moved) * uncertain).mean(), logits, moved)


def sat(f: Forward, pixels: Tensor, attacked: Tensor, soften: Forward, beta: float) -> Loss:
    """Self-adaptive training under attack: TRADES with soft labels (Huang et al., arXiv 2002.10319, section 4).

    `soften` maps the clean logits to soft labels `[B, N]`, see :class:`Objective`. The NRPM paper does not say which
    "SAT" it compares with.
    """
    logits, moved = f(pixels), f(attacked)
    targets = soften(logits.detach())
    return Loss(F.cross_entropy(logits, targets) + beta * _divergence(logits, moved).mean(), logits, moved)


def _divergence(logits: Tensor, moved: Tensor) -> Tensor:
    """KL(clean || attacked) of every image, `[B]`."""
    return F.kl_div(F.log_softmax(moved, 1), F.log_softmax(logits, 1), reduction="none", log_target=True).sum(1)


@dataclass(frozen=True)
class _Kind:
    """How an objective attacks.

    Attributes:
        start: Where the attack starts: `"none"` at the image; `"ball"` at random within the threat, as
            :meth:`timm_nrpm.Threat.around` draws it, under L2 and L1 at its edge; `"near"` at a normal step of standard
            deviation 0.001 from the image, in pixel units of [0, 1].
        divergence: Whether the attack maximises the KL divergence from the clean logits, not the cross-entropy.
    """

    start: str = "none"
    divergence: bool = False


KINDS = {
    "clean": _Kind(),
    "fgsm": _Kind(),
    "clean+fgsm": _Kind(),
    "pgd": _Kind("ball"),
    "trades": _Kind("near", divergence=True),
    "mart": _Kind("near"),
    "sat": _Kind("near", divergence=True),
    "awp": _Kind("ball"),
}


class Objective(nn.Module):
    """A model and its training loss, as one module whose forward returns the loss.

    DistributedDataParallel expects one forward per step, however often an objective calls the model inside.

    Args:
        net: The model, which takes pixels in [0, 1].
        config: Settings of the run, which name the objective.
        samples, classes: Numbers of training images and of classes, which SAT needs for its targets.

    Raises:
        ValueError: The objective is AWP, and no weight trains.

    Attributes:
        epoch: Number of the current epoch, from 0; the training loop sets it.
        targets: Soft labels of SAT, `[samples, classes]`; the row of an image is zero until the image was seen.
    """

    targets: Tensor

    def __init__(self, net: PixelModel, config: TuneConfig, samples: int = 0, classes: int = 0) -> None:
        super().__init__()
        self.net, self.config, self.kind = net, config, KINDS[config.objective]
        self.epoch = 0
        self._weights: dict[nn.Parameter, Tensor] = {}  # their values before AWP moved them
        if config.objective == "sat":
            self.register_buffer("targets", torch.zeros(samples, classes, device=net.mean.device, dtype=torch.float32))
        if config.objective == "awp" and not self._perturbed():
            raise ValueError(
                'objective="awp" perturbs the weights that train, and none does: choose another objective for lambda '
                'alone, or paradigm="all", or weights in trainable=.'
            )

    def forward(self, pixels: Tensor, labels: Tensor, rows: Tensor) -> Tensor:
        """The loss, the number of clean images classified right, and that of attacked images, as a tensor `[3]`.

        A number is -1 where the objective does not compute the logits.

        Args:
            pixels, labels: The batch, `[B, C, H, W]` in [0, 1] and `[B]`.
            rows: Indices of the images in the training data, `[B]`.
        """
        attacked = self.attack(pixels, labels, rows)
        if self.config.objective == "awp":
            self._shift_weights(attacked, labels)
        loss = self._loss(pixels, attacked, labels, rows)
        right = [
            torch.full_like(loss.value, -1.0) if logits is None else (logits.argmax(1) == labels).sum().to(loss.value)
            for logits in (loss.clean, loss.attacked)
        ]
        return torch.stack([loss.value, *(count.detach() for count in right)])

    def attack(self, pixels: Tensor, labels: Tensor, rows: Tensor) -> Tensor:
        """The attacked images to train on, `[B, C, H, W]`, each independent of the rest of the batch."""
        c = self.config
        if c.objective == "clean" or c.eps == 0:
            return pixels
        return perturb(
            self.net,
            pixels,
            labels,
            self._start(pixels, rows),
            Threat(c.norm, c.eps),
            steps=c.attack_steps,
            step_size=c.attack_step_size,
            gradient=c.gradient,
            divergence=self.kind.divergence,
            turns=rows + self.epoch,
        )

    def _start(self, pixels: Tensor, rows: Tensor) -> Tensor:
        """The perturbation `[B, C, H, W]` that the attack starts from."""
        if self.kind.start == "none":
            return torch.zeros_like(pixels)
        # Each image has its own seed, so its noise is the same however many processes share a batch.
        draws = generators([seed_of(self.config.seed, self.epoch, row) for row in rows.tolist()])
        if self.kind.start == "ball":
            return Threat(self.config.norm, self.config.eps).around(pixels, draws) - pixels
        return 0.001 * torch.stack([torch.randn(pixels.shape[1:], generator=g) for g in draws]).to(pixels)

    def _loss(self, pixels: Tensor, attacked: Tensor, labels: Tensor, rows: Tensor) -> Loss:
        """The loss of the objective."""
        c, images = self.config, (pixels, attacked)
        if c.objective == "clean":
            return clean(self.net, *images, labels)
        if c.objective == "clean+fgsm":
            return both(self.net, *images, labels)
        if c.objective == "trades":
            return trades(self.net, *images, labels, c.beta)
        if c.objective == "mart":
            return mart(self.net, *images, labels, c.beta)
        if c.objective == "sat":
            return sat(self.net, *images, lambda logits: self.soften(logits, labels, rows), c.beta)
        return adversarial(self.net, *images, labels)

    @torch.no_grad()
    def soften(self, logits: Tensor, labels: Tensor, rows: Tensor) -> Tensor:
        """SAT's targets, `[B, N]`: the labels, into which predictions are mixed from epoch `target_start` on.

        Every process keeps all targets, since it sees other images in the next epoch.
        """
        hard = F.one_hot(labels, self.targets.shape[1]).to(self.targets)
        kept = self.targets[rows]
        targets = torch.where(kept.sum(1, keepdim=True) > 0, kept, hard)
        if self.epoch >= self.config.target_start:
            targets = torch.lerp(F.softmax(logits.float(), 1), targets, self.config.target_momentum)
        rows_of_all, targets_of_all = gather((rows, targets))
        self.targets[rows_of_all] = targets_of_all
        return targets

    def _perturbed(self) -> list[nn.Parameter]:
        """The weights that AWP perturbs: those that train and have several dimensions."""
        return [p for p in self.net.parameters() if p.requires_grad and p.ndim > 1]

    def _shift_weights(self, attacked: Tensor, labels: Tensor) -> None:
        """AWP: move every weight that trains by `weight_perturbation` of its norm up the loss, until `settle` is called
        (Wu et al., arXiv 2004.05884, eq. 7-8)."""
        weights = self._perturbed()
        before = [b.clone() for b in self.net.buffers()]  # this pass must not change the statistics of BatchNorm
        loss = adversarial(self.net, attacked, attacked, labels).value
        slopes = torch.autograd.grad(loss, weights, allow_unused=True)
        with torch.no_grad():
            for buffer, kept in zip(self.net.buffers(), before, strict=True):
                buffer.copy_(kept)
            for weight, slope in zip(weights, slopes, strict=True):
                if slope is None:
                    continue
                if dist.is_initialized():  # all processes move the weights in the same way
                    dist.all_reduce(slope)
                self._weights[weight] = weight.detach().clone()
                scale = self.config.weight_perturbation * weight.norm() / (slope.norm() + 1e-20)
                weight.add_(slope.nan_to_num(0.0) * scale.nan_to_num(0.0))
        torch.clear_autocast_cache()  # it holds the weights from before the move

    @torch.no_grad()
    def settle(self) -> None:
        """Restore the weights that AWP moved, bit for bit. Call it after backward, whether or not that succeeded."""
        for weight, kept in self._weights.items():
            weight.copy_(kept)
        self._weights.clear()
