"""Adaptive smoothing against NumPy, its lemma on random probabilities, and its evaluation."""

import math

import numpy as np
import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import timm_nrpm
from timm_nrpm import NRPMConfig, Threat, evaluate, reprogram_
from timm_nrpm.attacks.efforts import LEVELS
from timm_nrpm.attacks.sources import sources_of
from timm_nrpm.attacks.suites import attacks_of
from timm_nrpm.data.loaders import digits
from timm_nrpm.ensembles.adaptive_smoothing import AdaptiveSmoothing, Gate, features
from timm_nrpm.models.base import weights_sha256
from timm_nrpm.models.registry import DIGITS
from timm_nrpm.models.reprogramming import model_sha256
from timm_nrpm.nn.ensemble import Member
from timm_nrpm.nn.pixel_model import PixelModel
from timm_nrpm.nn.wrappers import subject_of


def linear(seed, classes=3, channels=1, side=4):
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(channels * side * side, classes))
    model[1].weight.data = torch.randn(model[1].weight.shape, generator=generator)
    return model.eval()


def softmax(logits):
    raised = np.exp(logits - logits.max(1, keepdims=True))
    return raised / raised.sum(1, keepdims=True)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("scales", [(1.0, 1.0), (0.5, 4.0), (20.0, 0.1)])
def test_the_probabilities_are_mixed(share, scales):
    g, h = linear(0), linear(1)
    mixture = AdaptiveSmoothing(g, h, share=share, accurate_scale=scales[0], robust_scale=scales[1])
    pixels = torch.rand(5, 1, 4, 4)
    parts = [softmax(s * model(pixels).detach().double().numpy()) for s, model in zip(scales, (g, h), strict=True)]
    expected = (1 - share) * parts[0] + share * parts[1]
    np.testing.assert_allclose(mixture(pixels).detach().exp().numpy(), expected, rtol=1e-5, atol=1e-7)


@given(st.integers(0, 10**6), st.floats(0.5, 0.99))
def test_a_confident_robust_model_cannot_be_outvoted(seed, share):
    """Lemma 1 of arXiv 2301.12554: a lead of (1 - a) / a of the robust model decides, whatever the other says."""
    draw = np.random.default_rng(seed)
    g, h = draw.dirichlet(np.full(4, 0.3), 2)
    least = np.sort(h)[-1] - np.sort(h)[-2]
    mixed = (1 - share) * g + share * h
    if least > (1 - share) / share + 1e-12:
        assert mixed.argmax() == h.argmax()


def test_the_lemma_is_tight():
    """With a smaller lead than (1 - a) / a, an accurate model that is sure of another class wins."""
    share, short = 0.6, 0.4 / 0.6 - 0.01
    g, h = np.array([0.0, 1.0]), np.array([(1 + short) / 2, (1 - short) / 2])
    assert ((1 - share) * g + share * h).argmax() == 1


def test_each_member_keeps_its_normalisation_and_its_size():
    small = timm.create_model("resnet8_digits", num_classes=10).eval()
    large = PixelModel(timm.create_model("resnet10t", num_classes=10, in_chans=1), (0.5,), (0.25,)).eval()
    mixture = AdaptiveSmoothing(small, large).eval()
    sizes = {name: mixture.member(name).size for name in mixture.members}
    assert sizes == {"accurate": (8, 8), "robust": (176, 176)}
    assert mixture.pretrained_cfg["input_size"][1:] == sizes["robust"]
    pixels = torch.rand(2, 1, *sizes["robust"])
    with torch.no_grad():
        whole = PixelModel(mixture)(pixels)
        alone = large(pixels)
        only = PixelModel(AdaptiveSmoothing(small, large, share=1.0).eval())(pixels)
    assert torch.allclose(only, alone.log_softmax(1), atol=1e-6)
    assert whole.shape == (2, 10)
    given = PixelModel(small, (0.25,), (0.5,))
    assert AdaptiveSmoothing(given, small).member("accurate").net.normalisation() == {"mean": (0.25,), "std": (0.5,)}


def test_a_gate_is_between_its_ends_and_has_a_gradient():
    g, h = linear(0), linear(1)
    gate = Gate(0.2, 0.9, 3.0, -2.0, 1.5, 0.25)
    mixture = AdaptiveSmoothing(g, h, gate=gate)
    pixels = torch.rand(6, 1, 4, 4).requires_grad_()
    accurate, robust = mixture.parts(pixels)
    share = gate(accurate, robust)
    assert ((share > 0.2) & (share < 0.9)).all()
    probabilities = [softmax(model(pixels).detach().double().numpy()) for model in (g, h)]
    tops = [np.sort(each, 1)[:, ::-1] for each in probabilities]
    agreed = probabilities[1][np.arange(6), probabilities[0].argmax(1)]
    seen = np.stack([tops[0][:, 0] - tops[0][:, 1], tops[1][:, 0] - tops[1][:, 1], agreed], 1)
    np.testing.assert_allclose(features(accurate, robust).detach().numpy(), seen, atol=1e-6)
    opened = 1 / (1 + np.exp(-(seen @ [3.0, -2.0, 1.5] + 0.25)))
    expected = (1 - (0.2 + 0.7 * opened))[:, None] * probabilities[0] + (0.2 + 0.7 * opened)[:, None] * probabilities[1]
    np.testing.assert_allclose(mixture(pixels).detach().exp().numpy(), expected, atol=1e-6)
    (slope,) = torch.autograd.grad(mixture(pixels)[:, 0].sum(), pixels)
    assert slope.isfinite().all()
    assert slope.abs().max() > 0


def test_settings_change_the_hash():
    g, h = linear(0), linear(1)
    hashes = {
        model_sha256(AdaptiveSmoothing(g, h, **settings))
        for settings in ({}, {"share": 0.6}, {"robust_scale": 2.0}, {"gate": Gate(0, 1, 1, 1, 1, 0)})
    }
    assert len(hashes) == 4
    assert model_sha256(AdaptiveSmoothing(g, h)) == model_sha256(AdaptiveSmoothing(g, h, share=0.5))


def test_it_is_attacked_along_its_members_and_compared_with_the_robust_one():
    """A mixture whose own gradient is hidden by a scale breaks all the same, since attacks follow its members."""
    pixels, labels = (part[:40] for part in digits("test"))
    plain = timm.create_model(DIGITS, pretrained=True).eval()
    loud = AdaptiveSmoothing(plain, plain, accurate_scale=5e3, robust_scale=5e3)
    loader, threat = [(pixels, labels)], Threat("Linf", 0.2)
    report = evaluate(loud, loader, threat, "quick", seed=0)
    alone = evaluate(plain, loader, threat, "quick", seed=0)
    names = {attack.name: report.accuracy(attack.name) for attack in report.attacks}
    assert names["pgd"] > names["pgd_member_robust"] == alone.accuracy("pgd")
    assert report.worst_case == alone.worst_case
    assert "gradient_masking" in report.flags
    assert report.plain == "member"
    assert report.control.worst_case == alone.worst_case
    assert "the member that it is compared with" in report.verdict
    assert timm_nrpm.RobustnessReport.from_json(report.to_json()) == report


def test_a_reprogrammed_member_is_attacked_without_its_estimate():
    pixels, labels = (part[:16] for part in digits("test"))
    plain = timm.create_model(DIGITS, pretrained=True).eval()
    ours = reprogram_(timm.create_model(DIGITS, pretrained=True), NRPMConfig(lam=0.8, iterations=1)).eval()
    mixture = AdaptiveSmoothing(plain, ours)
    sources = sources_of(mixture)
    assert list(sources) == ["own", "member_accurate", "member_robust", "bpda", "plain"]
    with torch.no_grad():
        unchanged = AdaptiveSmoothing(plain, plain)
        assert torch.equal(sources["plain"].net(pixels), PixelModel(unchanged).eval()(pixels))
    followed = {a.source for a in attacks_of("adaptive", Threat("Linf", 0.1), LEVELS["fast"], sources, 10)}
    assert followed == {*sources, "best", "scores"}
    report = evaluate(mixture, [(pixels, labels)], Threat("Linf", 0.1), "quick", steps=2)
    assert {attack.source for attack in report.attacks} == {"own", "plain", "member_accurate", "member_robust"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"share": 1.2}, "share=1.2 is not allowed"),
        ({"share": math.nan}, "share=nan is not allowed"),
        ({"robust_scale": 0.0}, "robust_scale=0.0 is not allowed"),
        ({"accurate_scale": 1e9}, "accurate_scale=1000000000.0 is not allowed"),
    ],
)
def test_settings_outside_their_range(settings, message):
    with pytest.raises(ValueError, match=message):
        AdaptiveSmoothing(linear(0), linear(1), **settings)


def test_members_that_do_not_fit():
    ten = timm.create_model(DIGITS, num_classes=10)
    with pytest.raises(ValueError, match="different classes, 10 in accurate, 7 in robust"):
        AdaptiveSmoothing(ten, timm.create_model(DIGITS, num_classes=7))
    two, colour = PixelModel(linear(0), (0.1, 0.2), (1.0, 1.0)), timm.create_model("resnet10t", num_classes=10)
    with pytest.raises(ValueError, match="different channels, 2 in accurate, 3 in robust"):
        AdaptiveSmoothing(two, colour)
    with pytest.raises(ValueError, match="An ensemble is among the members"):
        AdaptiveSmoothing(ten, AdaptiveSmoothing(ten, ten))
    with pytest.raises(ValueError, match="reprogram its members"):
        reprogram_(AdaptiveSmoothing(ten, ten), NRPMConfig(lam=0.5))


def test_models_that_do_not_say_how_many_classes_they_have():
    mixture = AdaptiveSmoothing(linear(0), linear(1), share=0.6)
    pixels = torch.rand(6, 1, 4, 4)
    report = evaluate(mixture, [(pixels, linear(1)(pixels).argmax(1))], Threat("Linf", 0.01), "quick", steps=1)
    assert report.clean > 0.5
    assert not hasattr(mixture, "num_classes")


def test_a_normalisation_is_not_for_an_ensemble():
    mixture, pixels = AdaptiveSmoothing(linear(0), linear(1)), torch.rand(6, 1, 4, 4)
    with pytest.raises(ValueError, match="whose members normalise inside: leave them out"):
        evaluate(mixture, [(pixels, torch.zeros(6, dtype=torch.long))], mean=(0.5,), std=(0.5,))
    assert subject_of(PixelModel(mixture)).on_pixels()(pixels).equal(mixture(pixels))


def test_a_base_keeps_its_own_normalisation():
    plain = timm.create_model(DIGITS, pretrained=True).eval()
    pixels, labels = (part[:100] for part in digits("test"))
    base = sources_of(AdaptiveSmoothing(plain, plain), base=plain)["base"].net
    with torch.no_grad():
        assert base(pixels).argmax(1).eq(labels).float().mean() > 0.9


def test_a_state_of_other_settings_is_refused_and_a_size_is_hashed():
    first, second = (AdaptiveSmoothing(linear(0), linear(1), share=share) for share in (0.5, 0.7))
    with pytest.raises(RuntimeError, match="those of an ensemble with other settings"):
        first.load_state_dict(second.state_dict())
    first.load_state_dict(AdaptiveSmoothing(linear(2), linear(3), share=0.5).state_dict())
    net = PixelModel(linear(0))
    assert len({weights_sha256(Member(net, size).state_dict()) for size in (None, (4, 4), (8, 8))}) == 3


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_it_is_cast(dtype):
    mixture, pixels = AdaptiveSmoothing(linear(0), linear(1)), torch.rand(6, 1, 4, 4)
    before = mixture(pixels)
    assert torch.allclose(mixture.to(dtype)(pixels), before, atol=0.1)
