"""Robust criticality of a layer: how much the adversarial loss rises when its weights move a little in the worst
direction (Zhu et al., arXiv 2308.02533, section 3)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from timm_nrpm.attacks.threats import Threat, check_threat
from timm_nrpm.checks import check_integer, check_number
from timm_nrpm.models.modes import attackable
from timm_nrpm.nn.pixel_model import PixelModel
from timm_nrpm.subnetworks.attacked import attacked, gradient_attacks

RADIUS = 0.1
"""Largest move of a layer's weights, in times their norm."""

STEPS = 5
"""Number of steps of the ascent over the weights."""


def criticality(
    net: PixelModel,
    images: Iterable[tuple[Tensor, Tensor]],
    layers: Iterable[str],
    threat: Threat | None = None,
    *,
    radius: float = RADIUS,
    steps: int = STEPS,
    attack_steps: int = 10,
    seed: int = 0,
) -> dict[str, float]:
    """Rise of the mean cross-entropy on attacked images, in nats, when the weight of one layer moves in the direction
    in which it rises most. The images are attacked once, by PGD on the network as it is.

    Args:
        net: The network on pixels.
        images: Batches of pixels `[B, C, H, W]` in [0, 1] and labels `[B]`.
        layers: Names of the layers to look at, such as `split(model, 1).layers`.
        threat: What the attack may change, under Linf or L2; the default is Linf with eps 8/255.
        radius: Largest move of a weight, in times its norm.
        steps: Number of steps of the ascent over the weight.
        attack_steps: Number of steps of PGD.
        seed: Seed of the attack.

    Returns:
        The rise by the name of the layer.

    Raises:
        ValueError: There are no images, a name is of no layer with a weight, the threat is under another norm, or a
            setting is outside its range.

    Example:
        >>> net = PixelModel(plain).eval()
        >>> rises = criticality(net, [(pixels, labels)], ["conv1", "fc"], Threat("Linf", 0.1))
        >>> max(rises, key=rises.get)
        'fc'
    """
    threat, layers = check_threat(threat), list(layers)
    if threat.norm not in ("Linf", "L2"):
        raise ValueError(f"threat={str(threat)!r}: PGD attacks the images here, so give a Threat under Linf or L2.")
    radius = check_number("radius", radius, above=0, why=", in times the norm of a weight")
    steps, attack_steps = (
        check_integer(name, value, least=1) for name, value in (("steps", steps), ("attack_steps", attack_steps))
    )
    batches = attacked(net, images, gradient_attacks(threat, attack_steps)["pgd"], seed=seed)
    if not batches:
        raise ValueError("There are no images: give some to take the loss on.")
    modules = dict(net.model.named_modules())
    if unknown := [name for name in layers if name not in modules or not hasattr(modules[name], "weight")]:
        raise ValueError(f"layers={unknown} are no layers with a weight: give names of model.named_modules().")
    with attackable(net.model):
        return {name: _rise(net, batches, modules[name].weight, radius, steps) for name in layers}


def _rise(
    net: PixelModel, batches: Sequence[tuple[Tensor, Tensor]], weight: torch.nn.Parameter, radius: float, steps: int
) -> float:
    """The largest rise that some steps of an ascent find, from a weight that is put back at the end."""
    start, learning = weight.detach().clone(), weight.requires_grad
    bound, highest, first = radius * float(start.norm()), -torch.inf, 0.0
    weight.requires_grad_(True)
    try:
        for step in range(steps + 1):
            loss, slope = _loss_and_slope(net, batches, weight)
            first = loss if step == 0 else first
            highest = max(highest, loss)
            if step == steps or not bound:
                break
            with torch.no_grad():
                moved = weight - start + 2 * bound / steps * slope / slope.norm().clamp_min(1e-30)
                weight.copy_(start + moved * min(1.0, bound / max(float(moved.norm()), 1e-30)))
    finally:
        with torch.no_grad():
            weight.copy_(start)
        weight.requires_grad_(learning)
    return highest - first


def _loss_and_slope(
    net: PixelModel, batches: Sequence[tuple[Tensor, Tensor]], weight: torch.nn.Parameter
) -> tuple[float, Tensor]:
    """Mean cross-entropy and its gradient."""
    count, total, slope = sum(len(labels) for _, labels in batches), 0.0, torch.zeros_like(weight)
    for pixels, labels in batches:
        loss = F.cross_entropy(net(pixels).float(), labels, reduction="sum") / count
        slope += torch.autograd.grad(loss, weight)[0]
        total += float(loss.detach())
    return total, slope
