"""Linear probes: classifiers on the frozen features of a model's layers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_nrpm.checks import check_number
from timm_nrpm.data.images import check_batch, check_labels
from timm_nrpm.ensembles.crossmax import pool, recorded
from timm_nrpm.models.modes import evaluating
from timm_nrpm.nn.wrappers import subject_of

ITERATIONS = 200
"""Largest number of iterations of L-BFGS for a probe."""


def fit_probes(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    layers: Sequence[str],
    *,
    penalty: float = 1e-3,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
) -> dict[str, nn.Linear]:
    """Fit a multinomial logistic regression on the output of each of some layers, averaged over places or tokens.

    Args:
        model: Classifier of normalised images, or a wrapper of one; its weights are not changed.
        loader: Batches of pixels `[B, C, H, W]` in [0, 1] and labels `[B]`, of images that nothing is judged on.
        layers: Names of the layers.
        penalty: Weight of half the squared norm of a probe's weights, on standardised features.
        mean, std: The model's normalisation, as in :func:`timm_nrpm.evaluate`.

    Returns:
        A probe for each layer, for :class:`timm_nrpm.ensembles.crossmax.CrossMax`.

    Raises:
        ValueError: There are no layers or images, or labels are not classes of the model.
        AttributeError: The model has no layer of that name.

    Example:
        >>> probes = fit_probes(model, training_loader, ["layer2", "layer3"])
        >>> timm_nrpm.ensembles.crossmax.CrossMax(model, probes=probes)(pixels).shape
        torch.Size([32, 10])
    """
    check_number("penalty", penalty, least=0)
    subject = subject_of(model, mean, std)
    net = subject.on_pixels()
    if not layers:
        raise ValueError("layers is empty: give the names of layers, such as 'layer3'.")
    features: dict[str, list[Tensor]] = {layer: [] for layer in layers}
    targets: list[Tensor] = []
    classes = 0
    with evaluating(net), torch.no_grad(), recorded(subject.model, layers) as outputs:
        for batch in loader:
            pixels, labels = check_batch(batch)
            classes = net(pixels.to(net.mean.device)).shape[1]
            targets.append(check_labels(labels, classes, count=len(pixels)).cpu())
            for layer in layers:
                features[layer].append(pool(outputs[layer], subject.model).float().cpu())
    if not targets:
        raise ValueError("The loader is empty: give images to fit the probes on.")
    right = torch.cat(targets)
    return {layer: fitted(torch.cat(each), right, classes, penalty).to(net.mean.device)
            for layer, each in features.items()}  # fmt: skip


def fitted(features: Tensor, labels: Tensor, classes: int, penalty: float) -> nn.Linear:
    """A multinomial logistic regression of classes `[B]` on features `[B, D]`, as a linear map of the features.

    Args:
        features: Features, which are standardised for the penalty.
        labels: Classes from 0 to `classes - 1`.
        classes: Number of classes.
        penalty: Weight of half the squared norm of the weights, on standardised features.
    """
    centre, scale = features.mean(0), features.std(0, correction=0).clamp(min=1e-6)
    standard = (features - centre) / scale
    weight = torch.zeros(classes, features.shape[1], requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=ITERATIONS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(standard @ weight.T + bias, labels) + penalty / 2 * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    probe = nn.Linear(features.shape[1], classes)
    with torch.no_grad():
        probe.weight.copy_(weight / scale)
        probe.bias.copy_(bias - (weight / scale) @ centre)
    return probe.requires_grad_(False)
