"""CrossMax against NumPy, its predictors, and the probes."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression

from timm_nrpm import Threat, evaluate
from timm_nrpm.data.loaders import digits
from timm_nrpm.ensembles.crossmax import CrossMax, crossmax
from timm_nrpm.ensembles.probes import fit_probes, fitted
from timm_nrpm.models.registry import DIGITS
from timm_nrpm.nn.pixel_model import PixelModel


@pytest.fixture(scope="module")
def model():
    return timm.create_model(DIGITS, pretrained=True).eval()


@given(st.integers(0, 10**6), st.integers(1, 6), st.data())
def test_the_aggregation(seed, predictors, data):
    rank = data.draw(st.integers(1, predictors) | st.none())
    logits = np.random.default_rng(seed).normal(size=(3, predictors, 5))
    apart = logits - logits.max(2, keepdims=True)
    apart = apart - apart.max(1, keepdims=True)
    place = predictors // 2 + 1 if rank is None else rank
    expected = -np.sort(-apart, 1)[:, place - 1]
    np.testing.assert_allclose(crossmax(torch.from_numpy(logits), rank).numpy(), expected)


def test_one_predictor_among_three_cannot_move_a_class_at_will():
    logits = torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(0))
    logits[0, 2] += torch.tensor([1e6, 0.0, 0.0, 0.0])  # one that shouts
    assert crossmax(logits).abs().max() < 10
    assert crossmax(logits, rank=3).abs().max() > 1e5


def test_the_predictors_are_the_model_at_each_size(model):
    pixels = digits("test")[0][:5]
    ensemble = CrossMax(model, sizes=(8, 4)).eval()
    net = PixelModel(model).eval()
    small = F.interpolate(pixels, (4, 4), mode="bilinear", antialias=True)
    views = [pixels, F.interpolate(small, (8, 8), mode="bilinear", antialias=True)]
    with torch.no_grad():
        expected = torch.stack([net(view) for view in views], 1)
        assert torch.equal(ensemble.predictors(pixels), expected)
        assert torch.equal(ensemble(pixels), crossmax(expected))


def test_probes_are_scikit_learns_logistic_regression():
    draw = np.random.default_rng(0)
    features = draw.normal(size=(300, 6)) * [1, 5, 0.1, 2, 1, 3] + 4
    labels = (features[:, 0] + 10 * features[:, 2] + draw.normal(size=300) > 45).astype(int) + (features[:, 1] > 6)
    penalty = 1e-2
    probe = fitted(torch.from_numpy(features).float(), torch.from_numpy(labels), 3, penalty)
    standard = (features - features.mean(0)) / features.std(0)
    theirs = LogisticRegression(C=1 / (penalty * len(labels)), max_iter=1000, tol=1e-8).fit(standard, labels)
    ours = probe(torch.from_numpy(features).float()).softmax(1).detach().numpy()
    np.testing.assert_allclose(ours, theirs.predict_proba(standard), atol=2e-3)


def test_depths(model):
    pixels, labels = digits("train")
    probes = fit_probes(model, [(pixels[:300], labels[:300]), (pixels[300:600], labels[300:600])], ["layer1", "layer2"])
    ensemble = CrossMax(model, probes=probes).eval()
    shown, right = (part[:100] for part in digits("test"))
    with torch.no_grad():
        accuracy = (ensemble.predictors(shown).argmax(2) == right[:, None]).float().mean(0)
    assert ensemble.predictors(shown).shape == (100, 3, 10)
    assert accuracy[0] < accuracy[2]  # the model knows more than its first block
    assert accuracy.min() > 0.3
    assert not [hook for module in model.modules() for hook in module._forward_hooks]


def test_its_own_gradient_flatters_it(model):
    """The showcase of the flags: the mean of the predictors breaks what the median's gradient does not."""
    pixels, labels = (part[:60] for part in digits("test"))
    ensemble = CrossMax(model, sizes=(8, 6, 5))
    report = evaluate(ensemble, [(pixels, labels)], Threat("Linf", 0.12), "quick")
    assert report.accuracy("pgd") > report.accuracy("pgd_member_mean")
    assert "gradient_masking" in report.flags
    assert report.control.clean > report.clean


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({}, ValueError, "one predictor: give two sizes"),
        ({"sizes": (8,)}, ValueError, "one predictor: give two sizes"),
        ({"sizes": (8, 0)}, ValueError, "sizes=0 is not allowed"),
        ({"sizes": (8, 4), "rank": 3}, ValueError, "rank=3 is not allowed"),
        ({"probes": {"layer9": torch.nn.Linear(2, 10)}}, AttributeError, "layer9"),
    ],
)
def test_refused(model, settings, error, message):
    with pytest.raises(error, match=message):
        CrossMax(model, **settings)


def test_probes_refused(model):
    images = [tuple(part[:8] for part in digits("train"))]
    with pytest.raises(ValueError, match="layers is empty"):
        fit_probes(model, images, [])
    with pytest.raises(ValueError, match="loader is empty"):
        fit_probes(model, [], ["layer1"])
    with pytest.raises(AttributeError, match="layer9"):
        fit_probes(model, images, ["layer9"])


def test_threads_do_not_see_each_others_features(model):
    """Hooks of a model are the same in all threads, and in the replicas of DataParallel."""
    images = [tuple(part[:200] for part in digits("train"))]
    ensemble = CrossMax(model, sizes=(8, 5), probes=fit_probes(model, images, ["layer1"])).eval()
    shown = digits("test")[0][:160].split(10)
    with torch.no_grad():
        expected = [ensemble(each) for each in shown]

    def in_a_thread(each):
        with torch.no_grad():
            return ensemble(each)

    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            assert all(map(torch.equal, pool.map(in_a_thread, shown), expected))


def test_features_of_a_model_whose_channels_come_last():
    model = timm.create_model("swin_tiny_patch4_window7_224", img_size=56, embed_dim=24, depths=(1, 1, 1, 1)).eval()
    images = [(torch.rand(4, 3, 56, 56), torch.arange(4))]
    assert fit_probes(model, images, ["layers.1"])["layers.1"].in_features == 48
