"""The sums that `scripts/estimators.py` tries, beside their definition."""

from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def sums(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import robust_sums

    return robust_sums


def fitted(sums, layer, images, eps, lam):
    """A layer with scaled sums, fitted to images as the first layer of a classifier."""
    classifier = nn.Sequential(layer, nn.Flatten(), nn.Linear(layer(images)[0].numel(), 3))
    sums.with_sums_(classifier, images, ["0"], partial(sums.ScaledSum, eps=eps), lam)
    return classifier[0]


@pytest.mark.parametrize("padding", [0, 2])
@pytest.mark.parametrize("lam", [0.0, 0.4])
def test_the_scaled_sum_is_its_definition(sums, padding, lam):
    layer = nn.Conv2d(3, 4, 5, padding=padding)
    images, eps = torch.rand(20, 3, 9, 9), 0.3
    ours = fitted(sums, layer, images, eps, lam)
    x, weight = images[:6].double(), layer.weight.double()
    centre = images.double().mean((0, 2, 3), keepdim=True)
    products = F.unfold(x - centre, 5, padding=padding).movedim(2, 1).unsqueeze(2) * weight.flatten(1)  # [B, L, O, D]
    distance = ours.distance.double().view(1, 1, 4, 1)
    estimate = products.mean(-1, keepdim=True)
    for _ in range(3):
        weights = 1 / ((products - estimate).abs() + eps * distance)
        estimate = (weights * products).sum(-1, keepdim=True) / weights.sum(-1, keepdim=True)
    rest = F.conv2d(centre.expand(1, -1, 9, 9), weight, padding=padding).flatten(2)
    robust = estimate.squeeze(-1).movedim(2, 1) * 75 + rest
    torch.testing.assert_close(ours.robust(images[:6]).double(), robust, atol=2e-4, rtol=1e-4)
    linear = F.conv2d(x, weight, layer.bias.double(), padding=padding)
    corrected = (robust + layer.bias.view(1, -1, 1)) * ours.scale.view(1, -1, 1) + ours.shift.view(1, -1, 1)
    mixed = lam * linear + (1 - lam) * corrected.view_as(linear)
    torch.testing.assert_close(ours(images[:6]).double(), mixed, atol=1e-3, rtol=1e-3)


def test_corrected_outputs_keep_their_mean_and_spread(sums):
    layer = nn.Conv2d(1, 4, 3)
    images = torch.rand(40, 1, 8, 8) ** 3
    plain = layer(images)
    model = fitted(sums, layer, images, 0.3, 0.0)
    ours = model(images)
    assert not torch.allclose(ours, plain, atol=0.01)
    torch.testing.assert_close(ours.mean((0, 2, 3)), plain.mean((0, 2, 3)), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ours.movedim(1, 0).flatten(1).std(1), plain.movedim(1, 0).flatten(1).std(1))
    ours.sum().backward()
    bypass = sums.with_linear_backward(model)
    torch.testing.assert_close(bypass(images), ours)
    x = images[:2].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(bypass(x).sum(), x)
    (linear,) = torch.autograd.grad(layer(x).sum(), x)
    torch.testing.assert_close(gradient, linear)
