"""Adaptation: where the statistics end up, what stays as it was, and what is refused."""

import copy
import math
import warnings

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import timm_nrpm
from timm_nrpm.cli.program import main
from timm_nrpm.data.loaders import digits
from timm_nrpm.errors import AdaptationDoubt
from timm_nrpm.evaluation.corruptions import corrupt
from timm_nrpm.hub import cards
from timm_nrpm.models import adaptation
from timm_nrpm.models.adaptation import Adaptation, adapt_
from timm_nrpm.models.format import Variant
from timm_nrpm.models.image_statistics import location
from timm_nrpm.models.provenance import Step
from timm_nrpm.nn.pixel_model import PixelModel


class Net(nn.Module):
    """A BatchNorm that sees the pixels themselves."""

    def __init__(self):
        super().__init__()
        self.norm, self.head = nn.BatchNorm2d(3), nn.Linear(3, 4)
        self.norm.running_mean.copy_(torch.tensor([0.5, -1.0, 2.0]))
        self.norm.running_var.copy_(torch.tensor([1.0, 0.5, 2.0]))

    def forward(self, x):
        return self.head(self.norm(x).mean((2, 3)))


def right(model, x, y):
    with torch.no_grad():
        return PixelModel(model).eval()(x).argmax(1).eq(y).float().mean().item()


@pytest.fixture(scope="module")
def noisy():
    pixels, labels = digits("test")
    return corrupt(pixels, "white_noise", 5), labels


def digits_model(lam=None):
    return (
        timm_nrpm.create_model("resnet8_digits", pretrained=True, lam=lam).eval()
        if lam is not None
        else (timm.create_model("resnet8_digits", pretrained=True).eval())
    )


@pytest.mark.parametrize("prior", [0, 1, 16, 1000.5])
@pytest.mark.parametrize("batch", [4, 6, 24])
def test_a_prior_is_worth_so_many_images(prior, batch):
    pixels, net = torch.rand(24, 3, 5, 4), Net()
    adapt_(net, pixels.split(batch), prior=prior)
    weight = 24 / (24 + prior)
    mean, var = pixels.double().mean((0, 2, 3)), pixels.double().var((0, 2, 3), correction=0)
    torch.testing.assert_close(net.norm.running_mean.double(), Net().norm.running_mean.double().lerp(mean, weight))
    torch.testing.assert_close(net.norm.running_var.double(), Net().norm.running_var.double().lerp(var, weight))


def test_images_like_those_before_move_nothing_and_others_do():
    net = Net()
    pixels = torch.rand(64, 3, 8, 8)
    net.norm.running_mean.copy_(pixels.mean((0, 2, 3))), net.norm.running_var.copy_(pixels.var((0, 2, 3)))
    stream = Adaptation(net)
    stream(torch.rand(64, 3, 8, 8))
    assert stream.weights == {"norm": 0.0}
    stream = Adaptation(net)
    stream(torch.rand(64, 3, 8, 8) / 2)
    assert 0.95 < stream.weights["norm"] / (64 / (64 + adaptation.LEAST)) <= 1


def test_a_single_image_moves_nothing_of_itself():
    net = Net()
    Adaptation(net)(torch.rand(1, 3, 8, 8))
    assert torch.equal(net.norm.running_mean, Net().norm.running_mean)


@pytest.mark.parametrize("robust", adaptation.ESTIMATES)
def test_some_images_of_an_attacker(robust):
    """With a tenth of the images far away, a robust estimate stays near the others, and the mean does not."""
    pixels = torch.rand(40, 3, 8, 8) * 0.2
    pixels[:4] = 1.0
    net = Net()
    adapt_(net, pixels, prior=0, robust=robust)
    off = (net.norm.running_mean - pixels[4:].mean((0, 2, 3))).abs().max().item()
    assert (off < 0.015) == (robust != "mean"), off


@given(
    st.integers(1, 30), st.integers(1, 4), st.sampled_from(adaptation.ESTIMATES), st.floats(-3, 3), st.floats(0.1, 10)
)
@settings(max_examples=60, deadline=None)
def test_a_location_moves_with_what_it_is_of(count, channels, robust, shift, scale):
    values = torch.randn(count, channels, generator=torch.Generator().manual_seed(count), dtype=torch.float64)
    found = location(values, robust)
    assert ((found >= values.min(0).values - 1e-9) & (found <= values.max(0).values + 1e-9)).all()
    torch.testing.assert_close(location(values * scale + shift, robust), found * scale + shift)
    torch.testing.assert_close(location(values[torch.randperm(count)], robust), found)


def test_noise_costs_the_digits_less(noisy):
    model = digits_model()
    before = right(model, *noisy)
    adapt_(model, noisy[0])
    assert right(model, *noisy) > before + 0.02


def test_a_stream_ends_where_all_images_at_once_do(noisy):
    at_once, streamed = digits_model(), digits_model()
    adapt_(at_once, noisy[0].split(60), prior=32)
    stream = Adaptation(streamed, prior=32)
    logits = torch.cat([stream(batch) for batch in noisy[0].split(60)])
    assert stream.images == len(noisy[0])
    assert logits.shape == (len(noisy[0]), 10)
    for a, b in zip(at_once.state_dict().values(), streamed.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    stream.restore()
    assert stream.images == 0
    for a, b in zip(digits_model().state_dict().values(), streamed.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_a_stream_that_was_restored_begins_anew(noisy):
    again, once = digits_model(), digits_model()
    stream = Adaptation(again, prior=10)
    stream(noisy[0][100:150]), stream.restore(), stream(noisy[0][:50])
    Adaptation(once, prior=10)(noisy[0][:50])
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), once.state_dict().values(), strict=True))


@pytest.mark.parametrize("robust", ["mean", "median"])
def test_a_stream_keeps_as_much_after_many_images_as_after_one(robust):
    net, sizes = Net(), []
    stream = Adaptation(net, robust=robust)
    for _ in range(3):
        stream(torch.rand(7, 3, 4, 4))
        (site,) = stream._sites.values()
        sizes.append((site.sums.numel(), site.medians.numel(), len(site.images)))
    assert sizes == [(15, 6, 0)] * 3


def test_what_chance_makes_is_the_spread_between_images():
    """Against the definition: the variance over images of their means and of their mean squared distances."""
    net, pixels = Net(), torch.rand(20, 3, 6, 5)
    stored, eps = [t.double().clone() for t in (net.norm.running_mean, net.norm.running_var)], net.norm.eps
    stream = Adaptation(net)
    for batch in pixels.split(6):
        stream(batch)
    rows = pixels.double().flatten(2)
    mean, var = rows.mean((0, 2)), rows.var((0, 2), correction=0)
    distances = (rows - mean.view(-1, 1)).square().mean(2)
    noise = (rows.mean(2).var(0) / (stored[1] + eps) + distances.var(0) / (var + eps) ** 2).sum() / 20
    shift = ((mean - stored[0]) ** 2 / (stored[1] + eps) + ((var + eps) / (stored[1] + eps)).log() ** 2).sum()
    want = 20 / (20 + adaptation.LEAST) * max(0.0, float(1 - adaptation.CAUTION * noise / shift))
    assert stream.weights["norm"] == pytest.approx(want, rel=1e-6)


def test_the_logits_of_a_stream_are_those_with_its_statistics(noisy):
    model = digits_model()
    logits = Adaptation(model)(noisy[0][:50])
    with torch.no_grad():
        torch.testing.assert_close(PixelModel(model).eval()(noisy[0][:50]), logits)


@pytest.mark.parametrize("lam", [0.4, 1.0])
def test_the_plain_model_of_an_adapted_one_keeps_its_statistics(lam, noisy, tmp_path):
    plain, model = digits_model(), digits_model(lam)
    timm_nrpm.calibrate_(model, [digits("train")[0][:200]])
    calibrated = copy.deepcopy(model.state_dict())
    adapt_(model, noisy[0])
    moved = [k for k, v in model.state_dict().items() if not torch.equal(v, calibrated[k])]
    assert moved
    assert all(k.endswith(("running_mean", "running_var")) and ".plain_" not in k for k in moved)
    folder = timm_nrpm.save_pretrained(model, tmp_path / "adapted")
    loaded = timm_nrpm.from_pretrained(folder)
    with torch.no_grad():
        assert torch.equal(PixelModel(loaded).eval()(noisy[0]), PixelModel(model).eval()(noisy[0]))
    timm_nrpm.restore_(model)
    for a, b in zip(plain.state_dict().values(), model.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_where_the_statistics_came_from(noisy, tmp_path, capsys):
    model = digits_model(0.4)
    train = digits("train")[0]
    timm_nrpm.calibrate_(model, [train[:100], train[100:200]])
    adapt_(model, noisy[0][:50], prior=8, robust="l1")
    stream = Adaptation(model)
    stream(noisy[0][:20]), stream(noisy[0][20:30])
    steps = (
        Step("calibration", "relative", 200),
        Step("adaptation", "l1", 50, 8.0),
        Step("adaptation", "mean", 30, None),
    )
    assert model.nrpm.statistics == steps
    folder = timm_nrpm.save_pretrained(model, tmp_path / "variant")
    assert timm_nrpm.from_pretrained(folder).nrpm.statistics == timm_nrpm.inspect(folder).statistics == steps
    words = "calibrated on 200 images, then adapted to 50 images (prior 8, l1), then adapted to 30 images"
    assert f"Its statistics were {words}." in str(cards.render(Variant.read(folder.joinpath, "it"), folder, "me/x"))
    assert main(["inspect", "--variant", str(folder)]) == 0
    assert f"statistics: {words}" in capsys.readouterr().out.replace("\n", " ")
    stream.restore()
    assert model.nrpm.statistics == steps[:2]
    timm_nrpm.calibrate_(model, [train[:64]], mode="scratch")
    assert str(*model.nrpm.statistics) == "calibrated on 64 images from scratch"
    model.load_state_dict(digits_model(0.4).state_dict())
    assert model.nrpm.statistics == ()


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "training"},
        {"how": "relative"},
        {"images": 0},
        {"images": 1.5},
        {"images": True},
        {"prior": -1},
        {"prior": "<b>"},
        {"more": 1},
        {"kind": "calibration", "how": "scratch"},
    ],
)
def test_steps_that_a_stranger_made_up(change):
    step = Step("adaptation", "l1", 50, 8.0).to_dict()
    assert Step.from_dict(step) == Step("adaptation", "l1", 50, 8.0)
    with pytest.raises(ValueError, match=r"step of its statistics|=.* is not|belongs to no"):
        Step.from_dict({**step, **change})


def test_after_an_error_the_model_is_as_it_was(noisy):
    model = digits_model()
    before = copy.deepcopy(model.state_dict())

    def breaks():
        yield noisy[0][:50]
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        adapt_(model, breaks())
    with pytest.raises(ValueError, match="before normalisation"):
        adapt_(model, [noisy[0][:20], noisy[0][:20] * 255])
    with pytest.raises(ValueError, match="gave no images"):
        adapt_(model, [])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_modes_and_gradients_stay(noisy):
    model = digits_model().train()
    model.layer1.eval()
    modes = [m.training for m in model.modules()]
    adapt_(model, noisy[0][:50])
    assert [m.training for m in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())
    with torch.inference_mode():
        adapt_(model, noisy[0][:50])
    PixelModel(model)(noisy[0][:8]).sum().backward()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prior": -1}, 'prior=-1 is not allowed: give a number >= 0 of images, or "auto"'),
        ({"prior": "none"}, "prior='none' is not allowed"),
        ({"prior": math.nan}, "prior=nan is not allowed"),
        ({"robust": "trimmed"}, "robust='trimmed'"),
    ],
)
def test_settings_that_are_refused(settings, message, noisy):
    with pytest.raises(ValueError, match=message):
        adapt_(digits_model(), noisy[0], **settings)


def test_models_that_it_cannot_help():
    with pytest.raises(ValueError, match="has no BatchNorm with running statistics, so adaptation has nothing to move"):
        adapt_(timm.create_model("vit_tiny_patch16_224"), torch.rand(2, 3, 224, 224))
    model = timm_nrpm.create_model("resnet8_digits", pretrained=True, lam=0.5)
    with torch.no_grad():
        model.conv1.weight.mul_(1.1)
    with pytest.raises(ValueError, match="Weights were trained since the model was reprogrammed"):
        adapt_(model, torch.rand(2, 1, 8, 8))


def test_a_sign_of_harm_is_told(noisy):
    """Images of one class have other statistics without a shift, and the model is less sure of them afterwards."""
    pixels, labels = digits("test")
    one = pixels[labels == labels[0]]
    with pytest.warns(AdaptationDoubt, match=r"the first \d+ images is \d+ points lower, .* sign of harm"):
        model = adapt_(digits_model(), one, prior=0)
    with torch.no_grad():
        confidence = [PixelModel(each).eval()(one).softmax(1).max(1).values.mean() for each in (digits_model(), model)]
    assert confidence[0] - confidence[1] > adaptation.DOUBT
    with warnings.catch_warnings():
        warnings.simplefilter("error", AdaptationDoubt)
        adapt_(digits_model(), pixels)
        adapt_(digits_model(), noisy[0])
        stored = digits_model()
        with pytest.raises(AdaptationDoubt):  # where warnings are errors, the model stays as it was
            adapt_(stored, one, prior=0)
    assert all(torch.equal(a, b) for a, b in zip(stored.buffers(), digits_model().buffers(), strict=True))


def test_what_gives_no_logits_is_adapted_without_that_sign():
    model = timm.create_model("resnet18", features_only=True).eval()
    before = model.bn1.running_mean.clone()
    with warnings.catch_warnings():
        warnings.simplefilter("error", AdaptationDoubt)
        adapt_(model, torch.rand(4, 3, 32, 32), prior=0, mean=(0.5,) * 3, std=(0.5,) * 3)
    assert not torch.equal(model.bn1.running_mean, before)
