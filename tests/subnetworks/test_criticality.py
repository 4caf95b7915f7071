"""Robust criticality against a search over random directions, and what it leaves untouched."""

import math

import pytest
import timm
import torch
import torch.nn.functional as F

from timm_nrpm import Threat
from timm_nrpm.attacks.library import pgd
from timm_nrpm.data.loaders import digits
from timm_nrpm.nn.pixel_model import PixelModel
from timm_nrpm.subnetworks.criticality import criticality
from timm_nrpm.subnetworks.splitting import split

THREAT = Threat("Linf", 0.1)


@pytest.fixture(scope="module")
def images():
    pixels, labels = (part[:60] for part in digits("test"))
    return [(pixels[:40], labels[:40]), (pixels[40:], labels[40:])]


@pytest.fixture
def net():
    return PixelModel(timm.create_model("resnet8_digits", pretrained=True)).eval()


def test_no_random_direction_rises_higher(net, images):
    parts = split(net.model, 2)
    found = criticality(net, images, parts.layers, THREAT, attack_steps=3)
    assert tuple(found) == parts.layers
    attack = pgd(THREAT, 3)
    attacked = [(attack(net, x, y, [number] * len(x)), y) for number, (x, y) in enumerate(images)]

    def loss():
        with torch.no_grad():
            return sum(float(F.cross_entropy(net(x), y, reduction="sum")) for x, y in attacked) / 60

    start = loss()
    for name in ("conv1", "layer2.0.conv2", "fc"):
        weight = dict(net.model.named_modules())[name].weight
        before, highest = weight.detach().clone(), 0.0
        for _ in range(30):
            step = torch.randn(weight.shape)
            with torch.no_grad():
                weight.copy_(before + 0.1 * before.norm() * step / step.norm())
            highest = max(highest, loss() - start)
        with torch.no_grad():
            weight.copy_(before)
        assert found[name] > highest


def test_a_wider_move_rises_higher_and_the_network_is_as_it_was(net, images):
    before = {name: value.clone() for name, value in net.model.state_dict().items()}
    net.model.conv1.weight.requires_grad_(False)
    parts = split(net.model, 2)
    near, far = (
        criticality(net, images, parts.layers, THREAT, radius=radius, attack_steps=2) for radius in (0.05, 0.2)
    )
    assert all(0 < near[name] < far[name] for name in parts.layers)
    assert all(torch.equal(before[name], value) for name, value in net.model.state_dict().items())
    assert not net.model.conv1.weight.requires_grad
    assert net.model.fc.weight.requires_grad
    assert all(parameter.grad is None for parameter in net.parameters())


def test_it_is_the_largest_rise_within_the_radius():
    """Of a weight with two numbers, against a grid over the circle that it may reach."""

    class Small(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(2, 1, bias=False)

        def forward(self, x):
            z = self.layer(x.flatten(1)[:, :2])
            return torch.cat([z.sin(), z.cos() * z], dim=1)

    torch.manual_seed(3)
    net = PixelModel(Small(), mean=(0.0,), std=(1.0,)).eval()
    pixels, labels = torch.rand(30, 1, 2, 2), torch.randint(2, (30,))
    found = criticality(net, [(pixels, labels)], ["layer"], Threat("Linf", 1e-9), radius=0.3, steps=40)["layer"]
    weight = net.model.layer.weight
    start, highest = weight.detach().clone(), 0.0
    with torch.no_grad():
        first = float(F.cross_entropy(net(pixels), labels))
        for angle in torch.linspace(0, 2 * math.pi, 200):
            for share in torch.linspace(0, 1, 20):
                step = 0.3 * start.norm() * share * torch.stack([angle.cos(), angle.sin()])[None]
                weight.copy_(start + step)
                highest = max(highest, float(F.cross_entropy(net(pixels), labels)) - first)
        weight.copy_(start)
    assert found == pytest.approx(highest, rel=0.02)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"radius": 0}, "radius=0"), ({"steps": 0}, "steps=0"), ({"attack_steps": 1.5}, "attack_steps=1.5")],
)
def test_bad_settings_are_refused(net, images, settings, message):
    with pytest.raises(ValueError, match=message):
        criticality(net, images, split(net.model, 2).layers, THREAT, **settings)
    with pytest.raises(ValueError, match="no images"):
        criticality(net, [], split(net.model, 2).layers, THREAT)
    with pytest.raises(ValueError, match="under Linf or L2"):
        criticality(net, images, ["fc"], Threat("L0", 1))
    with pytest.raises(ValueError, match=r"'nope'.* are no layers with a weight"):
        criticality(net, images, ["fc", "nope"], THREAT)
