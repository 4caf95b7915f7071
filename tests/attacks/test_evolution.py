import math

import pytest
import torch
from torch import nn

from timm_nrpm import Threat
from timm_nrpm.attacks import evolution
from timm_nrpm.attacks.evolution import HERD, Herd, evolve
from timm_nrpm.attacks.gradients import losses
from timm_nrpm.attacks.pursuit import Pursuit, ascend
from timm_nrpm.attacks.random_search import search

SHAPE = (3, 6, 6)
THREATS = [Threat("Linf", 0.05), Threat("L2", 0.4), Threat("L1", 2.0)]
OPTIONS = {"steps": 4, "queries": 30}


def bowl():
    """A smooth three-class model on pixels."""
    generator = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(108, 16), nn.Tanh(), nn.Linear(16, 3))
    for parameter in net.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) / 4
    return net


def pursuit(threat, count=6):
    """One whose images were looked at, with its model."""
    pixels = torch.rand(count, *SHAPE, generator=torch.Generator().manual_seed(1))
    net = bowl()
    with torch.no_grad():
        labels = net(pixels).argmax(1)
    chase = Pursuit(net, pixels, labels, threat)
    chase.look(torch.arange(count), pixels)
    return chase, net


@pytest.mark.parametrize("threat", THREATS, ids=str)
def test_the_worst_of_a_herd_is_kept(threat):
    chase, net = pursuit(threat)
    before = chase.margin.clone()
    evolve(chase, torch.arange(6), net, list(range(6)), **OPTIONS)
    assert bool(threat.allows(chase.pixels, chase.best).all())
    assert (chase.margin > before).all()
    assert torch.equal(chase.first, before)
    with torch.no_grad():
        torch.testing.assert_close(losses(net(chase.best), chase.labels, "margin"), chase.margin)
        assert torch.equal(chase.right, net(chase.best).argmax(1) == chase.labels)


def test_nothing_is_forgotten_and_other_images_are_left_alone():
    chase, net = pursuit(THREATS[0])
    ascend(chase, torch.arange(6), net, range(6), steps=20, loss="margin", size=1.0, momentum=0.5)
    best, margin = chase.best.clone(), chase.margin.clone()
    evolve(chase, torch.tensor([1, 4]), net, [1, 4], **{**OPTIONS, "steps": 1, "queries": 0})
    assert (chase.margin >= margin).all()
    others = [0, 2, 3, 5]
    assert torch.equal(chase.best[others], best[others])
    evolve(chase, torch.tensor([], dtype=torch.long), net, [], **OPTIONS)


@pytest.mark.parametrize("threat", THREATS, ids=str)
def test_an_image_depends_on_its_seed_and_nothing_beside_it(threat):
    whole, net = pursuit(threat)
    evolve(whole, torch.arange(6), net, list(range(6)), **OPTIONS)
    for rows in ([3], [5, 2]):
        part, _ = pursuit(threat)
        evolve(part, torch.tensor(rows), net, rows, **OPTIONS)
        torch.testing.assert_close(part.best[rows], whole.best[rows], atol=1e-6, rtol=0)


def test_a_herd_is_done_when_one_of_it_breaks_the_image():
    seen = []

    def trap(x):
        """Wrong where the first value is high."""
        seen.append(len(x))
        return torch.stack([torch.zeros(len(x)), x[:, 0, 0, 0] - 0.55], 1)

    pixels = torch.full((2, *SHAPE), 0.5)
    chase = Pursuit(trap, pixels, torch.zeros(2, dtype=torch.long), Threat("Linf", 0.1))
    herd = Herd(chase, torch.tensor([0, 1]))
    assert len(herd.pixels) == 2 * HERD
    point = pixels[:1].clone()
    point[:, 0, 0, 0] = 0.6
    kept = herd.look(torch.tensor([3, 4, HERD + 1]), torch.cat([point, pixels]))
    assert kept.tolist() == [False, False, True]
    assert herd.standing.tolist() == list(range(HERD, 2 * HERD))
    seen.clear()
    search(herd, torch.arange(2 * HERD), range(2 * HERD), queries=1, herd=HERD)
    assert seen == [HERD]


def test_what_two_points_of_a_herd_have_found_comes_together():
    """Two halves of an image, each of which only one point has right: no single change of one point can raise the
    margin of this model, since it counts whole halves."""

    def halves(x):
        left, right = x[:, 0, :, :3] > 0.55, x[:, 0, :, 3:] > 0.55
        count = left.flatten(1).all(1).float() + right.flatten(1).all(1)
        return torch.stack([torch.full((len(x),), 1.5), count], 1)

    def chased(herd_size):
        pixels = torch.full((HERD, 1, 6, 6), 0.5)
        chase = Pursuit(halves, pixels, torch.zeros(HERD, dtype=torch.long), Threat("Linf", 0.1))
        points = pixels.clone()
        points[0, :, :, :3] = 0.6
        points[1:, :, :, 3:] = 0.6
        chase.look(torch.arange(HERD), points)
        search(chase, torch.arange(HERD), range(HERD), queries=600, herd=herd_size)
        return bool(chase.right.all())

    assert chased(1)
    assert not chased(HERD)


def test_points_of_a_herd_climb_to_where_no_square_leads(monkeypatch):
    """Each value is best at another place well within the bound: squares go to the bound."""
    pixels = torch.full((1, *SHAPE), 0.5)
    top = pixels + 0.1 * (torch.rand(SHAPE, generator=torch.Generator().manual_seed(2)) - 0.5)

    def hill(x):
        return torch.stack([1 + (x - top).abs().mean((1, 2, 3)), torch.zeros(len(x))], 1)

    def missing():
        chase = Pursuit(hill, pixels, torch.zeros(1, dtype=torch.long), Threat("Linf", 0.1))
        chase.look(torch.arange(1), pixels)
        evolve(chase, torch.arange(1), hill, [0], steps=20, queries=40)
        return -1 - float(chase.margin)

    climbing = missing()
    monkeypatch.setattr(evolution, "CLIMB", 0.0)
    assert climbing < 0.6 * missing()


def test_an_image_that_no_number_describes_is_broken():
    chase = Pursuit(lambda x: torch.full((len(x), 2), math.nan), torch.rand(2, *SHAPE), torch.zeros(2).long(), Threat())
    herd = Herd(chase, torch.arange(2))
    assert not herd.look(torch.arange(2 * HERD), herd.pixels).any()


def test_a_herd_that_does_not_move_rests_after_half_of_its_search():
    asked = {0: 0, 1: 0}

    def one_moves(x):
        """The margin of bright images rises with their first value, and that of dark ones is flat."""
        bright = x[:, 0, 0, 1] > 0.5
        asked[0] += int((~bright).sum())
        asked[1] += int(bright.sum())
        return torch.stack([torch.ones(len(x)), torch.where(bright, x[:, 0, 0, 0], 0.5) + 0 * x.sum((1, 2, 3))], 1)

    pixels = torch.cat([torch.full((1, *SHAPE), 0.2), torch.full((1, *SHAPE), 0.8)])
    chase = Pursuit(one_moves, pixels, torch.zeros(2, dtype=torch.long), Threat("Linf", 0.1))
    chase.look(torch.arange(2), pixels)
    asked.update({0: 0, 1: 0})
    evolve(chase, torch.arange(2), one_moves, [0, 1], steps=1, queries=20)
    assert asked[1] - asked[0] == 10 * HERD
