"""Convolutions of one and three dimensions, and transposed ones, against sums over every product in float64."""

import itertools

import numpy as np
import pytest
import timm.layers as timm_layers
import torch
from timm.layers import CondConv2d
from torch import nn

from timm_nrpm import NRPMConfig, calibrate_, reprogram_
from timm_nrpm.errors import ReprogrammingWarning
from timm_nrpm.nn.reprogrammed import Reprogrammed

EPS = 0.05


def mixed(products, lam, iterations):
    """lambda times the sum of products, and the rest times as many times their reweighted mean (Algorithm 1)."""
    centre = products.mean()
    for _ in range(iterations):
        weights = 1 / (np.abs(products - centre) + EPS)
        centre = (weights * products).sum() / weights.sum()
    return lam * products.sum() + (1 - lam) * len(products) * centre


def forward_sums(layer, x, lam, iterations):
    """Of a convolution of any number of dimensions with zero padding: every product of every window."""
    weight = layer.weight.detach().numpy()
    padding = [(0, 0), (0, 0), *((p, p) for p in layer.padding)]
    x = np.pad(x.numpy(), padding)
    kernel, per_group = weight.shape[2:], weight.shape[1]
    outputs = weight.shape[0] // layer.groups
    sizes = [
        (n - d * (k - 1) - 1) // s + 1
        for n, k, s, d in zip(x.shape[2:], kernel, layer.stride, layer.dilation, strict=True)
    ]
    out = np.zeros((len(x), len(weight), *sizes))
    for place in itertools.product(*map(range, out.shape)):
        image, output, *at = place
        first = output // outputs * per_group
        windows = [
            slice(a * s, a * s + d * (k - 1) + 1, d)
            for a, s, d, k in zip(at, layer.stride, layer.dilation, kernel, strict=True)
        ]
        window = x[(image, slice(first, first + per_group), *windows)]
        out[place] = mixed((window * weight[output]).ravel(), lam, iterations)
    return out


def transposed_sums(layer, x, lam, iterations):
    """Of a transposed convolution: for every output the products of the kernel values that meet an input or, beyond the
    border, a zero. These are the values of the kernel at its place modulo the stride."""
    weight, x = layer.weight.detach().numpy(), x.numpy()
    per_group, outputs = weight.shape[0] // layer.groups, weight.shape[1]
    kernel, stride, padding = weight.shape[2:], layer.stride, layer.padding
    sizes = [
        (n - 1) * s - 2 * p + k + e
        for n, s, p, k, e in zip(x.shape[2:], stride, padding, kernel, layer.output_padding, strict=True)
    ]
    out = np.zeros((len(x), outputs * layer.groups, *sizes))
    for image, output, row, column in itertools.product(*map(range, out.shape)):
        group = output // outputs
        products = []
        for channel, i, j in itertools.product(range(per_group), *map(range, kernel)):
            down, right = row + padding[0] - i, column + padding[1] - j
            if down % stride[0] or right % stride[1]:
                continue
            at = down // stride[0], right // stride[1]
            inside = 0 <= at[0] < x.shape[2] and 0 <= at[1] < x.shape[3]
            value = x[image, group * per_group + channel, at[0], at[1]] if inside else 0.0
            products.append(value * weight[group * per_group + channel, output % outputs, i, j])
        out[image, output, row, column] = mixed(np.array(products), lam, iterations) if products else 0.0
    return out


CASES = {
    "1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1, dilation=2, groups=2, bias=False), (2, 4, 11)),
    "1d, as ECA": (lambda: nn.Conv1d(1, 1, 5, padding=2, bias=False), (3, 1, 9)),
    "3d": (
        lambda: nn.Conv3d(2, 4, (2, 3, 1), stride=(2, 1, 1), padding=(1, 1, 0), groups=2, bias=False),
        (3, 2, 5, 4, 3),
    ),
    "3d, dilated": (lambda: nn.Conv3d(1, 2, 2, dilation=(2, 1, 2), bias=False), (1, 1, 4, 3, 4)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, 2, 1, output_padding=1, groups=2, bias=False), (2, 4, 3, 4)),
    "transposed, patches": (lambda: nn.ConvTranspose2d(3, 2, 4, 4, bias=False), (1, 3, 2, 3)),
    "transposed with gaps": (
        lambda: nn.ConvTranspose2d(2, 3, (2, 3), (3, 4), output_padding=(2, 1), bias=False),
        (1, 2, 3, 2),
    ),
    "transposed, steps of two kinds": (
        lambda: nn.ConvTranspose2d(2, 2, (4, 5), (1, 3), (2, 1), output_padding=(0, 2), bias=False),
        (1, 2, 3, 2),
    ),
    "transposed, one stride": (lambda: nn.ConvTranspose2d(2, 2, 3, 1, 2, bias=False), (1, 2, 4, 5)),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("lam", "iterations"), [(0.0, 1), (0.4, 3)])
def test_every_product_counts_once(name, lam, iterations):
    make, shape = CASES[name]
    layer, x = make().double(), torch.randn(shape, dtype=torch.float64)
    sums = transposed_sums if isinstance(layer, nn.ConvTranspose2d) else forward_sums
    expected = sums(layer, x, lam, iterations)
    np.testing.assert_allclose(sums(layer, x, 1.0, 1), layer(x).detach().numpy(), atol=1e-12)  # the oracle's own
    ours = reprogram_(layer, NRPMConfig(lam=lam, iterations=iterations, eps=EPS))
    np.testing.assert_allclose(ours(x).detach().numpy(), expected, atol=1e-7)


def test_an_output_size_that_is_asked_for():
    layer, x = nn.ConvTranspose2d(2, 3, 3, 2, 1), torch.randn(1, 2, 4, 4)
    want = layer(x, output_size=[8, 7])
    almost = reprogram_(layer, NRPMConfig(lam=1 - 1e-6))(x, output_size=[8, 7])
    torch.testing.assert_close(almost, want, atol=1e-4, rtol=1e-4)
    layer.lam.data.fill_(1.0)
    assert torch.equal(layer(x, output_size=[8, 7]), want)


@pytest.mark.parametrize("padding", [1, "same"])
def test_every_image_has_its_own_weight(padding):
    """timm's CondConv2d is, for each image, an ordinary convolution with a mix of the experts' weights."""
    layer = CondConv2d(4, 6, 3, stride=2, padding=padding, dilation=2, groups=2, num_experts=3).double()
    x, routing = torch.randn(3, 4, 8, 8, dtype=torch.float64), torch.rand(3, 3, dtype=torch.float64)
    plain = layer(x, routing)
    reprogram_(layer, NRPMConfig(lam=0.3, iterations=2, eps=EPS))
    ours = layer(x, routing)
    for place in range(3):
        one = (timm_layers.Conv2dSame if padding == "same" else nn.Conv2d)(
            4, 6, 3, stride=2, padding=0 if padding == "same" else 1, dilation=2, groups=2, bias=False
        ).double()
        one.weight.data = (routing[place] @ layer.weight).view_as(one.weight).detach()
        torch.testing.assert_close(one(x[place : place + 1]), plain[place : place + 1])
        torch.testing.assert_close(reprogram_(one, layer.config)(x[place : place + 1]), ours[place : place + 1])
    layer.lam.data.fill_(1.0)
    assert torch.equal(layer(x, routing), plain)


@pytest.mark.parametrize("name", [name for name in CASES if "transposed" not in name])
def test_standard_units_are_fitted(name):
    make, shape = CASES[name]
    layer = make()
    model = nn.Sequential(nn.Flatten(), nn.Unflatten(1, shape[1:]), layer, nn.Flatten())
    pixels = torch.rand(shape)
    images = pixels.reshape(len(pixels), 1, 1, -1)
    reprogram_(model, NRPMConfig(lam=0.5, standardize=True))
    calibrate_(model, [images], mean=(0.0,), std=(1.0,))
    torch.testing.assert_close(layer.units.centre, pixels.transpose(0, 1).flatten(1).mean(1))
    assert layer.units.distance.shape == (len(layer.weight),)
    assert (layer.units.distance > 0).all()
    assert model(images).isfinite().all()


@pytest.mark.parametrize(
    ("layer", "settings", "why"),
    [
        (nn.ConvTranspose2d(2, 3, 3, dilation=2), {}, "a transposed convolution with dilation"),
        (nn.ConvTranspose2d(2, 3, 3), {"standardize": True}, "standard units are not defined for a transposed"),
        (CondConv2d(2, 3, 3, bias=True), {}, "its bias is another one for each image"),
        (CondConv2d(2, 3, 3), {"standardize": True}, "standard units are not defined for a convolution whose weight"),
    ],
)
def test_what_stays_plain_says_why(layer, settings, why):
    model = nn.Sequential(nn.Conv2d(2, 2, 1), layer)
    with pytest.warns(ReprogrammingWarning, match=why):
        reprogram_(model, NRPMConfig(lam=0.5, **settings))
    assert isinstance(model[0], Reprogrammed)
    assert not isinstance(model[1], Reprogrammed)
