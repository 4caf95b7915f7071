"""Every loss against NumPy in float64, on the logits of a fixed model and batch."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from timm_nrpm import NRPMConfig, Threat, TuneConfig, reprogram_
from timm_nrpm.nn.pixel_model import PixelModel
from timm_nrpm.tuning.objectives import KINDS, Objective, adversarial, both, clean, mart, sat, trades

CLASSES = 4


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def cross_entropy(z: np.ndarray, y: np.ndarray) -> np.ndarray:
    return -np.log(softmax(z)[np.arange(len(y)), y])


def divergence(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    return (p * (np.log(p) - np.log(q))).sum(1)


def mart_of(z: np.ndarray, moved: np.ndarray, y: np.ndarray, beta: float) -> float:
    """Image by image, as equation 11 reads."""
    total = 0.0
    for row, other, label in zip(softmax(z), softmax(moved), y, strict=True):
        boosted = -math.log(other[label]) - math.log(1 - max(np.delete(other, label)))
        total += boosted + beta * sum(row * np.log(row / other)) * (1 - row[label])
    return total / len(y)


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


def test_every_objective_has_its_test():
    assert set(KINDS) == {"clean", "fgsm", "clean+fgsm", "pgd", "trades", "mart", "sat", "awp"}


def test_clean_and_adversarial(batch):
    net, pixels, attacked, labels = batch
    z, moved = logits_of(net, pixels, attacked)
    assert value(clean(net, *batch[1:])) == pytest.approx(cross_entropy(z, labels.numpy()).mean(), rel=1e-12)
    want = cross_entropy(moved, labels.numpy()).mean()
    assert value(adversarial(net, *batch[1:])) == pytest.approx(want, rel=1e-12)
    want += cross_entropy(z, labels.numpy()).mean()
    assert value(both(net, *batch[1:])) == pytest.approx(want, rel=1e-12)


def test_the_sum_attacks_once_and_looks_at_both():
    module, other, (pixels, labels, rows) = objective("clean+fgsm"), objective("fgsm"), images()
    attacked = module.attack(pixels, labels, rows)
    assert torch.equal(attacked, other.attack(pixels, labels, rows))
    assert (attacked - pixels).abs().max() <= 0.1 + 1e-6
    _, clean_right, attacked_right = module(pixels, labels, rows).tolist()
    assert min(clean_right, attacked_right) >= 0


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


# --- the module --------------------------------------------------------------------------------------------------


def objective(name: str, **settings) -> Objective:
    torch.manual_seed(1)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(24, CLASSES),
    )
    reprogram_(net, NRPMConfig(lam=0.5, eps=0.05, iterations=2, learnable=True))
    config = TuneConfig(**{"paradigm": "all", "objective": name, "eps": 0.1, "steps": 2, **settings})
    return Objective(PixelModel(net), config, samples=32, classes=CLASSES).train()


def images(count: int = 8):
    generator = torch.Generator().manual_seed(2)
    pixels = torch.rand(count, 3, 6, 6, generator=generator)
    return pixels, torch.arange(count) % CLASSES, torch.arange(count) + 3


def state(module: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in module.state_dict().items()}


@pytest.mark.parametrize("name", KINDS)
def test_forward_gives_the_loss_of_its_own_attack_and_counts_what_was_right(name):
    module, (pixels, labels, rows) = objective(name, weight_perturbation=0.0), images()
    module.eval()  # BatchNorm by its statistics, so that the losses below see what forward saw
    attacked = module.attack(pixels, labels, rows)
    result = module(pixels, labels, rows)
    result[0].backward()
    module.settle()
    z, moved = (module.net(x).detach().double().numpy() for x in (pixels, attacked))
    y = labels.numpy()
    soft = -np.log(softmax(z)[np.arange(len(y)), y])  # of SAT, before its targets move
    apart = divergence(softmax(z), softmax(moved))
    want = {
        "clean": cross_entropy(z, y).mean(),
        "clean+fgsm": cross_entropy(z, y).mean() + cross_entropy(moved, y).mean(),
        "trades": (soft + 6 * apart).mean(),
        "sat": (soft + 6 * apart).mean(),
        "mart": mart_of(z, moved, y, 6.0),
    }.get(name, cross_entropy(moved, y).mean())
    assert float(result[0].detach()) == pytest.approx(want, rel=1e-5)
    hits = [int((logits.argmax(1) == y).sum()) for logits in (z, moved)]
    clean_hits = hits[0] if name in ("clean", "clean+fgsm", "trades", "mart", "sat") else -1
    attacked_hits = -1 if name == "clean" else hits[1]
    assert result[1:].tolist() == [clean_hits, attacked_hits]
    assert all(p.grad is not None for p in module.parameters())


@pytest.mark.parametrize(("norm", "eps"), [("Linf", 0.1), ("L2", 0.5), ("L1", 4.0)])
@pytest.mark.parametrize("name", [n for n in KINDS if n != "clean"])
def test_the_attack_stays_in_the_ball_and_leaves_the_model_as_it_was(name, norm, eps):
    module, (pixels, labels, rows) = objective(name, norm=norm, eps=eps), images()
    before, learning = state(module), [p.requires_grad for p in module.parameters()]
    attacked = module.attack(pixels, labels, rows)
    threat = Threat(norm, eps)
    assert threat.allows(pixels, attacked).all()
    assert threat.distance(pixels, attacked).max() > eps / 3
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    assert [p.requires_grad for p in module.parameters()] == learning
    assert all(m.training for m in module.modules())
    assert all(p.grad is None for p in module.parameters())


@pytest.mark.parametrize("gradient", ["own", "mixture"])
@pytest.mark.parametrize("name", ["pgd", "trades"])
def test_an_image_is_attacked_the_same_whatever_comes_with_it(name, gradient):
    """So two processes train on what one would have."""
    module, (pixels, labels, rows) = objective(name, gradient=gradient), images()
    whole = module.attack(pixels, labels, rows)
    parts = [module.attack(pixels[part], labels[part], rows[part]) for part in (slice(1, 8, 2), slice(0, 8, 2))]
    torch.testing.assert_close(parts[0], whole[1::2], atol=1e-6, rtol=0)
    torch.testing.assert_close(parts[1], whole[::2], atol=1e-6, rtol=0)
    module.epoch = 1
    assert not torch.allclose(module.attack(pixels, labels, rows), whole, atol=1e-4)


def test_an_eps_of_zero_attacks_nothing():
    module, (pixels, labels, rows) = objective("pgd", eps=0.0), images()
    assert torch.equal(module.attack(pixels, labels, rows), pixels)


def test_sat_targets_move_from_their_epoch_on():
    """`t = m t + (1 - m) p` (arXiv 2002.10319, eq. 3), for the images of the batch alone."""
    module, (pixels, labels, rows) = objective("sat", target_momentum=0.7, target_start=1), images()
    module.eval()
    z = module.net(pixels).detach().double().numpy()
    want = np.eye(CLASSES)[labels.numpy()]
    for epoch in range(3):
        module.epoch = epoch
        if epoch >= 1:
            want = 0.7 * want + 0.3 * softmax(z)
        module(pixels, labels, rows)
        np.testing.assert_allclose(module.targets[rows].numpy(), want, atol=1e-6)
        assert float(module.targets.sum()) == pytest.approx(len(rows), abs=1e-4)  # of no other image


def test_awp_takes_the_loss_at_the_worst_weights_nearby_and_puts_them_back():
    gamma = 0.02
    module, (pixels, labels, rows) = objective("awp", weight_perturbation=gamma), images()
    module.eval()
    attacked = module.attack(pixels, labels, rows)
    weights = {n: p for n, p in module.named_parameters() if p.ndim > 1}
    before = state(module)
    slopes = torch.autograd.grad(adversarial(module.net, pixels, attacked, labels).value, list(weights.values()))
    near = value(adversarial(module.net, pixels, attacked, labels))
    result = module(pixels, labels, rows)
    for (name, weight), slope in zip(weights.items(), slopes, strict=True):
        want = before[name] + gamma * before[name].norm() * slope / slope.norm()
        torch.testing.assert_close(weight.detach(), want, atol=1e-6, rtol=1e-4)
    assert float(result[0].detach()) > near
    want = value(adversarial(module.net, pixels, attacked, labels))
    assert float(result[0].detach()) == pytest.approx(want, rel=1e-5)
    module.settle()
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())


def test_awp_counts_one_pass_in_the_statistics():
    """The pass that finds the direction is no part of training."""
    statistics = []
    for name in ("pgd", "awp"):
        module, (pixels, labels, rows) = objective(name, weight_perturbation=0.0), images()
        module(pixels, labels, rows)
        statistics.append({n: b.clone() for n, b in module.net.named_buffers()})
    assert int(statistics[0]["model.1.num_batches_tracked"]) == 1
    for name, value in statistics[0].items():
        torch.testing.assert_close(statistics[1][name], value)


def test_awp_moves_what_autocast_has_cast_already():
    """Of a plain layer, whose weight autocast casts once and keeps."""
    losses = []
    for gamma in (0.0, 0.5):
        module, (pixels, labels, rows) = objective("awp", weight_perturbation=gamma), images()
        reprogram_(module.net.model, NRPMConfig(lam=1.0))
        with torch.autocast("cpu", torch.bfloat16):
            losses.append(float(module.eval()(pixels, labels, rows)[0].detach()))
    assert losses[1] > losses[0] + 0.1


def test_awp_without_weights_says_so():
    net = reprogram_(nn.Sequential(nn.Flatten(), nn.Linear(12, CLASSES)), NRPMConfig(lam=0.5, learnable=True))
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(name.endswith("lam"))
    with pytest.raises(ValueError, match="perturbs the weights that train, and none does"):
        Objective(PixelModel(net), TuneConfig(objective="awp"))
