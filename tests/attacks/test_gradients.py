import math

import numpy as np
import pytest
import torch
from small_models import SHAPE, bowl
from torch import nn

from timm_nrpm import Threat
from timm_nrpm.attacks.apgd import checkpoints, climb
from timm_nrpm.attacks.carlini_wagner import carlini_wagner
from timm_nrpm.attacks.gradients import direction, losses

THREATS = [Threat("Linf", 0.1), Threat("L2", 0.7), Threat("L1", 4.0)]


@pytest.mark.parametrize("loss", ["cross_entropy", "margin"])
def test_losses_against_numpy(loss):
    logits, labels = torch.randn(7, 5), torch.tensor([0, 1, 2, 3, 4, 0, 1])
    z = logits.double().numpy()
    own = z[np.arange(7), labels]
    if loss == "cross_entropy":
        want = np.log(np.exp(z).sum(1)) - own
    else:
        others = z.copy()
        others[np.arange(7), labels] = -np.inf
        want = others.max(1) - own
        target = torch.tensor([1, 2, 3, 4, 0, 1, 2])
        np.testing.assert_allclose(losses(logits, labels, loss, target), z[np.arange(7), target] - own, rtol=1e-5)
    np.testing.assert_allclose(losses(logits, labels, loss), want, rtol=1e-5)


def test_checkpoints_are_the_papers():
    """arXiv 2003.01690, section 3.1: p_0 = 0, p_1 = 0.22, p_{j+1} = p_j + max(p_j - p_{j-1} - 0.03, 0.06)."""
    assert sorted(checkpoints(100))[:7] == [22, 41, 57, 70, 80, 87, 93]


@pytest.mark.parametrize("threat", THREATS, ids=str)
def test_direction_is_steepest(threat):
    gradient, x = torch.randn(4, *SHAPE), torch.full((4, *SHAPE), 0.5)
    share = torch.tensor([0.02, 0.1, 0.5, 1.0])
    step = direction(gradient, threat, x, share)
    length = threat.distance(torch.zeros_like(step), step)
    torch.testing.assert_close(length, torch.ones(4, dtype=torch.float64), atol=1e-5, rtol=0)
    assert (direction(torch.zeros_like(gradient), threat, x, share) == 0).all()
    if threat.norm == "L1":
        assert (step != 0).flatten(1).sum(1).tolist() == [1, 4, 24, 48]
        ends = torch.where(gradient > 0, 1.0, 0.0)
        assert (direction(gradient, threat, ends, share) == 0).all()  # nowhere to go
    if threat.norm == "L2":
        torch.testing.assert_close(step, gradient / gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1))


@pytest.mark.parametrize("threat", THREATS, ids=str)
@pytest.mark.parametrize("loss", ["cross_entropy", "margin"])
def test_climb_stays_within_and_climbs(batch, threat, loss):
    model, (pixels, labels) = bowl(), batch
    attacked, trace = climb(model, pixels, labels, threat, range(10), steps=30, loss=loss, fooled=False)
    assert bool(threat.allows(pixels, attacked).all())
    got, before = losses(model(attacked), labels, loss), losses(model(pixels), labels, loss)
    assert (got > before + 0.01).all()
    torch.testing.assert_close(got.detach(), trace[-1])  # what it returns is the best it saw
    assert (trace[1:] >= trace[:-1]).all()


@pytest.mark.parametrize(
    "threat", [Threat("Linf", 0.03), Threat("L2", 0.5), Threat("L1", 4.0), Threat("L1", 12.0)], ids=str
)
def test_climb_finds_the_maximum_of_a_linear_model(threat):
    """On 3 x 32 x 32; under Linf and L2 the best change is known in closed form, under L1 it spends eps on the steepest
    pixels."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(3072, 2))
    pixels, labels = torch.full((3, 3, 32, 32), 0.5), torch.tensor([0, 1, 0])
    w = net[1].weight.data.double()
    sign = torch.tensor([1.0, -1.0, 1.0]).view(3, 1)
    slope = sign * (w[1] - w[0])
    if threat.norm == "Linf":
        gain = threat.eps * slope.abs().sum(1)
    elif threat.norm == "L2":
        gain = threat.eps * slope.norm(dim=1)
    else:
        largest = slope.abs().sort(1, descending=True).values  # half a unit into each until eps is spent
        gain = 0.5 * largest[:, : int(threat.eps / 0.5)].sum(1)
    want = losses(net(pixels), labels, "margin").double() + gain
    attacked, _ = climb(net, pixels, labels, threat, [1, 2, 3], steps=50, loss="margin", fooled=False)
    got = losses(net(attacked), labels, "margin").double()
    share = (got - want + gain) / gain
    assert (share > (0.97 if threat.norm == "L1" else 0.999)).all(), share


@pytest.mark.parametrize("threat", THREATS, ids=str)
def test_an_image_depends_on_its_seed_and_nothing_beside_it(batch, threat):
    pixels, labels = batch
    whole, trace = climb(bowl(), pixels, labels, threat, range(10), steps=12)
    for rows in ([3], [7, 2], list(range(9, -1, -1))):
        alone, part = climb(bowl(), pixels[rows], labels[rows], threat, rows, steps=12)
        torch.testing.assert_close(alone, whole[rows], atol=1e-6, rtol=0)
        torch.testing.assert_close(part, trace[:, rows], atol=1e-5, rtol=1e-5, equal_nan=True)


def test_it_stops_where_the_model_is_fooled(batch):
    pixels, labels = batch
    threat, seen = Threat("Linf", 0.5), []

    def follow(x):
        seen.append(len(x))
        return bowl()(x)

    attacked, trace = climb(follow, pixels, labels, threat, range(10), steps=20)
    wrong = bowl()(attacked).argmax(1) != labels
    assert wrong.any()
    assert torch.equal(wrong, trace[-1].isnan())
    assert seen[0] == 10
    assert sum(seen) < 10 * len(seen) or len(seen) < 21
    assert seen == sorted(seen, reverse=True)


def test_a_target_is_approached(batch):
    pixels, labels = batch
    target = (labels + 1) % 3
    attacked, _ = climb(
        bowl(), pixels, labels, Threat("Linf", 0.5), range(10), steps=20, loss="margin", target=target, fooled=False
    )
    assert (bowl()(attacked).argmax(1) == target).float().mean() > 0.8


def test_average_tames_a_random_forward():
    """Gradients of a noisy linear model point nowhere; the mean of many points where the linear model does."""
    from timm_nrpm.attacks.gradients import slope

    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(48, 2))

    def noisy(x):
        return net(x) + (torch.randn(48, 2) * x.flatten(1).unsqueeze(2)).sum(1)

    pixels, labels = torch.rand(4, *SHAPE), torch.zeros(4, dtype=torch.long)
    true = slope(net, pixels, labels, "margin", None, 1)[2].flatten()
    cosines = [
        torch.cosine_similarity(slope(noisy, pixels, labels, "margin", None, n)[2].flatten(), true, dim=0)
        for n in (1, 512)
    ]
    assert cosines[1] > cosines[0] + 0.4


def test_carlini_wagner_finds_the_distance_to_the_boundary():
    """Of a linear model it is |margin| / |slope|, known exactly."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Flatten(), nn.Linear(48, 2))
    pixels = 0.3 + 0.4 * torch.rand(6, *SHAPE)
    labels = net(pixels).argmax(1)
    w = net[1].weight.data
    want = losses(net(pixels), labels, "margin").abs() / (w[1] - w[0]).norm()
    attacked = carlini_wagner(net, pixels, labels, steps=150)
    assert (net(attacked).argmax(1) != labels).all()
    got = (attacked - pixels).flatten(1).norm(dim=1)
    assert (got >= want * 0.999).all()
    torch.testing.assert_close(got, want.detach(), atol=0.02, rtol=0.1)
    assert attacked.min() >= 0
    assert attacked.max() <= 1


def test_carlini_wagner_gives_back_what_it_cannot_fool():
    net = nn.Sequential(nn.Flatten(), nn.Linear(48, 2))
    net[1].weight.data.zero_()
    net[1].bias.data = torch.tensor([1.0, 0.0])
    pixels = torch.rand(2, *SHAPE)
    assert torch.equal(carlini_wagner(net, pixels, torch.tensor([0, 0]), steps=5, searches=2), pixels)


def test_a_gradient_that_is_no_number_stands_still(batch):
    pixels, labels = batch

    def cliff(x):
        return bowl()(x) + (x[:, :1, 0, 0] - x[:, :1, 0, 0]).abs().sqrt() * math.inf

    attacked, _ = climb(cliff, pixels, labels, THREATS[0], range(10), steps=3)
    assert bool(THREATS[0].allows(pixels, attacked).all())
