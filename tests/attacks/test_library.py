import pytest
import torch
import torch.nn.functional as F
from torch import nn

from timm_nrpm import NRPMConfig, Threat, plain_copy, reprogram_
from timm_nrpm.attacks.library import fgsm, gradient_source, perturb, pgd
from timm_nrpm.models.reprogramming import reprogrammed_layers
from timm_nrpm.nn.pixel_model import PixelModel
from timm_nrpm.tuning.losses import divergence, margin_change

EPS = 0.1
LINF = Threat("Linf", EPS)


@pytest.fixture
def model() -> PixelModel:
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(), nn.Flatten(), nn.Linear(150, 4)
    )
    reprogram_(net, NRPMConfig(lam=0.4, eps=0.02, iterations=2, learnable=True))
    return PixelModel(net, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4))


@pytest.fixture
def batch():
    return torch.rand(6, 3, 5, 5), torch.tensor([0, 1, 2, 3, 0, 1])


def loss_of(z, clean, labels):
    return -F.log_softmax(z, 1)[torch.arange(len(z)), labels]


def kl_of(z, clean, labels):
    p, q = F.log_softmax(clean, 1), F.log_softmax(z, 1)
    return (p.exp() * (p - q)).sum(1)


def margins_of(z, clean, labels):
    """The length of the change of the label's logit less each other one."""
    rows = torch.arange(len(z))
    change = (z[rows, labels].unsqueeze(1) - z) - (clean[rows, labels].unsqueeze(1) - clean)
    return change.square().sum(1).sqrt()


def ascend(net, pixels, labels, start, steps, step_size, climbed=loss_of):
    """An independent projected gradient ascent."""
    x, clean = (pixels + start).clamp(0, 1), net(pixels).detach()
    for _ in range(steps):
        x = x.detach().requires_grad_()
        climbed(net(x), clean, labels).sum().backward()
        change = (x.detach() + step_size * x.grad.sign() - pixels).clamp(-EPS, EPS)
        x = (pixels + change).clamp(0, 1)
    return x.detach()


@pytest.mark.parametrize(
    ("distance", "climbed"),
    [(None, loss_of), (lambda clean, moved, _: divergence(clean, moved), kl_of), (margin_change, margins_of)],
    ids=["loss", "KL", "margins"],
)
@pytest.mark.parametrize(("steps", "step_size"), [(1, EPS), (4, EPS / 3)])
def test_perturb_is_projected_gradient_ascent(model, batch, steps, step_size, distance, climbed):
    start = 0.03 * torch.randn_like(batch[0])
    got = perturb(model, *batch, start, LINF, steps=steps, step_size=step_size, distance=distance)
    want = ascend(model.eval(), *batch, start, steps, step_size, climbed)  # it saw evaluation mode too
    torch.testing.assert_close(got, want, atol=1e-6, rtol=0)


def test_perturb_takes_steps_of_the_norm_and_stays_within_it(model, batch):
    """By hand under L2, two normalised steps; under L1 what the bound and the loss have to do."""
    pixels, labels = batch
    start, threat = torch.zeros_like(pixels), Threat("L2", 0.5)
    got = perturb(model, pixels, labels, start, threat, steps=2, step_size=0.3)
    x = pixels
    for _ in range(2):
        x = x.detach().requires_grad_()
        F.cross_entropy(model.eval()(x), labels, reduction="sum").backward()
        change = x.detach() + 0.3 * x.grad / x.grad.flatten(1).norm(dim=1).view(-1, 1, 1, 1) - pixels
        change = change * (0.5 / change.flatten(1).norm(dim=1)).clamp(max=1).view(-1, 1, 1, 1)
        x = (pixels + change).clamp(0, 1)
    torch.testing.assert_close(got, x.detach(), atol=1e-6, rtol=0)

    threat = Threat("L1", 2.0)
    got = perturb(model, pixels, labels, start, threat, steps=5, step_size=0.5)
    assert bool(threat.allows(pixels, got).all())
    assert F.cross_entropy(model(got), labels) > F.cross_entropy(model(pixels), labels)
    assert ((got != pixels).flatten(1).sum(1) < pixels[0].numel() / 2).all()  # few values move far


def test_plain_follows_the_plain_model(model, batch):
    start = torch.zeros_like(batch[0])
    got = perturb(model, *batch, start, LINF, steps=3, step_size=EPS / 3, gradient="plain")
    plain = PixelModel(plain_copy(model.model), (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)).eval()
    torch.testing.assert_close(got, ascend(plain, *batch, start, 3, EPS / 3), atol=1e-6, rtol=0)
    own = perturb(model, *batch, start, LINF, steps=3, step_size=EPS / 3)
    assert not torch.allclose(got, own, atol=1e-3)


def test_bpda_has_the_estimate_forward_and_the_linear_map_backward(model, batch):
    """By hand: the reprogrammed activations, the plain layers' vector-Jacobian products."""
    model.eval()
    pixels, labels = batch
    conv, norm, _, _, _, linear = model.model
    h = model.normalise(pixels)
    a = conv(h).detach()
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    b = norm(a).relu().flatten(1).detach()
    back = linear(b).softmax(1).detach() - F.one_hot(labels, 4)
    back = (back @ linear.weight).view_as(a) * (norm(a) > 0) * scale.view(-1, 1, 1)
    want = F.conv_transpose2d(back, conv.weight, padding=1) / model.std
    with gradient_source(model, "bpda") as source:
        x = pixels.clone().requires_grad_()
        z = source(x)
        (got,) = torch.autograd.grad(F.cross_entropy(z, labels, reduction="sum"), x)
    torch.testing.assert_close(z, model(pixels))
    torch.testing.assert_close(got, want.detach(), atol=1e-5, rtol=1e-4)
    moved = perturb(model, *batch, torch.zeros_like(pixels), LINF, steps=1, step_size=EPS, gradient="bpda")
    torch.testing.assert_close(moved, (pixels + EPS * want.sign()).clamp(0, 1).detach(), atol=1e-6, rtol=0)


def test_a_mixture_gives_every_image_its_turn(model, batch):
    options = {"threat": LINF, "steps": 2, "step_size": EPS / 2}
    start = torch.zeros_like(batch[0])
    turns = torch.tensor([2, 1, 0, 5, 4, 3])
    got = perturb(model, *batch, start, **options, gradient="mixture", turns=turns)
    for kind, rows in (("own", [2, 5]), ("bpda", [1, 4]), ("plain", [0, 3])):
        want = perturb(model, *batch, start, **options, gradient=kind)
        torch.testing.assert_close(got[rows], want[rows], atol=1e-6, rtol=0)


@pytest.mark.parametrize("gradient", ["own", "bpda", "plain", "mixture"])
def test_the_model_is_left_as_it_was(model, batch, gradient):
    model.train()
    model.model[4].eval()
    model.model[5].weight.requires_grad_(False)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    modes, flags = [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]
    moved = perturb(model, *batch, torch.zeros_like(batch[0]), LINF, steps=2, step_size=EPS, gradient=gradient)
    assert not moved.requires_grad
    assert [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not any(layer.linear_backward for layer in reprogrammed_layers(model).values())


def test_an_attack_that_fails_leaves_the_gradient_own(model, batch):
    with pytest.raises(ValueError, match="4 channels"):
        perturb(model, torch.rand(2, 4, 5, 5), batch[1][:2], torch.zeros(2, 4, 5, 5), LINF, steps=1, step_size=EPS,
                gradient="bpda")  # fmt: skip
    assert not any(layer.linear_backward for layer in reprogrammed_layers(model).values())


def test_a_gradient_that_is_no_number_moves_nothing(batch):
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(75, 4)

        def forward(self, x):
            return self.head(x.flatten(1)) + (x[:, 0] - x[:, 0]).sqrt().sum((1, 2)).unsqueeze(1)  # 0, slope inf - inf

    net = PixelModel(reprogram_(Broken(), NRPMConfig(lam=0.5)))
    got = perturb(net, *batch, torch.zeros_like(batch[0]), LINF, steps=2, step_size=EPS)
    assert torch.equal(got[:, 0], batch[0][:, 0])
    assert net.non_finite


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_torchattacks_agree_with_an_independent_ascent(model, batch, norm):
    model.eval()
    seeds = list(range(5, 11))
    if norm == "Linf":
        want = ascend(model, *batch, torch.zeros_like(batch[0]), 1, EPS)
        torch.testing.assert_close(fgsm(EPS)(model, *batch, seeds), want, atol=1e-6, rtol=0)
    state = torch.random.get_rng_state()
    got = pgd(Threat(norm, EPS), steps=3)(model, *batch, seeds)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert bool(Threat(norm, EPS).allows(batch[0], got).all())
    if norm == "Linf":
        torch.manual_seed(5)
        start = torch.empty_like(batch[0]).uniform_(-EPS, EPS)
        torch.testing.assert_close(got, ascend(model, *batch, start, 3, EPS / 4), atol=1e-6, rtol=0)


def test_passes_are_counted(model, batch):
    fgsm(EPS)(model, *batch, [0])
    assert (model.forwards, model.backwards) == (6, 6)
    with torch.no_grad():
        model(batch[0])
    assert (model.forwards, model.backwards) == (12, 6)
