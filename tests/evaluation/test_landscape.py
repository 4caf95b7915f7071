import math

import numpy as np
import pytest
import timm
import torch
import torch.nn as nn
from hypothesis import given, settings
from hypothesis import strategies as st

from timm_nrpm import NRPMConfig, reprogram_
from timm_nrpm.data.loaders import digits
from timm_nrpm.evaluation.landscape import LossLandscape, _random_signs, loss_landscape
from timm_nrpm.models.registry import DIGITS


class Plane(nn.Module):
    """Logits of one weight vector and zero: a loss that is known."""

    def __init__(self, weight):
        super().__init__()
        self.fc = nn.Linear(len(weight), 2, bias=False, dtype=torch.float64)
        self.fc.weight.data = torch.stack([torch.tensor(weight, dtype=torch.float64), torch.zeros(len(weight))])

    def forward(self, x):
        return self.fc(x.flatten(1))


@pytest.mark.parametrize("clip", [True, False])
def test_the_landscape_of_a_plane(clip):
    """Own gradient sign of -log sigmoid(w.x) is -sign(w); the loss along it is softplus(-(w.x - a |w|_1 + b w.r))."""
    weight = [1.0, -2.0, 0.5, 3.0]
    pixels = torch.tensor([[0.5, 0.4, 0.95, 0.6], [0.3, 0.02, 0.5, 0.5]], dtype=torch.float64).view(2, 1, 2, 2)
    landscape = loss_landscape(
        Plane(weight), pixels, torch.tensor([0, 0]), eps=0.1, resolution=5, directions=("own", "random"), clip=clip
    )
    w, x = np.array(weight), pixels.view(2, 4).numpy()
    generator = torch.Generator().manual_seed(0)
    r = _random_signs(torch.tensor(-np.sign(w)).expand(2, 4), generator).numpy()
    steps = np.array([-0.1, -0.05, 0, 0.05, 0.1])
    np.testing.assert_allclose(landscape.steps, steps, atol=1e-15)
    for i, a in enumerate(steps):
        for j, b in enumerate(steps):
            points = x - a * np.sign(w) + b * r
            points = points.clip(0, 1) if clip else points
            want = np.log1p(np.exp(-(points @ w)))
            assert landscape.losses[i][j] == pytest.approx(want.mean(), rel=1e-9)
            assert landscape.accuracies[i][j] == (points @ w > 0).mean()
    assert landscape.clean == pytest.approx(np.log1p(np.exp(-(x @ w))).mean(), rel=1e-12)
    assert landscape.cosine == 0.0
    assert landscape.samples == 2


def test_the_own_and_the_plain_gradient():
    """At lambda 1 they are the same; at lambda 0 the plain one is still the plane's."""
    pixels, labels = torch.rand(1, 1, 2, 2, dtype=torch.float64), torch.tensor([0])
    model = Plane([1.0, -2.0, 0.5, 3.0])
    one = reprogram_(model, NRPMConfig(lam=1.0))
    both = loss_landscape(one, pixels, labels, eps=0.1, resolution=3, directions=("own", "plain"))
    assert both.cosine == pytest.approx(1.0)
    assert both.losses == pytest.approx(np.array(both.losses).T)
    less = reprogram_(model, NRPMConfig(lam=0.3))
    mixed = loss_landscape(less, pixels, labels, eps=0.1, resolution=3, directions=("plain", "bpda"))
    assert mixed.cosine == pytest.approx(1.0)  # of one layer


@settings(max_examples=30)
@given(st.integers(1, 30), st.integers(0, 10**6), st.floats(0, 1))
def test_random_signs_stand_at_right_angles(size, seed, share):
    generator = torch.Generator().manual_seed(seed)
    against = torch.randn(3, 1, 1, size, generator=generator).sign()
    against[torch.rand(against.shape, generator=generator) < share] = 0
    signs = _random_signs(against, generator)
    assert set(signs.unique().tolist()) <= {-1.0, 1.0}
    odd = (against != 0).flatten(1).sum(1) % 2
    assert torch.equal((signs * against).flatten(1).sum(1), odd.float())


def test_landscapes_repeat_and_do_not_depend_on_the_batch():
    model = timm.create_model(DIGITS, pretrained=True)
    pixels, labels = (t[:17] for t in digits("test"))
    options = {"eps": 0.1, "resolution": 3, "directions": ("own", "plain")}
    whole = loss_landscape(model, pixels, labels, **options)
    assert LossLandscape.from_json(whole.to_json()) == whole
    single = [loss_landscape(model, x[None], y[None], **options).losses for x, y in zip(pixels, labels, strict=True)]
    np.testing.assert_allclose(whole.losses, np.mean(single, 0), rtol=1e-4, atol=1e-6)
    options["directions"] = ("random", "random")
    a, b, c = (loss_landscape(model, pixels[:2], labels[:2], seed=s, **options) for s in (0, 0, 1))
    assert a == b
    assert a.losses != c.losses
    assert a.clean == c.clean
    assert a.cosine == 0.0


def test_what_is_no_number_is_infinite_and_wrong():
    model = Plane([1.0, 1.0])
    model.fc.weight.data[0] = math.nan
    pixels = torch.rand(1, 1, 1, 2, dtype=torch.float64)
    landscape = loss_landscape(model, pixels, torch.tensor([0]), eps=0.1, resolution=3)  # argmax takes it for class 0
    assert landscape.clean == math.inf
    assert landscape.accuracies == ((0.0,) * 3,) * 3
    assert LossLandscape.from_json(landscape.to_json()) == landscape


IMAGE = torch.full((1, 3, 8, 8), 0.5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda net: loss_landscape(net, IMAGE, torch.tensor([5]), eps=0.1),
            "from 5 to 5, and the model has 5 classes: give integers from 0 to 4",
        ),
        (
            lambda net: loss_landscape(net, IMAGE, torch.tensor([-1]), eps=0.1),
            "labels are .* from -1 to -1: give integers >= 0",
        ),
        (lambda net: loss_landscape(net, IMAGE, torch.tensor([0, 1]), eps=0.1), "give 1 integers"),
        (lambda net: loss_landscape(net, IMAGE, torch.tensor([0.0]), eps=0.1), "of torch.float32: give 1 integers"),
        (lambda net: loss_landscape(net, IMAGE * 3, torch.tensor([0]), eps=0.1), "from 1.5 to 1.5: give pixels"),
        (lambda net: loss_landscape(net, IMAGE, torch.tensor([0]), eps=8), "eps=8 is not allowed"),
        (lambda net: loss_landscape(net, IMAGE, torch.tensor([0]), eps=0.1, resolution=4), "odd integer >= 3"),
        (
            lambda net: loss_landscape(net, IMAGE, torch.tensor([0]), eps=0.1, directions=("own", "own")),
            "choose two of own, bpda, plain, random",
        ),
        (lambda net: loss_landscape(net, IMAGE, torch.tensor([0]), eps=0.1, directions="own"), "are not two"),
    ],
)
def test_bad_calls(net, call, message):
    with pytest.raises(ValueError, match=message):
        call(net)
    assert all(p.requires_grad for p in net.parameters())
