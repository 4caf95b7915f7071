"""What tuning minimises: adversarial training losses, as compared in the paper (arXiv 2410.04577, Table 5), and others.

A loss takes `f`, which maps pixels `[B, C, H, W]` to logits `[B, N]`, the images, the same images attacked, and labels
`[B]`. It returns the value to minimise, and the logits of the clean and of the attacked images where it needs them.
Most losses are means over images; those that compare the images of a batch take the images of all processes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_nrpm.jobs.processes import with_others

Forward = Callable[[Tensor], Tensor]


class Loss(NamedTuple):
    """A loss to minimise, and the logits `[B, N]` of the clean and of the attacked images; None where it needs none."""

    value: Tensor
    clean: Tensor | None
    attacked: Tensor | None


def divergence(logits: Tensor, moved: Tensor) -> Tensor:
    """KL(clean || attacked) of every image, `[B]`."""
    return F.kl_div(F.log_softmax(moved, 1), F.log_softmax(logits, 1), reduction="none", log_target=True).sum(1)


def margin_change(logits: Tensor, moved: Tensor, labels: Tensor) -> Tensor:
    """Euclidean length, `[B]`, of the change of the differences between the label's logit and every other one."""
    change = moved - logits
    return torch.linalg.vector_norm(change.gather(1, labels.unsqueeze(1)) - change, dim=1)


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
    apart = divergence(logits, moved).mean()
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
    return Loss((boosted + beta * divergence(logits, moved) * uncertain).mean(), logits, moved)


def sat(f: Forward, pixels: Tensor, attacked: Tensor, soften: Forward, beta: float) -> Loss:
    """Self-adaptive training under attack: TRADES with soft labels (Huang et al., arXiv 2002.10319, section 4).

    `soften` maps the clean logits to soft labels `[B, N]`, see :class:`timm_nrpm.tuning.objectives.Objective`. The NRPM
    paper does not say which "SAT" it compares with.
    """
    logits, moved = f(pixels), f(attacked)
    targets = soften(logits.detach())
    return Loss(F.cross_entropy(logits, targets) + beta * divergence(logits, moved).mean(), logits, moved)


def weat(f: Forward, pixels: Tensor, attacked: Tensor, labels: Tensor, beta: float) -> Loss:
    """`w(x) * (CE(f(x'), y) + beta * KL(f(x) || f(x')))`: weighted energy adversarial training (Mirza et al., arXiv
    2407.06315, the variant WEAT_ADV).

    The weight is `w = 1 / log(1 + exp(|E|))` with the energy `E = -logsumexp(f(x))` of the clean image, and takes no
    gradient.
    """
    logits, moved = f(pixels), f(attacked)
    weights = 1 / F.softplus(torch.logsumexp(logits.detach(), 1).abs())
    each = F.cross_entropy(moved, labels, reduction="none") + beta * divergence(logits, moved)
    return Loss((weights * each).mean(), logits, moved)


def kl_dro(f: Forward, pixels: Tensor, attacked: Tensor, labels: Tensor, temperature: float) -> Loss:
    """`r * log mean exp(CE(f(x'), y) / r)` over the batch: doubly robust reweighting (Sow et al., arXiv 2308.00311).

    It is the largest value of `sum w_i CE_i - r * KL(w || uniform)` over the weights w of the images, which a softmax
    of `CE / r` attains. The images are those of all processes. A large temperature r gives PGD-AT, and a temperature
    towards 0 the image that is worst off.
    """
    logits = f(attacked)
    losses = with_others(F.cross_entropy(logits, labels, reduction="none")) / temperature
    return Loss(temperature * (torch.logsumexp(losses, 0) - math.log(len(losses))), None, logits)


def comp_sum(f: Forward, pixels: Tensor, attacked: Tensor, labels: Tensor, beta: float) -> Loss:
    """`CE(f(x), y) + nu * |change of margins from x to x'|`: the smooth adversarial comp-sum loss (Mao et al., arXiv
    2304.07288) for the logistic member of their family and a margin rho of 1, with nu = beta.

    Their bound on the adversarial error holds where nu is at least `sqrt(N - 1) / rho` for N classes.
    """
    logits, moved = f(pixels), f(attacked)
    smooth = margin_change(logits, moved, labels).mean()
    return Loss(F.cross_entropy(logits, labels) + beta * smooth, logits, moved)


def srat(
    f: Callable[[Tensor], tuple[Tensor, Tensor]],
    pixels: Tensor,
    attacked: Tensor,
    labels: Tensor,
    weights: Tensor,
    beta: float,
    temperature: float,
) -> Loss:
    """`w_y * CE(f(x'), y) + beta * separation(features(x'))`: separable reweighted adversarial training for classes of
    unequal size (Wang et al., arXiv 2107.13639).

    Args:
        f: Function from pixels to the logits `[B, N]` and the features `[B, D]` that these are computed from.
        pixels: The images, which the loss does not look at.
        attacked, labels: Attacked images and labels.
        weights: Weight of each class, `[N]`.
        beta: Weight of the separation, see :func:`separation`.
        temperature: Temperature of its similarities.
    """
    moved, features = f(attacked)
    reweighted = (weights[labels] * F.cross_entropy(moved, labels, reduction="none")).mean()
    return Loss(reweighted + beta * separation(features, labels, temperature), None, moved)


def separation(features: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """How far images of one class are from each other, compared with all others of the batch of all processes.

    It is the mean over images of `-log(exp(z_i z_j / t) / sum over k of exp(z_i z_k / t))`, averaged over the other
    images j of the class, where k runs over all other images and features z have length 1. An image that is alone of
    its class counts 0.
    """
    z, classes = with_others(F.normalize(features.float(), dim=1)), with_others(labels)
    others = ~torch.eye(len(z), dtype=torch.bool, device=z.device)
    alike = (classes.unsqueeze(0) == classes.unsqueeze(1)) & others
    similar = (z @ z.T / temperature).masked_fill(~others, -torch.inf)
    apart = torch.logsumexp(similar, 1, keepdim=True) - similar.masked_fill(~others, 0.0)
    return (apart.where(alike, 0.0).sum(1) / alike.sum(1).clamp(min=1)).mean()


def taught(f: Forward, teacher: Forward, pixels: Tensor, attacked: Tensor, labels: Tensor, temperature: float) -> Loss:
    """`s * T^2 * KL(teacher_T || f_T) + (1 - s) * CE(f, y)`, of the clean and of the attacked images: distillation from
    a small robust teacher that knows its uncertainty (after Jain et al., arXiv 2309.07499).

    The certainty `s = 1 - entropy / log N` is that of the teacher's prediction for the image. They give the model three
    heads, and choose between them by uncertainty when it is used; here it keeps its one head.
    """
    logits, moved = f(pixels), f(attacked)
    parts = []
    for ours, images in ((logits, pixels), (moved, attacked)):
        with torch.no_grad():
            theirs = teacher(images)
        certain = 1 - _entropy(theirs) / math.log(theirs.shape[1])
        distilled = temperature**2 * divergence(theirs / temperature, ours / temperature)
        labelled = F.cross_entropy(ours, labels, reduction="none")
        parts.append((certain * distilled + (1 - certain) * labelled).mean())
    return Loss(parts[0] + parts[1], logits, moved)


def _entropy(logits: Tensor) -> Tensor:
    """Entropy of every prediction in nats, `[B]`."""
    log = F.log_softmax(logits, 1)
    return -(log.exp() * log).sum(1)


def with_features(net: Forward, classifier: nn.Module, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """The logits `[B, N]`, and the input of the classifier that they are computed by, flattened to `[B, D]`."""
    seen: list[Tensor] = []
    hook = classifier.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        logits = net(pixels)
    finally:
        hook.remove()
    return logits, seen[-1].flatten(1)
