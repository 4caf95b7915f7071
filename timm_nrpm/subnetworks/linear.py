"""Algorithm 2 of the second paper: the logits of a network as a linear combination of the outputs of its early layers
(arXiv 2307.03803, Theorem 3 and appendix B.1).

The paper solves for the weights of that combination on the very images that it is judged on. There are more weights
than images, so each batch is solved without an error, and the mean over the batches keeps a part of that. What such a
combination is worth shows on other images, whose number stands beside it here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from timm_nrpm.models.modes import evaluating
from timm_nrpm.nn.pixel_model import PixelModel
from timm_nrpm.subnetworks.recording import received
from timm_nrpm.subnetworks.splitting import Split


@dataclass(frozen=True)
class LinearReadout:
    """Accuracies from 0 to 1 of a linear combination of the outputs of early layers.

    Attributes:
        layers: Number of layers whose outputs are combined.
        values: Number of these outputs, and so of weights for each class.
        network: Accuracy of the network itself.
        solved: Accuracy of the combination on the images that it was solved on, as in the paper.
        held_out: Accuracy of a combination on images that it was not solved on: the even batches for the odd ones, and
            the reverse.
        random: Accuracy of random weights, the paper's control.
    """

    layers: int
    values: int
    network: float
    solved: float
    held_out: float
    random: float


def linear_readout(
    net: PixelModel, images: Iterable[tuple[Tensor, Tensor]], parts: Split, *, seed: int = 0
) -> LinearReadout:
    """Combine the outputs of all early layers linearly, so that they come near the logits of the network.

    Args:
        net: The network on pixels, such as one that was made robust.
        images: Two or more batches of pixels `[B, C, H, W]` in [0, 1], clean or attacked, and labels `[B]`. Each batch
            is solved by itself, and the weights are averaged. They are held in memory, `N` values for each class.
        parts: The split of the network; its early part is combined.
        seed: Seed of the random weights.

    Raises:
        ValueError: There are fewer than two batches.

    Example:
        >>> from timm_nrpm.subnetworks.splitting import split
        >>> net = PixelModel(model).eval()
        >>> images = [(pixels[:16], labels[:16]), (pixels[16:], labels[16:])]
        >>> readout = linear_readout(net, images, split(model, 2))
        >>> readout.layers, readout.values
        (6, 2176)
    """
    batches = [(pixels.to(net.mean.device), labels.to(net.mean.device)) for pixels, labels in images]
    if len(batches) < 2:
        raise ValueError(
            f"{len(batches)} batches were given: a combination is solved on some and judged on others, so give two or "
            "more."
        )
    names = (*parts.early[1:], parts.late[0])  # what the next layer receives is the output of a layer
    halves: list[Tensor] = []
    network = 0
    for start in (0, 1):
        total: Tensor | None = None
        for pixels, labels in batches[start::2]:
            outputs, logits = _outputs(net, names, pixels)
            network += int(logits.argmax(1).eq(labels).sum())
            weights = _solved(outputs, logits)
            total = weights if total is None else total + weights
        assert total is not None
        halves.append(total / len(batches[start::2]))
    shares = [len(batches[start::2]) / len(batches) for start in (0, 1)]
    mean = shares[0] * halves[0] + shares[1] * halves[1]
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(mean.shape, generator=generator).to(mean)
    right = {"solved": 0, "held_out": 0, "random": 0}
    for number, (pixels, labels) in enumerate(batches):
        outputs, _ = _outputs(net, names, pixels)
        for name, weights in (("solved", mean), ("held_out", halves[1 - number % 2]), ("random", drawn)):
            right[name] += int((outputs @ weights).argmax(1).eq(labels).sum())
    count = sum(len(labels) for _, labels in batches)
    return LinearReadout(len(names), len(mean), network / count, **{name: each / count for name, each in right.items()})


def _outputs(net: PixelModel, names: tuple[str, ...], pixels: Tensor) -> tuple[Tensor, Tensor]:
    """All outputs of some layers `[B, N]`, and the logits `[B, K]`."""
    with received(net.model, names, pooled=False) as inputs, evaluating(net), torch.no_grad():
        logits = net(pixels).float()
        return torch.cat([inputs[name] for name in names], dim=1), logits


def _solved(outputs: Tensor, logits: Tensor) -> Tensor:
    """The smallest weights `[N, K]` with which outputs `[B, N]` come nearest to logits `[B, K]`."""
    kernel = outputs.double() @ outputs.double().T
    return outputs.T @ (torch.linalg.pinv(kernel, hermitian=True) @ logits.double()).to(outputs)
