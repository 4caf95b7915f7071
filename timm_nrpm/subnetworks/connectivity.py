"""Connectivity: how much each layer of a late part depends on the layer before it, within a class (the paper's rho)."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

import torch
from torch import Tensor

from timm_nrpm.models.modes import evaluating
from timm_nrpm.nn.pixel_model import PixelModel
from timm_nrpm.subnetworks.mutual_information import LEAST, edge
from timm_nrpm.subnetworks.recording import received
from timm_nrpm.subnetworks.splitting import Split


def connectivity(
    net: PixelModel, images: Iterable[tuple[Tensor, Tensor]], parts: Split, *, classes: int, seed: int = 0
) -> tuple[float, ...]:
    """Mutual information between consecutive layers, within a class, for each layer of the late part (arXiv 2307.03803,
    assumption A1), by :func:`timm_nrpm.mutual_information.edge`.

    The output of a layer is what the next one receives, so with its normalisation, activation and the residual sum; of
    the last layer, the logits. Of images and tokens it is the mean over all places, one number for each channel. From
    more images the estimate sees more: compare numbers from equally many images of each class.

    Args:
        net: The network on pixels.
        images: Batches of pixels `[B, C, H, W]` in [0, 1] and labels `[B]`. Of every class, as many are used as there
            are of the smallest.
        parts: The split of the network.
        classes: Number of classes, each of which needs images.
        seed: Seed of the estimate.

    Returns:
        A number of nats for each layer of `parts.late`, of its dependence on the layer before it.

    Raises:
        ValueError: A class has no image, or fewer than 100.
    """
    recorded: list[list[Tensor]] = [[] for _ in range(len(parts.late) + 1)]
    given = []
    device = net.mean.device
    with received(net.model, parts.late, pooled=True) as inputs, evaluating(net), torch.no_grad():
        for pixels, classes_of_batch in images:
            logits = net(pixels.float().to(device))
            for place, name in enumerate(parts.late):
                recorded[place].append(inputs[name].cpu())
            recorded[-1].append(logits.float().cpu())
            given.append(classes_of_batch.cpu())
    labels = torch.cat(given)
    count = smallest_class(labels, classes)
    rows = torch.cat([(labels == label).nonzero()[:count, 0] for label in range(classes)])
    outputs = [torch.cat(each)[rows] for each in recorded]
    return tuple(edge(x, y, given=labels[rows], seed=seed) for x, y in pairwise(outputs))


def smallest_class(labels: Tensor, classes: int) -> int:
    """Number of images of the smallest class.

    Raises:
        ValueError: It is fewer than connectivity takes.
    """
    counts = torch.bincount(labels, minlength=classes)
    few = [f"{label} has {int(count)}" for label, count in enumerate(counts) if count < LEAST]
    if few:
        raise ValueError(
            f"Connectivity is measured within each class, from {LEAST} images or more, and of the {classes} classes "
            f"{len(few)} have fewer: class {', '.join(few[:5])}. Give more images, of every class."
        )
    return int(counts.min())
