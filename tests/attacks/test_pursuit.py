import math

import pytest
import torch
from small_models import bowl
from torch import nn

from timm_nrpm import Threat
from timm_nrpm.attacks.gradients import losses
from timm_nrpm.attacks.pursuit import Pursuit, ascend, likely_targets
from timm_nrpm.attacks.random_search import search

SHAPE = (3, 6, 6)
THREATS = [Threat("Linf", 0.1), Threat("L2", 0.7), Threat("L1", 4.0)]


def pursuit(threat, count=8, average=1):
    pixels = torch.rand(count, *SHAPE, generator=torch.Generator().manual_seed(1))
    net = bowl(shape=SHAPE, spread=1 / 4)
    with torch.no_grad():
        labels = net(pixels).argmax(1)
    return Pursuit(net, pixels, labels, threat, average), net


@pytest.mark.parametrize("threat", THREATS, ids=str)
@pytest.mark.parametrize("fresh", [False, True])
def test_points_stay_within_and_only_get_worse(threat, fresh):
    chase, net = pursuit(threat)
    rows = torch.arange(8)
    chase.look(rows, chase.pixels)
    for turn in range(3):
        before = chase.margin.clone()
        options = {"steps": 6, "loss": "margin", "size": 0.5, "momentum": 0.5, "fresh": fresh}
        ascend(chase, rows, net, range(turn, 8 + turn), **options)
        search(chase, rows, range(turn, 8 + turn), queries=10)
        assert (chase.margin >= before).all()
    assert bool(threat.allows(chase.pixels, chase.best).all())
    with torch.no_grad():
        torch.testing.assert_close(losses(net(chase.best), chase.labels, "margin"), chase.margin)
    assert (chase.margin > losses(net(chase.pixels), chase.labels, "margin").detach() + 0.01).all()
    assert torch.equal(chase.right, chase.margin <= 0)


@pytest.mark.parametrize("threat", THREATS[:2], ids=str)
def test_an_ascent_finds_the_maximum_of_a_linear_model(threat):
    net = nn.Sequential(nn.Flatten(), nn.Linear(108, 2))
    pixels, labels = torch.full((3, *SHAPE), 0.5), torch.tensor([0, 1, 0])
    w = net[1].weight.data
    slope = torch.tensor([[1.0], [-1.0], [1.0]]) * (w[1] - w[0])
    gain = threat.eps * (slope.abs().sum(1) if threat.norm == "Linf" else slope.norm(dim=1))
    chase = Pursuit(net, pixels, labels, threat)
    ascend(chase, torch.arange(3), net, range(3), steps=10, loss="margin", size=2.0, momentum=0.5)
    want = losses(net(pixels), labels, "margin").detach() + gain
    broken = chase.margin > 0  # at which an ascent ends
    torch.testing.assert_close(chase.margin[~broken], want[~broken])
    assert torch.equal(broken, want > 0)


def test_what_breaks_on_the_way_counts_and_is_left_alone_then():
    seen = []

    class Trap(nn.Module):
        """Wrong at any point that is not the image itself, but not at the end of the way."""

        def forward(self, x):
            seen.append(len(x))
            moved = (x - 0.5).abs().amax((1, 2, 3)) > 0.05
            return torch.stack([torch.where(moved, -1.0, 1.0), torch.zeros(len(x))], 1) + 0 * x.sum(
                (1, 2, 3)
            ).unsqueeze(1)

    pixels = torch.full((4, *SHAPE), 0.5)
    chase = Pursuit(Trap(), pixels, torch.zeros(4, dtype=torch.long), Threat("Linf", 0.1))
    linear = nn.Sequential(nn.Flatten(), nn.Linear(108, 2))
    ascend(chase, torch.arange(4), linear, range(4), steps=10, loss="margin", size=1.0, momentum=0.0, every=1)
    assert not chase.right.any()
    assert seen == [4]
    assert not len(chase.standing)
    search(chase, chase.standing, [], queries=5)
    assert seen == [4]


@pytest.mark.parametrize("threat", THREATS, ids=str)
def test_an_image_depends_on_its_seed_and_nothing_beside_it(threat):
    whole, net = pursuit(threat)
    options = {"steps": 5, "loss": "cross_entropy", "size": 1.0, "momentum": 0.5}

    def run(chase, rows, seeds):
        chase.look(rows, chase.pixels[rows])
        ascend(chase, rows, net, seeds, **options, fresh=True)
        search(chase, rows, [7 + s for s in seeds], queries=12)

    run(whole, torch.arange(8), list(range(8)))
    for rows in ([3], [7, 2], [5, 4, 1, 0]):
        part, _ = pursuit(threat)
        run(part, torch.tensor(rows), rows)
        torch.testing.assert_close(part.best[rows], whole.best[rows], atol=1e-6, rtol=0)


def test_a_search_pushes_squares_to_the_bound():
    """From the image itself, under Linf, a pixel is where it was or at one end of what is allowed."""
    chase, _ = pursuit(Threat("Linf", 0.1))
    search(chase, torch.arange(8), range(8), queries=30)
    change = chase.best - chase.pixels
    ends = torch.stack([torch.zeros_like(change), (chase.pixels + 0.1).clamp(0, 1) - chase.pixels,
                        (chase.pixels - 0.1).clamp(0, 1) - chase.pixels])  # fmt: skip
    assert ((change - ends).abs().amin(0) < 1e-6).all()
    assert (change != 0).any()


def test_targets_are_ordered_by_gap_over_gradient():
    """Of a linear model both are known: MALT, arXiv 2407.02240, eq. 3."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(108, 5))
    pixels = torch.rand(6, *SHAPE)
    logits = net(pixels).detach()
    labels = logits.argmax(1)
    chase = Pursuit(net, pixels, labels, Threat("Linf", 0.1))
    some = likely_targets(chase, torch.tensor([4, 1]), net, most=4).clone()
    assert some[0].tolist() == [-1] * 4
    found = likely_targets(chase, torch.arange(6), net, most=4)
    assert torch.equal(found[[1, 4]], some[[1, 4]])
    w = net[1].weight.detach()
    for row in range(6):
        label = int(labels[row])
        others = [c for c in range(5) if c != label]
        far = {c: float((logits[row, label] - logits[row, c]) / (w[label] - w[c]).abs().sum()) for c in others}
        assert found[row].tolist() == sorted(others, key=far.__getitem__)
    calls = []
    net.register_forward_hook(lambda *_: calls.append(1))
    assert likely_targets(chase, torch.tensor([2]), net) is likely_targets(chase, torch.arange(6), net)
    assert not calls


def test_logits_that_are_no_numbers_are_wrong_and_the_mean_counts_where_the_forward_is_random():
    pixels, labels = torch.rand(3, *SHAPE), torch.zeros(3, dtype=torch.long)
    nowhere = Pursuit(lambda x: torch.full((len(x), 2), math.nan), pixels, labels, Threat())
    assert not nowhere.look(torch.arange(3), pixels).any()
    logits = iter([torch.tensor([[1.0, 0.0]] * 3), torch.tensor([[0.0, 0.5]] * 3)])
    random = Pursuit(lambda x: next(logits), pixels, labels, Threat(), average=2)
    assert random.look(torch.arange(3), pixels).all()
    torch.testing.assert_close(random.margin, torch.full((3,), -0.25))


def test_a_point_outside_is_brought_back():
    chase, _ = pursuit(Threat("Linf", 0.1))
    chase.look(torch.arange(8), torch.full((8, *SHAPE), 2.0))
    assert bool(chase.threat.allows(chase.pixels, chase.best).all())
