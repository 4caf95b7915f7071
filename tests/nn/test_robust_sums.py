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


def fitted(sums, layer, images, estimate, lam, centred=True):
    """A layer with another estimate, fitted to images as the first layer of a classifier."""
    classifier = nn.Sequential(layer, nn.Flatten(), nn.Linear(layer(images)[0].numel(), 3))
    sums.with_sums_(classifier, images, ["0"], partial(sums.HeldSum, estimate=estimate, centred=centred), lam)
    return classifier[0]


@pytest.mark.parametrize("padding", [0, 2])
@pytest.mark.parametrize("lam", [0.0, 0.4])
def test_a_held_sum_is_its_definition(sums, padding, lam):
    layer, images = nn.Conv2d(3, 4, 5, padding=padding), torch.rand(20, 3, 9, 9)
    ours = fitted(sums, layer, images, sums.trimmed(0.1), lam)
    inputs = F.unfold(images, 5, padding=padding).movedim(2, 1).double()  # [B, L, D]
    centre, weight = inputs.mean((0, 1)), layer.weight.double().flatten(1)
    products = ((inputs[:6] - centre).unsqueeze(2) * weight).sort(-1).values  # [B, L, O, D]
    robust = (products[..., 7:68].mean(-1) * 75 + weight @ centre).movedim(2, 1)
    torch.testing.assert_close(ours.robust(images[:6]).double(), robust, atol=2e-4, rtol=1e-4)
    linear = F.conv2d(images[:6].double(), layer.weight.double(), layer.bias.double(), padding=padding)
    corrected = (robust + layer.bias.view(1, -1, 1)) * ours.scale.view(1, -1, 1) + ours.shift.view(1, -1, 1)
    mixed = lam * linear + (1 - lam) * corrected.view_as(linear)
    torch.testing.assert_close(ours(images[:6]).double(), mixed, atol=1e-3, rtol=1e-3)


def test_corrected_outputs_keep_their_mean_and_spread(sums):
    layer = nn.Conv2d(1, 4, 3)
    images = torch.rand(40, 1, 8, 8) ** 3
    plain = layer(images)
    model = fitted(sums, layer, images, sums.reweighted(3, 0.3), 0.0)
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
