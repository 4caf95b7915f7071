"""The second attack under L0, beside all changes of a small image."""

from itertools import combinations, product
from pathlib import Path

import pytest
import torch
from torch import nn

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.mark.parametrize("count", [1, 2])
def test_the_search_of_pixels_finds_what_all_changes_find(monkeypatch, count):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    from pixel_search import survives

    generator = torch.Generator().manual_seed(3)
    net = nn.Sequential(nn.Flatten(), nn.Linear(9, 12), nn.Tanh(), nn.Linear(12, 3))
    for parameter in net.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    net[1].weight.data *= 0.7 / count  # so that some images stand
    found, truth = [], []
    for image in torch.rand(30, 1, 3, 3, generator=generator):
        label = int(net(image[None]).argmax())
        found.append(survives(net, net, image, label, count))
        changed = []
        for places, values in product(combinations(range(9), count), product((0.0, 1.0), repeat=count)):
            changed.append(image.flatten().clone())
            changed[-1][list(places)] = torch.tensor(values)
        truth.append(bool((net(torch.stack(changed).view(-1, 1, 3, 3)).argmax(1) == label).all()))
    assert 3 < sum(truth) < 27
    assert all(ours >= theirs for ours, theirs in zip(found, truth, strict=True))  # it never claims too much
    assert sum(found) - sum(truth) <= count - 1  # a beam of two misses few pairs
    assert survives(net, net, torch.zeros(1, 3, 3), int(net(torch.zeros(1, 1, 3, 3)).argmax()), 0)
