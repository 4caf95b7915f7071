"""Robust criticality against a search over random directions, and what it leaves untouched."""

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


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"radius": 0}, "radius=0"), ({"steps": 0}, "steps=0"), ({"attack_steps": 1.5}, "attack_steps=1.5")],
)
def test_bad_settings_are_refused(net, images, settings, message):
    with pytest.raises(ValueError, match=message):
        criticality(net, images, split(net.model, 2).layers, THREAT, **settings)
    with pytest.raises(ValueError, match="no images"):
        criticality(net, [], split(net.model, 2).layers, THREAT)
