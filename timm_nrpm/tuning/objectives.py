"""How a model is tuned: each objective attacks the images in its way and minimises one of the losses.

An objective is a row of :data:`KINDS`; its loss is a function in :mod:`timm_nrpm.tuning.losses`.
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
from timm_nrpm.attacks.library import Distance, perturb
from timm_nrpm.attacks.threats import Threat
from timm_nrpm.config import TuneConfig
from timm_nrpm.data.ordering import seed_of
from timm_nrpm.jobs.processes import with_others
from timm_nrpm.nn.pixel_model import PixelModel
from timm_nrpm.nn.wrappers import copied
from timm_nrpm.tuning import losses
from timm_nrpm.tuning.losses import Loss


class Images(NamedTuple):
    """A batch of training images.

    Attributes:
        pixels: The images, `[B, C, H, W]` in [0, 1].
        attacked: The same images attacked.
        labels: Their classes, `[B]`.
        rows: Their indices in the training data, `[B]`.
    """

    pixels: Tensor
    attacked: Tensor
    labels: Tensor
    rows: Tensor


class Objective(nn.Module):
    """A model and its training loss, as one module whose forward returns the loss.

    DistributedDataParallel expects one forward per step, however often an objective calls the model inside.

    Args:
        net: The model, which takes pixels in [0, 1].
        config: Settings of the run, which name the objective.
        samples, classes: Numbers of training images and of classes, of which SAT keeps targets, and SRAT counts.
        teacher: The teacher of the objective `"teacher"`, of which a copy is taken; None for any other objective.

    Raises:
        ValueError: The objective is AWP, and no weight trains; or SRAT, and the model has no linear classifier; or the
            teacher is missing, or has no place.

    Attributes:
        epoch: Number of the current epoch, from 0; the training loop sets it.
        targets: Soft labels of SAT, `[samples, classes]`; the row of an image is zero until the image was seen.
        counts: Number of images of each class that SRAT has seen, `[classes]`.
    """

    targets: Tensor
    counts: Tensor

    def __init__(
        self,
        net: PixelModel,
        config: TuneConfig,
        samples: int = 0,
        classes: int = 0,
        teacher: PixelModel | None = None,
    ) -> None:
        super().__init__()
        self.net, self.config, self.kind = net, config, KINDS[config.objective]
        self.epoch = 0
        self._weights: dict[nn.Parameter, Tensor] = {}  # their values before AWP moved them
        check_teacher(config, teacher)
        self._teachers = [] if teacher is None else [copied(teacher).eval()]  # a list, so that it is no part of this
        device = net.mean.device
        if config.objective == "sat":
            self.register_buffer("targets", torch.zeros(samples, classes, device=device, dtype=torch.float32))
        if config.objective == "srat":
            classifier_of(net.model)
            self.register_buffer("counts", torch.zeros(classes, device=device, dtype=torch.int64))
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
        loss = self.kind.loss(self, Images(pixels, attacked, labels, rows))
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
            distance=self.kind.distance,
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

    @torch.no_grad()
    def class_weights(self, labels: Tensor) -> Tensor:
        """SRAT's weight of each class, `[N]`, after counting in a batch: the inverse of its share of the images seen so
        far, by all processes, such that the mean weight of these images is 1. A class that was not seen has 0."""
        self.counts += torch.bincount(with_others(labels), minlength=len(self.counts))
        seen = self.counts > 0
        return (self.counts.sum() / (seen.sum() * self.counts.clamp(min=1))).where(seen, 0.0).float()

    def teacher(self, pixels: Tensor) -> Tensor:
        """The logits `[B, N]` of the teacher."""
        logits: Tensor = self._teachers[0].to(pixels.device)(pixels)
        return logits

    def _perturbed(self) -> list[nn.Parameter]:
        """The weights that AWP perturbs: those that train and have several dimensions."""
        return [p for p in self.net.parameters() if p.requires_grad and p.ndim > 1]

    def _shift_weights(self, attacked: Tensor, labels: Tensor) -> None:
        """AWP: move every weight that trains by `weight_perturbation` of its norm up the loss, until `settle` is called
        (Wu et al., arXiv 2004.05884, eq. 7-8)."""
        weights = self._perturbed()
        before = [b.clone() for b in self.net.buffers()]  # this pass must not change the statistics of BatchNorm
        loss = losses.adversarial(self.net, attacked, attacked, labels).value
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


def check_teacher(config: TuneConfig, teacher: nn.Module | None) -> None:
    """Raise a ValueError unless there is a teacher exactly if the objective needs one."""
    if (teacher is None) == (config.objective == "teacher"):
        raise ValueError(
            f"objective={config.objective!r} with {'no teacher' if teacher is None else 'a teacher'}: give both "
            'objective="teacher" and teacher=, as timm_nrpm.teacher.tune_by_teacher does, or neither.'
        )


def classifier_of(model: nn.Module) -> nn.Module:
    """The layer that computes the logits from the features: timm's classifier, or the last linear layer of another
    model.

    Raises:
        ValueError: There is none.
    """
    found = model.get_classifier() if hasattr(model, "get_classifier") else None  # type: ignore[operator]
    layers = [found] if isinstance(found, (nn.Linear, nn.Conv2d)) else []
    layers = layers or [module for module in model.modules() if isinstance(module, nn.Linear)]
    if not layers:
        raise ValueError(
            f'objective="srat" separates the inputs of the classifier, and this {type(model).__name__} has no linear '
            "layer: choose another objective."
        )
    return layers[-1]


@dataclass(frozen=True)
class Kind:
    """What an objective minimises, and how it attacks.

    Attributes:
        loss: Function from the objective and a batch to its loss.
        start: Where the attack starts: `"none"` at the image; `"ball"` at random within the threat, as
            :meth:`timm_nrpm.Threat.around` draws it, under L2 and L1 at its edge; `"near"` at a normal step of standard
            deviation 0.001 from the image, in pixel units of [0, 1].
        distance: Distance from the clean logits that the attack maximises; None for the cross-entropy of the labels.
    """

    loss: Callable[[Objective, Images], Loss]
    start: str = "none"
    distance: Distance | None = None


def _simple(loss: Callable[..., Loss]) -> Callable[[Objective, Images], Loss]:
    """A loss of the images and the labels alone."""
    return lambda o, images: loss(o.net, *images[:3])


def _weighted(loss: Callable[..., Loss]) -> Callable[[Objective, Images], Loss]:
    """A loss that also takes the weight of its second term."""
    return lambda o, images: loss(o.net, *images[:3], o.config.beta)


def _sat(o: Objective, images: Images) -> Loss:
    soften = lambda logits: o.soften(logits, images.labels, images.rows)  # noqa: E731
    return losses.sat(o.net, images.pixels, images.attacked, soften, o.config.beta)


def _srat(o: Objective, images: Images) -> Loss:
    classifier = classifier_of(o.net.model)
    weights = o.class_weights(images.labels)
    f = lambda pixels: losses.with_features(o.net, classifier, pixels)  # noqa: E731
    return losses.srat(f, *images[:3], weights, o.config.beta, o.config.temperature)


def _kl(clean: Tensor, moved: Tensor, labels: Tensor) -> Tensor:
    return losses.divergence(clean, moved)


KINDS = {
    "clean": Kind(_simple(losses.clean)),
    "fgsm": Kind(_simple(losses.adversarial)),
    "clean+fgsm": Kind(_simple(losses.both)),
    "pgd": Kind(_simple(losses.adversarial), "ball"),
    "trades": Kind(_weighted(losses.trades), "near", _kl),
    "mart": Kind(_weighted(losses.mart), "near"),
    "sat": Kind(_sat, "near", _kl),
    "awp": Kind(_simple(losses.adversarial), "ball"),
    "weat": Kind(_weighted(losses.weat), "near", _kl),
    "kl-dro": Kind(lambda o, images: losses.kl_dro(o.net, *images[:3], o.config.temperature), "ball"),
    "srat": Kind(_srat, "ball"),
    "comp-sum": Kind(_weighted(losses.comp_sum), "ball", losses.margin_change),
    "teacher": Kind(lambda o, images: losses.taught(o.net, o.teacher, *images[:3], o.config.temperature), "ball"),
}
"""The objectives by name."""
