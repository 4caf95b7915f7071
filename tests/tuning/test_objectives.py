"""The module that attacks and returns the loss of each objective, against the losses in NumPy."""

import numpy as np
import pytest
import torch
from loss_oracles import (
    comp_sum_of,
    cross_entropy,
    divergence,
    kl_dro_of,
    mart_of,
    separation_of,
    softmax,
    taught_of,
    weat_of,
)
from torch import nn

from timm_nrpm import NRPMConfig, Threat, TuneConfig, reprogram_
from timm_nrpm.choices import OBJECTIVES
from timm_nrpm.nn.pixel_model import PixelModel
from timm_nrpm.tuning.losses import adversarial, margin_change
from timm_nrpm.tuning.objectives import KINDS, Objective, classifier_of

CLASSES = 4
LOOK_AT_CLEAN = ("clean", "clean+fgsm", "trades", "mart", "sat", "weat", "comp-sum", "teacher")
"""Objectives that need the logits of the clean images."""


def test_every_word_is_an_objective():
    assert set(KINDS) == set(OBJECTIVES)


def value(loss) -> float:
    return float(loss.value.detach())


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
    teacher = PixelModel(nn.Sequential(nn.Flatten(), nn.Linear(108, CLASSES))) if name == "teacher" else None
    return Objective(PixelModel(net), config, samples=32, classes=CLASSES, teacher=teacher).train()


def images(count: int = 8):
    generator = torch.Generator().manual_seed(2)
    pixels = torch.rand(count, 3, 6, 6, generator=generator)
    return pixels, torch.arange(count) % CLASSES, torch.arange(count) + 3


def test_the_sum_attacks_once_and_looks_at_both():
    module, other, (pixels, labels, rows) = objective("clean+fgsm"), objective("fgsm"), images()
    attacked = module.attack(pixels, labels, rows)
    assert torch.equal(attacked, other.attack(pixels, labels, rows))
    assert (attacked - pixels).abs().max() <= 0.1 + 1e-6
    _, clean_right, attacked_right = module(pixels, labels, rows).tolist()
    assert min(clean_right, attacked_right) >= 0


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
    features = module.net.model[:5](attacked).detach().double().numpy()
    theirs = [module.teacher(x).detach().double().numpy() for x in (pixels, attacked)] if name == "teacher" else []
    want = {
        "clean": cross_entropy(z, y).mean(),
        "clean+fgsm": cross_entropy(z, y).mean() + cross_entropy(moved, y).mean(),
        "trades": (soft + 6 * apart).mean(),
        "sat": (soft + 6 * apart).mean(),
        "mart": mart_of(z, moved, y, 6.0),
        "weat": weat_of(z, moved, y, 6.0),
        "kl-dro": kl_dro_of(moved, y, 1.0),
        "srat": cross_entropy(moved, y).mean() + separation_of(features, y, 0.1),  # classes are of one size
        "comp-sum": comp_sum_of(z, moved, y, 0.3),
        "teacher": taught_of(theirs, [z, moved], y, 1.0) if theirs else None,
    }.get(name, cross_entropy(moved, y).mean())
    assert float(result[0].detach()) == pytest.approx(want, rel=1e-5)
    hits = [int((logits.argmax(1) == y).sum()) for logits in (z, moved)]
    clean_hits = hits[0] if name in LOOK_AT_CLEAN else -1
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


def test_srat_weighs_classes_by_what_it_has_seen_of_them():
    """The inverse of their shares, with a mean weight of 1 over the images, and none for a class that never came."""
    module = objective("srat")
    weights = module.class_weights(torch.tensor([0, 0, 0, 1]))
    torch.testing.assert_close(weights, torch.tensor([4 / 6, 2.0, 0.0, 0.0]))
    labels = torch.tensor([0, 0, 0, 1, 2, 0])
    weights = module.class_weights(torch.tensor([2, 0]))
    torch.testing.assert_close(weights, torch.tensor([6 / 12, 2.0, 2.0, 0.0]))
    assert float(weights[labels].mean()) == pytest.approx(1.0)
    assert "counts" in module.state_dict()  # so that a run that resumes goes on counting


def test_the_attack_of_comp_sum_climbs_the_change_of_margins():
    module, (pixels, labels, rows) = objective("comp-sum", steps=5), images()
    module.eval()

    def length(attacked):
        z, moved = (module.net(x).detach().double().numpy() for x in (pixels, attacked))
        return comp_sum_of(z, moved, labels.numpy(), 1.0) - cross_entropy(z, labels.numpy()).mean()

    start = (pixels + module._start(pixels, rows)).clamp(0, 1)
    assert length(module.attack(pixels, labels, rows)) > 5 * length(start) > 0
    assert KINDS["comp-sum"].distance is margin_change  # whose ascent the tests of `perturb` follow step by step


def test_the_teacher_is_no_part_of_the_module():
    module = objective("teacher")
    assert not [name for name in module.state_dict() if "teacher" in name]
    assert not module._teachers[0].training


@pytest.mark.parametrize(("name", "teacher"), [("teacher", None), ("pgd", nn.Flatten())])
def test_a_teacher_that_is_missing_or_has_no_place_is_refused(name, teacher):
    with pytest.raises(ValueError, match=r"give both objective=\"teacher\" and teacher="):
        Objective(PixelModel(nn.Linear(2, 2)), TuneConfig(objective=name), teacher=teacher)


def test_the_classifier_is_timms_or_the_last_linear_layer():
    import timm

    model = timm.create_model("resnet8_digits")
    assert classifier_of(model) is model.fc
    net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    assert classifier_of(net) is net[2]
    with pytest.raises(ValueError, match="has no linear layer"):
        classifier_of(nn.Flatten())
