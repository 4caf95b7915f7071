"""Every loss against NumPy in float64, on the logits of a fixed model and batch."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from loss_oracles import (
    comp_sum_of,
    cross_entropy,
    divergence,
    kl_dro_of,
    margins,
    mart_of,
    separation_of,
    softmax,
    taught_of,
    weat_of,
)
from torch import nn

from timm_nrpm.tuning import losses
from timm_nrpm.tuning.losses import (
    adversarial,
    both,
    clean,
    comp_sum,
    kl_dro,
    mart,
    sat,
    separation,
    srat,
    taught,
    trades,
    weat,
    with_features,
)

CLASSES = 4


@pytest.fixture
def batch():
    """A model whose logits are linear in the pixels, images, the same moved a little, and labels."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, CLASSES)).double()
    pixels = torch.rand(6, 3, 2, 2, dtype=torch.float64)
    attacked = (pixels + 0.3 * torch.randn_like(pixels)).clamp(0, 1)
    return net, pixels, attacked, torch.tensor([0, 1, 2, 3, 0, 1])


def value(loss) -> float:
    return float(loss.value.detach())


def logits_of(net, *images):
    return [net(x).detach().numpy() for x in images]


def test_clean_and_adversarial(batch):
    net, pixels, attacked, labels = batch
    z, moved = logits_of(net, pixels, attacked)
    assert value(clean(net, *batch[1:])) == pytest.approx(cross_entropy(z, labels.numpy()).mean(), rel=1e-12)
    want = cross_entropy(moved, labels.numpy()).mean()
    assert value(adversarial(net, *batch[1:])) == pytest.approx(want, rel=1e-12)
    want += cross_entropy(z, labels.numpy()).mean()
    assert value(both(net, *batch[1:])) == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("beta", [0.2, 2.0, 6.0])
def test_trades(batch, beta):
    net, pixels, attacked, labels = batch
    z, moved = logits_of(net, pixels, attacked)
    want = (cross_entropy(z, labels.numpy()) + beta * divergence(softmax(z), softmax(moved))).mean()
    assert value(trades(net, *batch[1:], beta)) == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("beta", [0.5, 6.0])
def test_mart(batch, beta):
    net, pixels, attacked, labels = batch
    want = mart_of(*logits_of(net, pixels, attacked), labels.numpy(), beta)
    assert value(mart(net, *batch[1:], beta)) == pytest.approx(want, rel=1e-12)


def test_mart_of_a_certain_mistake_is_finite():
    """The boost is -log(1 - p), and in float32 p of another class can be 1."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, CLASSES))
    with torch.no_grad():
        net[1].weight.zero_()
        net[1].bias.copy_(torch.tensor([100.0, 0, 0, 0]))
    x = torch.rand(2, 3, 2, 2)
    loss = mart(net, x, x, torch.tensor([1, 2]), 6.0).value
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize("beta", [0.5, 6.0])
def test_weat(batch, beta):
    net, pixels, attacked, labels = batch
    want = weat_of(*logits_of(net, pixels, attacked), labels.numpy(), beta)
    assert value(weat(net, *batch[1:], beta)) == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("temperature", [0.1, 1.0, 5.0])
def test_kl_dro(batch, temperature):
    net, _, attacked, labels = batch
    moved = logits_of(net, attacked)[0]
    want = kl_dro_of(moved, labels.numpy(), temperature)
    assert value(kl_dro(net, *batch[1:], temperature)) == pytest.approx(want, rel=1e-12)


def test_kl_dro_is_the_worst_weighting(batch):
    """The largest value of `sum w CE - r KL(w || uniform)`, which no other weighting exceeds and a softmax attains."""
    net, _, attacked, labels = batch
    each, r = cross_entropy(logits_of(net, attacked)[0], labels.numpy()), 0.7
    found = value(kl_dro(net, *batch[1:], r))

    def reached(w):
        return (w * each).sum() - r * (w * np.log(w * len(w))).sum()

    drawn = np.random.default_rng(0).dirichlet(np.ones(len(each)), size=2000)
    assert max(reached(w) for w in drawn) < found
    best = np.exp(each / r) / np.exp(each / r).sum()
    assert reached(best) == pytest.approx(found, rel=1e-12)
    gradient = torch.autograd.grad(kl_dro(net, *batch[1:], r).value, net[1].weight)[0]
    weighted = nn.functional.cross_entropy(net(attacked), labels, reduction="none") @ torch.tensor(best)
    torch.testing.assert_close(gradient, torch.autograd.grad(weighted, net[1].weight)[0])


def test_kl_dro_lies_between_the_mean_and_the_worst_image(batch):
    net, _, attacked, labels = batch
    each = cross_entropy(logits_of(net, attacked)[0], labels.numpy())
    found = [value(kl_dro(net, *batch[1:], r)) for r in (1e4, 1.0, 1e-3)]
    assert found[0] == pytest.approx(each.mean(), rel=1e-4)
    assert found[2] == pytest.approx(each.max(), rel=1e-2)
    assert found == sorted(found)


@pytest.mark.parametrize("beta", [0.5, 6.0])
def test_comp_sum(batch, beta):
    net, pixels, attacked, labels = batch
    want = comp_sum_of(*logits_of(net, pixels, attacked), labels.numpy(), beta)
    assert value(comp_sum(net, *batch[1:], beta)) == pytest.approx(want, rel=1e-12)


@given(st.lists(st.floats(-5, 5), min_size=2 * CLASSES, max_size=2 * CLASSES), st.integers(0, CLASSES - 1))
def test_comp_sum_bounds_the_adversarial_loss_of_margins(logits, label):
    """From `sqrt(N - 1)` on, nu makes it an upper bound of `log(1 + sum min(1, max(0, 1 - margin)))` after the change,
    which is what the paper's consistency rests on."""
    z, moved = torch.tensor(logits, dtype=torch.float64).view(2, 1, CLASSES)
    bounded = math.log(1 + sum(np.clip(1 - margins(moved[0].numpy(), label), 0, 1)))
    found = comp_sum(lambda given: given, z, moved, torch.tensor([label]), math.sqrt(CLASSES - 1))
    assert value(found) >= bounded - 1e-9


def test_comp_sum_of_images_that_nothing_changed_has_a_gradient(batch):
    net, pixels, _, labels = batch
    loss = comp_sum(net, pixels, pixels, labels, 6.0).value
    assert torch.autograd.grad(loss, net[1].weight)[0].isfinite().all()


@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_srat(batch, temperature):
    net, _, attacked, labels = batch
    weights = torch.tensor([0.5, 1.0, 2.0, 0.1], dtype=torch.float64)
    moved, features = logits_of(net, attacked)[0], attacked.flatten(1)
    reweighted = (weights[labels].numpy() * cross_entropy(moved, labels.numpy())).mean()
    want = reweighted + 3 * separation_of(features.numpy(), labels.numpy(), temperature)
    f = lambda x: with_features(net, net[1], x)  # noqa: E731
    found = srat(f, *batch[1:], weights, 3.0, temperature)
    assert value(found) == pytest.approx(want, rel=1e-6)  # similarities are in float32
    np.testing.assert_allclose(found.attacked.detach().numpy(), moved)


def test_the_separation_falls_as_classes_come_apart():
    labels = torch.tensor([0, 0, 1, 1])
    together = torch.tensor([[1.0, 0], [0, 1], [1, 0.1], [0.1, 1]])
    apart = torch.tensor([[1.0, 0], [1, 0.1], [0, 1], [0.1, 1]])
    assert float(separation(apart, labels, 0.1)) < 0.01 < float(separation(together, labels, 0.1))


@pytest.mark.parametrize("labels", [[0], [0, 1, 2]])
def test_images_alone_of_their_class_have_no_separation(labels):
    features = torch.randn(len(labels), 5, requires_grad=True)
    found = separation(features, torch.tensor(labels), 0.1)
    found.backward()
    assert float(found.detach()) == 0.0
    assert features.grad.isfinite().all()


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_taught(batch, temperature):
    net, pixels, attacked, labels = batch
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(12, CLASSES)).double()
    ours, theirs = logits_of(net, pixels, attacked), logits_of(teacher, pixels, attacked)
    want = taught_of(theirs, ours, labels.numpy(), temperature)
    found = taught(net, teacher, pixels, attacked, labels, temperature)
    assert value(found) == pytest.approx(want, rel=1e-12)
    found.value.backward()
    assert all(p.grad is None for p in teacher.parameters())


def test_a_teacher_that_knows_nothing_leaves_the_labels_to_teach(batch):
    net, pixels, attacked, labels = batch
    blank = lambda x: torch.zeros(len(x), CLASSES, dtype=torch.float64)  # noqa: E731
    found = value(taught(net, blank, pixels, attacked, labels, 2.0))
    assert found == pytest.approx(value(both(net, pixels, attacked, labels)), rel=1e-12)


def test_gradients_reach_what_the_papers_differentiate(batch):
    """TRADES and MART differentiate the clean prediction too; SAT's targets take no gradient."""
    net, pixels, attacked, labels = batch

    def slope(loss):
        return torch.autograd.grad(loss.value, net[1].weight)[0].numpy()

    def numeric(f):
        weight, h = net[1].weight.detach(), 1e-6
        result = np.zeros(weight.shape)
        for i in np.ndindex(*weight.shape):
            values = []
            for sign in (1, -1):
                weight[i] += sign * h
                values.append(f(*logits_of(net, pixels, attacked)))
                weight[i] -= sign * h
            result[i] = (values[0] - values[1]) / (2 * h)
        return result

    y = labels.numpy()
    want = numeric(lambda z, m: (cross_entropy(z, y) + 2 * divergence(softmax(z), softmax(m))).mean())
    np.testing.assert_allclose(slope(trades(net, *batch[1:], 2.0)), want, atol=1e-8)
    want = numeric(lambda z, m: mart_of(z, m, y, 3.0))
    np.testing.assert_allclose(slope(mart(net, *batch[1:], 3.0)), want, atol=1e-8)
    fixed = softmax(logits_of(net, pixels)[0])
    want = numeric(lambda z, m: (-(fixed * np.log(softmax(z))).sum(1) + 2 * divergence(softmax(z), softmax(m))).mean())
    got = sat(net, pixels, attacked, lambda z: z.softmax(1), 2.0)
    np.testing.assert_allclose(slope(got), want, atol=1e-8)


def test_energy_weights_take_no_gradient(batch):
    net, pixels, attacked, labels = batch
    fixed = 1 / nn.functional.softplus(torch.logsumexp(net(pixels).detach(), 1).abs())
    each = nn.functional.cross_entropy(net(attacked), labels, reduction="none")
    each = each + 2 * losses.divergence(net(pixels), net(attacked))
    want = torch.autograd.grad((fixed * each).mean(), net[1].weight)[0]
    torch.testing.assert_close(torch.autograd.grad(weat(net, *batch[1:], 2.0).value, net[1].weight)[0], want)
