"""Attacks on few pixels and on patches, beside what an exhaustive search finds."""

from functools import partial
from itertools import product

import pytest
import torch
from small_models import SHAPE, bowl
from torch import nn

from timm_nrpm import Threat
from timm_nrpm.attacks import patches
from timm_nrpm.attacks.gradients import losses
from timm_nrpm.attacks.patches import _peaks_first, climbing_patch, paste, random_patch
from timm_nrpm.attacks.pursuit import Pursuit
from timm_nrpm.attacks.sparse import _without_one, exchange, greedy_pixels, random_pixels
from timm_nrpm.attacks.threats import inside


def pursued(attack, net, pixels, labels, threat):
    """The pursuit after an attack on all images."""
    pursuit = Pursuit(net, pixels, labels, threat)
    rows = torch.arange(len(pixels))
    pursuit.look(rows, pixels)
    attack(pursuit, rows, net)
    return pursuit


@pytest.mark.parametrize("count", [1, 3, 100])
def test_greedy_pixels_take_the_best_of_a_linear_model(count):
    """For a linear model the best pixels are those whose best corner changes the margin most: known exactly."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(48, 2))
    pixels, labels = torch.rand(5, *SHAPE), torch.tensor([0, 1, 0, 1, 0])
    threat = Threat("L0", count)
    attacked = greedy_pixels(net, pixels, labels, threat, rounds=4, fooled=False)
    assert bool(threat.allows(pixels, attacked).all())
    w = net[1].weight.data.view(2, *SHAPE)
    slope = torch.where(labels.view(-1, 1, 1, 1) == 0, w[1] - w[0], w[0] - w[1])
    worth = (slope * ((slope > 0).float() - pixels)).sum(1).flatten(1)
    best = worth.sort(1, descending=True).values[:, :count].sum(1)
    gain = losses(net(attacked), labels, "margin") - losses(net(pixels), labels, "margin")
    torch.testing.assert_close(gain.detach(), best, atol=1e-4, rtol=1e-4)


def test_random_pixels_keep_what_helps(batch):
    pixels, labels = batch
    threat, margins = Threat("L0", 3), []
    for queries in (0, 30, 300):
        attacked = random_pixels(bowl(), pixels, labels, threat, range(10), queries=queries)
        assert bool(threat.allows(pixels, attacked).all())
        margins.append(losses(bowl()(attacked), labels, "margin").clamp(max=0).detach())
    assert (margins[1] >= margins[0]).all()
    assert (margins[2] >= margins[1] - 1e-6).float().mean() > 0.7  # another schedule: not for every image
    assert margins[2].mean() > margins[0].mean()
    again = random_pixels(bowl(), pixels[4:6], labels[4:6], threat, [4, 5], queries=300)
    assert torch.equal(again, attacked[4:6])


@pytest.mark.parametrize("side", [1, 2, 9])
def test_a_climbing_patch_takes_the_best_place_of_a_linear_model(side):
    """For a linear model it is the square whose best corners change the margin most: known exactly."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(48, 2))
    pixels, labels = torch.rand(5, *SHAPE), torch.tensor([0, 1, 0, 1, 0])
    threat = Threat("patch", side)
    attacked = climbing_patch(net, pixels, labels, threat, rounds=6, fooled=False)
    assert bool(threat.allows(pixels, attacked).all())
    w = net[1].weight.data.view(2, *SHAPE)
    slope = torch.where(labels.view(-1, 1, 1, 1) == 0, w[1] - w[0], w[0] - w[1])
    worth = (slope * ((slope > 0).float() - pixels)).sum(1)
    span = min(side, 4)
    squares = worth.unfold(1, span, 1).unfold(2, span, 1).sum((3, 4)).flatten(1)
    gain = losses(net(attacked), labels, "margin") - losses(net(pixels), labels, "margin")
    torch.testing.assert_close(gain.detach(), squares.amax(1), atol=1e-4, rtol=1e-4)


def test_a_patch_climbs_where_the_first_corner_is_not_the_best(batch):
    pixels, labels = batch
    threat = Threat("patch", 2)
    margins = [
        losses(
            bowl()(climbing_patch(bowl(), pixels, labels, threat, rounds=rounds, fooled=False)), labels, "margin"
        ).detach()
        for rounds in (2, 40)
    ]
    assert (margins[1] >= margins[0] - 1e-6).all()
    assert margins[1].mean() > margins[0].mean()


def test_a_random_patch_keeps_what_helps(batch):
    pixels, labels = batch
    threat, margins = Threat("patch", 2), []
    for queries in (0, 300):
        attacked = random_patch(bowl(), pixels, labels, threat, range(10), queries=queries)
        assert bool(threat.allows(pixels, attacked).all())
        margins.append(losses(bowl()(attacked), labels, "margin").clamp(max=0).detach())
    assert (margins[1] >= margins[0]).all()
    assert margins[1].mean() > margins[0].mean()
    again = random_patch(bowl(), pixels[4:6], labels[4:6], threat, [4, 5], queries=300)
    assert torch.equal(again, attacked[4:6])


# --- judged by the attacked model -----------------------------------------------------------------------------------


def steep(seed=0, gain=30.0):
    """A two-class model that is always right about class 0, and whose gradient says little about a jump: pixels pass a
    sine of some periods first."""

    class Steep(nn.Module):
        def __init__(self):
            super().__init__()
            generator = torch.Generator().manual_seed(seed)
            self.weight = torch.randn(48, generator=generator)

        def forward(self, x):
            score = (torch.sin(gain / 3 * x).flatten(1) * self.weight).sum(1)
            return torch.stack([torch.full_like(score, 1000.0), score], 1)

    return Steep()


def best_single(net, pixels, labels):
    """The largest margin that one pixel at a corner of its colours can reach, by trying all."""
    best = []
    for image, label in zip(pixels, labels, strict=True):
        changed = []
        for y, x, corner in product(range(4), range(4), product((0.0, 1.0), repeat=3)):
            changed.append(image.clone())
            changed[-1][:, y, x] = torch.tensor(corner)
        best.append(losses(net(torch.stack(changed)), label.repeat(len(changed)), "margin").max().detach())
    return torch.stack(best)


@pytest.mark.parametrize("count", [1, 3, 100])
def test_exchanges_take_the_best_of_a_linear_model(count):
    net = nn.Sequential(nn.Flatten(), nn.Linear(48, 2))
    net[1].bias.data[0] += 1000  # class 0 whatever is changed
    pixels, labels, threat = torch.rand(5, *SHAPE), torch.zeros(5, dtype=torch.long), Threat("L0", count)
    pursuit = pursued(partial(exchange, rounds=20, fresh=True), net, pixels, labels, threat)
    greedy = greedy_pixels(net, pixels, labels, threat, rounds=4, fooled=False)
    assert bool(threat.allows(pixels, pursuit.best).all())
    torch.testing.assert_close(pursuit.margin, losses(net(greedy), labels, "margin").detach())


def test_one_exchange_is_as_good_as_trying_all_where_the_gradient_misleads():
    net, pixels, labels = steep(), torch.rand(8, *SHAPE), torch.zeros(8, dtype=torch.long)
    threat = Threat("L0", 1)
    greedy = losses(net(greedy_pixels(net, pixels, labels, threat, rounds=1, fooled=False)), labels, "margin")
    pursuit = pursued(partial(exchange, rounds=8, fresh=True), net, pixels, labels, threat)
    all_of_its_corners = best_single(net, pixels, labels)
    assert (pursuit.margin >= greedy).all()
    assert (pursuit.margin > greedy + 0.1).sum() >= 4
    assert (pursuit.margin <= all_of_its_corners + 1e-3).all()
    smooth = bowl()
    smooth[3].bias.data[0] += 1000
    pursuit = pursued(partial(exchange, rounds=8, fresh=True), smooth, pixels, labels, threat)
    torch.testing.assert_close(pursuit.margin, best_single(smooth, pixels, labels), atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("attack", "threat", "rounds", "gaining"),
    [(exchange, Threat("L0", 4), (4, 20), 15), (paste, Threat("patch", 2), (2, 30), 10)],
)
def test_attacks_from_the_worst_points_never_lose_and_often_gain(attack, threat, rounds, gaining):
    net, pixels, labels = steep(2), torch.rand(20, *SHAPE), torch.zeros(20, dtype=torch.long)
    margins = []

    def both(pursuit, rows, follow):
        attack(pursuit, rows, follow, rounds=rounds[0], fresh=True)
        margins.append(pursuit.margin.clone())
        attack(pursuit, rows, follow, rounds=rounds[1], fresh=False)

    pursuit = pursued(both, net, pixels, labels, threat)
    assert bool(threat.allows(pixels, pursuit.best).all())
    assert (pursuit.margin >= margins[0]).all()
    assert (pursuit.margin > margins[0] + 0.1).sum() >= gaining


@pytest.mark.parametrize(("attack", "threat"), [(exchange, Threat("L0", 3)), (paste, Threat("patch", 2))])
def test_there_may_be_no_worst_point_yet_and_no_image_left(batch, attack, threat):
    """The model may fail on an empty batch, as that of users may."""
    pixels, labels = batch

    def careful(x):
        assert len(x)
        return bowl()(x)

    pursuit = Pursuit(careful, pixels, labels, threat)
    attack(pursuit, torch.arange(10), careful, rounds=9, fresh=False)
    assert bool(threat.allows(pixels, pursuit.best).all())
    fallen = Pursuit(careful, pixels, (labels + 1) % 3, threat)  # wrong on every point, from the first
    attack(fallen, torch.arange(10), careful, rounds=9, fresh=True)
    attack(fallen, torch.arange(10), careful, rounds=9, fresh=False)
    assert not fallen.right.any()


@pytest.mark.parametrize("count", [4, 9])
def test_as_many_pixels_are_changed_as_may(count):
    """Each round adds one, also where the gradient would rather flip those that changed before."""
    net, pixels, labels = steep(gain=3.0), torch.rand(8, *SHAPE), torch.zeros(8, dtype=torch.long)
    tried = []
    pursuit = Pursuit(net, pixels, labels, Threat("L0", count))
    look = pursuit.judge
    pursuit.judge = lambda rows, images: tried.append((images != pixels).any(1).flatten(1).sum(1)) or look(rows, images)
    exchange(pursuit, torch.arange(8), net, rounds=2 * count, fresh=True)
    most = torch.stack(tried[1:]).view(2 * count, -1, 8).amax(1)  # of a round, and a pixel may already have its corner
    assert torch.equal(most[:count], torch.arange(1, count + 1).unsqueeze(1).expand(-1, 8))
    assert (most[count:] == count).all()


def test_the_change_that_the_gradient_would_miss_least_is_undone():
    pixels = torch.full((2, 1, 2, 2), 0.5)
    x = torch.tensor([[1.0, 1.0], [0.0, 0.5]]).expand(2, 1, 2, 2)
    gradient = torch.tensor([[3.0, 1.0], [-2.0, 9.0]]).expand(2, 1, 2, 2)  # undoing loses 1.5, 0.5 and 1
    changed = (x != pixels).any(1).flatten(1)
    undone = _without_one(pixels, x, gradient, changed, torch.tensor([0, 2]))
    assert undone[0].flatten().tolist() == [1.0, 0.5, 0.0, 0.5]
    assert undone[1].flatten().tolist() == [0.5, 1.0, 0.0, 0.5]


def test_more_pixels_than_rounds_are_changed_beforehand():
    net, pixels, labels, threat = bowl(), torch.rand(4, *SHAPE), torch.zeros(4, dtype=torch.long), Threat("L0", 12)
    net[3].bias.data[0] += 1000
    pursuit = pursued(partial(exchange, rounds=6, fresh=True), net, pixels, labels, threat)
    assert ((pursuit.best != pixels).any(1).flatten(1).sum(1) >= 9).all()


@pytest.mark.parametrize(("attack", "threat"), [(exchange, Threat("L0", 3)), (paste, Threat("patch", 2))])
def test_an_image_falls_whatever_is_beside_it(batch, attack, threat):
    pixels, labels = batch
    together = pursued(partial(attack, rounds=9, fresh=True), bowl(), pixels, labels, threat)
    alone = pursued(partial(attack, rounds=9, fresh=True), bowl(), pixels[6:7], labels[6:7], threat)
    torch.testing.assert_close(alone.best[0], together.best[6], atol=1e-5, rtol=1e-5)
    assert alone.right[0] == together.right[6]
    assert together.right.sum() < together.pixels.shape[0]


@pytest.mark.parametrize("side", [1, 2, 9])
def test_a_pasted_patch_is_as_good_as_all_places_of_corners(side):
    net, pixels, labels = steep(1), torch.rand(6, *SHAPE), torch.zeros(6, dtype=torch.long)
    threat, span = Threat("patch", side), min(side, 4)
    x = pixels.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(losses(net(x), labels, "margin").sum(), x)
    corner, tried = (gradient > 0).float(), []
    for top, left in product(range(5 - span), repeat=2):
        mask = inside(pixels, torch.tensor([top] * 6), torch.tensor([left] * 6), span, span)
        tried.append(losses(net(torch.where(mask, corner, pixels)), labels, "margin").detach())
    pursuit = pursued(partial(paste, rounds=9, fresh=True), net, pixels, labels, threat)
    assert bool(threat.allows(pixels, pursuit.best).all())
    assert (pursuit.margin >= torch.stack(tried).amax(0) - 1e-4).all()


def test_a_patch_is_tried_at_three_places_apart(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(1024, 2))
    net[1].weight.data = torch.randn(2, 32, 32, generator=generator).cumsum(1).cumsum(2).view(2, -1) / 100
    net[1].bias.data = torch.tensor([1000.0, 0.0])
    masks = []
    monkeypatch.setattr(patches, "_climb", lambda *given: masks.append(given[4]))
    pixels, labels = torch.rand(6, 1, 32, 32), torch.zeros(6, dtype=torch.long)
    pursued(partial(paste, rounds=12, fresh=True), net, pixels, labels, Threat("patch", 10))
    assert len(masks) == 3
    assert all((mask.flatten(1).sum(1) == 100).all() for mask in masks)
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert ((masks[one] & masks[other]).flatten(1).sum(1) <= 50).all()


def test_places_are_ordered_by_what_they_promise_within_a_window_first():
    promise = torch.tensor([[[5.0, 4.0, 0.0, 1.0], [3.0, 2.0, 0.5, 0.25]]])
    # 5 and 1 are the largest in the three by three places around them.
    assert promise.flatten()[_peaks_first(promise, 3)[0]].tolist() == [5.0, 1.0, 4.0, 3.0, 2.0, 0.5, 0.25, 0.0]
    assert _peaks_first(promise, 1)[0].tolist() == promise.flatten().argsort(descending=True).tolist()
