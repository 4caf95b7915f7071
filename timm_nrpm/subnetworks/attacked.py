"""Images that an attack along a network's own gradient has changed, to measure the network's layers on."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from timm_nrpm.attacks.library import Run, fgsm, pgd
from timm_nrpm.attacks.threats import Threat
from timm_nrpm.nn.pixel_model import PixelModel


def gradient_attacks(threat: Threat, steps: int) -> dict[str, Run]:
    """FGSM and PGD, by name, as far as they are defined under the norm of a threat: both under Linf, PGD under L2."""
    if threat.norm not in ("Linf", "L2"):
        return {}
    return {**({"fgsm": fgsm(threat.eps)} if threat.norm == "Linf" else {}), "pgd": pgd(threat, steps)}


def attacked(
    net: PixelModel, images: Iterable[tuple[Tensor, Tensor]], attack: Run, *, seed: int = 0
) -> list[tuple[Tensor, Tensor]]:
    """Attack images along the gradient of a network.

    Args:
        net: The network on pixels.
        images: Batches of pixels `[B, C, H, W]` in [0, 1] and labels `[B]`.
        attack: The attack, such as one of :func:`gradient_attacks`.
        seed: Seed of its random starts.

    Returns:
        Attacked pixels and the labels, batch by batch, where the network is.

    Example:
        >>> net, attack = PixelModel(model).eval(), gradient_attacks(Threat("Linf", 0.1), 10)["pgd"]
        >>> [(changed, _)] = attacked(net, [(pixels, labels)], attack)
        >>> round(float((changed - pixels).abs().max()), 3)
        0.1
    """
    device = net.mean.device
    found = []
    for number, (pixels, labels) in enumerate(images):
        pixels, labels = pixels.float().to(device), labels.to(device)
        found.append((attack(net, pixels, labels, [seed + number] * len(pixels)), labels))
    return found
