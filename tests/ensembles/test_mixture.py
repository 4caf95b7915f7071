"""The search of a mixture, and the gate."""

import pytest
import timm
import torch
from torch.utils.data import DataLoader, TensorDataset

import timm_nrpm
from timm_nrpm import NRPMConfig, Threat, evaluate, reprogram_
from timm_nrpm.data.loaders import digits
from timm_nrpm.ensembles.adaptive_smoothing import AdaptiveSmoothing
from timm_nrpm.ensembles.mixture import MixtureSearch, fit_gate, search_mixture
from timm_nrpm.models.registry import DIGITS

EIGHTH = Threat("Linf", 0.125)


@pytest.fixture(scope="module")
def models():
    """The bundled model, and one that was tuned against attacks for two epochs."""
    torch.manual_seed(0)
    accurate = timm.create_model(DIGITS, pretrained=True).eval()
    robust = reprogram_(timm.create_model(DIGITS, pretrained=True), NRPMConfig(lam=1.0))
    images = DataLoader(TensorDataset(*(part[:640] for part in digits("train"))), batch_size=64)
    config = timm_nrpm.TuneConfig(paradigm="all", trainable=("*.weight", "*.bias"), eps=0.15, steps=3, epochs=2)
    timm_nrpm.tune(robust, images, config)
    return accurate, timm_nrpm.restore_(robust).eval()


@pytest.fixture(scope="module")
def images():
    pixels, labels = (part[:80] for part in digits("test"))
    return list(zip(pixels.split(40), labels.split(40), strict=True))


def test_what_is_searched_is_what_is_measured(models, images):
    found = search_mixture(*models, images, EIGHTH, bound=5.0, attacked=2, steps=5)
    attacked = [each for each in found.candidates if each.quick is not None]
    assert len(attacked) == 2
    assert found.best in attacked
    assert all(each.clean >= found.accurate - 0.05 - 1e-9 for each in attacked)
    assert len({(c.share, c.accurate_scale, c.robust_scale) for c in found.candidates}) == 160
    mixture = found.best.model(*models)
    report = evaluate(mixture, images, EIGHTH, "quick", steps=5)
    assert (report.clean, report.worst_case) == (found.best.clean, found.best.quick)
    assert report.control.clean == found.robust
    assert MixtureSearch.from_json(found.to_json()) == found
    assert f"the robust model's share {found.best.share:g}" in str(found)


def test_no_mixture_within_the_bound(images):
    """A robust model that knows nothing costs too much in every mixture that is tried."""
    sure = timm.create_model(DIGITS, pretrained=True).eval()
    wrong = timm.create_model(DIGITS, pretrained=True).eval()
    wrong.fc.weight.data.neg_().mul_(50)
    found = search_mixture(sure, wrong, images[:1], EIGHTH, bound=0.0, attacked=1, steps=1)
    assert found.best is None
    assert not any(each.quick for each in found.candidates)
    assert "No mixture loses at most 0 points" in str(found)


def test_a_gate_tells_attacked_images_apart(models, images):
    mixture = AdaptiveSmoothing(*models, share=0.5)
    gate = fit_gate(mixture, images, Threat("Linf", 0.2), low=0.1, high=0.9, steps=5)
    assert (gate.low, gate.high) == (0.1, 0.9)
    gated = AdaptiveSmoothing(*models, gate=gate)
    pixels, _ = images[0]
    moved = (pixels + 0.2 * torch.sign(torch.randn(pixels.shape))).clamp(0, 1)
    with torch.no_grad():
        shares = [gate(*gated.parts(each)) for each in (pixels, moved)]
    assert shares[0].mean() < 0.5
    assert shares[1].mean() > shares[0].mean()
    assert fit_gate(mixture, images, Threat("Linf", 0.2), low=0.1, high=0.9, steps=5) == gate


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"threat": Threat("L0", 2)}, "no steps under L0"),
        ({"bound": -1}, "bound=-1 is not allowed"),
        ({"attacked": 0}, "attacked=0 is not allowed"),
        ({"steps": 0}, "steps=0 is not allowed"),
    ],
)
def test_refused_before_anything_runs(models, images, arguments, message):
    with pytest.raises(ValueError, match=message):
        search_mixture(*models, images, **arguments)


def test_no_images(models):
    with pytest.raises(ValueError, match="loader is empty"):
        search_mixture(*models, [], EIGHTH)
    with pytest.raises(ValueError, match="loader is empty"):
        fit_gate(AdaptiveSmoothing(*models), [], EIGHTH)


def test_a_gate_refuses_before_any_attack(models, images):
    mixture = AdaptiveSmoothing(*models)
    mixture.train()
    with pytest.raises(ValueError, match="no steps under L0"):
        fit_gate(mixture, images, Threat("L0", 2))
    with pytest.raises(ValueError, match=r"gate.low=3 is not allowed"):
        fit_gate(mixture, images, EIGHTH, low=3)
    wrong = [(images[0][0], torch.full_like(images[0][1], 10))]
    for call in (lambda: fit_gate(mixture, wrong, EIGHTH), lambda: search_mixture(*models, wrong, EIGHTH)):
        with pytest.raises(ValueError, match="the model has 10 classes"):
            call()
    with pytest.raises(ValueError, match="this is a _SmallResNet"):
        fit_gate(models[0], images, EIGHTH)
    fit_gate(mixture, images[:1], EIGHTH, steps=1)
    assert mixture.training
    mixture.eval()
