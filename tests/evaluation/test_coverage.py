import math

import numpy as np
import pytest
import timm
import torch
from scipy import stats
from test_conformal import Shown, part, shown_images

from timm_nrpm.attacks.threats import Threat
from timm_nrpm.data.loaders import digits
from timm_nrpm.evaluation.conformal import conformal
from timm_nrpm.evaluation.coverage import SetReport, SetRow, attacked, evaluate_sets, most_harmful
from timm_nrpm.models.registry import DIGITS

FAST = {"steps": 4, "average": 4}


@pytest.fixture(scope="module")
def model():
    return timm.create_model(DIGITS, pretrained=True).eval()


@pytest.fixture(scope="module")
def images():
    """Of the digits that the model was not trained on, in random order."""
    pixels, labels = digits("test")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    return pixels[order], labels[order]


def report_of(*rows):
    made = tuple(SetRow(*row) for row in rows)
    return SetReport("one-sample", "It holds.", 0.1, 0.25, 4, 5, 2, 0, made)


# --- the report ----------------------------------------------------------------------------------------------------


def test_the_numbers_of_a_report_by_hand():
    report = report_of((0, (0, 1), (0, 1, 2)), (1, (2,), ()), (2, (0, 1, 2, 3), (0, 1)), (3, (3,), (3,)))
    assert report.covered() == (True, False, True, True)
    assert report.covered("attacked") == (True, False, False, True)
    assert (report.coverage(), report.coverage("attacked")) == (0.75, 0.5)
    assert (report.sizes(), report.size()) == ((2, 1, 4, 1), 2.0)
    assert report.size("attacked") == 1.5
    low, high = report.coverage_interval()  # Clopper and Pearson's, by the quantiles of beta distributions
    assert (low, high) == pytest.approx((stats.beta.ppf(0.025, 3, 2), stats.beta.ppf(0.975, 4, 1)))
    half = 1.96 * np.std([2, 1, 4, 1], ddof=1) / math.sqrt(4)
    assert report.size_interval() == pytest.approx((2 - half, 2 + half))
    assert str(report) == (
        "one-sample, 4 images: 75.0 % hold the right class (19.4 to 99.4), 2.00 of 4 classes in a set (0.61 to 3.39); "
        "attacked within L2 0.25: 50.0 % hold the right class (6.8 to 93.2), 1.50 of 4 classes in a set (0.23 to 2.77)"
    )
    assert SetReport.from_json(report.to_json()) == report
    assert "SetRow" not in repr(report)


def test_a_report_without_an_attack():
    report = report_of((0, (0,)), (1, (0, 1)))
    assert SetReport.from_json(report.to_json()) == report
    assert "attacked" not in str(report)
    with pytest.raises(ValueError, match="measured without an attack: give evaluate_sets a number of steps above 0"):
        report.coverage("attacked")
    with pytest.raises(ValueError, match="part='noisy' is not known: choose one of clean, attacked"):
        report.coverage("noisy")
    assert report_of((0, (0,))).size_interval() == (1.0, 1.0)


# --- the attack ----------------------------------------------------------------------------------------------------


def test_the_attack_stays_within_the_radius_and_harms(model, images):
    pixels, labels = part(images, 100, 130)
    for method in ("vanilla", "one-sample"):
        predictor = conformal(model, [part(images, 100)], 0.1, 0.25, 0.25, method)
        copies = 0 if method == "vanilla" else 8
        results = attacked(predictor.smoothed, pixels, labels, 0.25, 6, copies, seed=0)
        assert torch.equal(results[0], pixels)
        assert len(results) == 3
        for moved in results[1:]:
            assert Threat("L2", 0.25).allows(pixels, moved).all()
            assert float(Threat("L2", 0.25).distance(pixels, moved).min()) > 0.2
        worst = most_harmful(predictor, results, labels, 8, seed=0)
        fresh = [predictor.smoothed.probabilities(x, 8 * copies, range(30)) for x in (pixels, worst)]
        clean, harmed = (each.mean(1)[torch.arange(30), labels].mean() for each in fresh)
        assert harmed < clean - 0.05


def test_the_attack_depends_on_the_image_alone(model, images):
    pixels, labels = part(images, 100, 104)
    predictor = conformal(model, [part(images, 100)], 0.1, 0.25, 0.25)
    whole = attacked(predictor.smoothed, pixels, labels, 0.25, 3, 4, seed=0)
    last = attacked(predictor.smoothed, pixels[3:], labels[3:], 0.25, 3, 4, seed=0, start=3)
    for a, b in zip(whole, last, strict=True):
        torch.testing.assert_close(a[3:], b, atol=1e-4, rtol=0)
    other = attacked(predictor.smoothed, pixels, labels, 0.25, 3, 4, seed=1)
    assert not torch.equal(other[1], whole[1])
    assert all(parameter.requires_grad for parameter in model.parameters())


# --- evaluation ----------------------------------------------------------------------------------------------------


def test_an_attack_breaks_what_has_no_guarantee_and_not_what_has(model, images):
    test = [part(images, 180, 280)]
    vanilla, robust = (
        evaluate_sets(conformal(model, [part(images, 180)], 0.1, 0.25, 0.25, method), test, **FAST)
        for method in ("vanilla", "one-sample")
    )
    assert vanilla.coverage("attacked") < vanilla.coverage() - 0.1 < 0.9
    assert robust.coverage("attacked") >= 0.9
    assert vanilla.size() < robust.size() < 6


def test_batches_change_nothing(model, images):
    predictor = conformal(model, [part(images, 100)], 0.1, 0.25, 0.1)
    pixels, labels = part(images, 100, 112)
    want = evaluate_sets(predictor, [(pixels, labels)], **FAST)
    batches = list(zip(pixels.split(5), labels.split(5), strict=True))
    assert evaluate_sets(predictor, batches, **FAST) == want
    assert evaluate_sets(predictor, [(pixels, labels)], **FAST, seed=1) != want
    assert [row.label for row in want.images] == labels.tolist()
    assert [row.clean for row in want.images[:5]] == list(predictor.sets(pixels[:5], seed=0))


def test_without_an_attack(capsys):
    calm = conformal(Shown(), [shown_images(60)], 0.1, 0.25, 0.0)
    report = evaluate_sets(calm, [shown_images(9, seed=1)], progress=True)
    assert report.steps == 0
    assert report.images[0].attacked is None
    assert "Evaluating sets" in capsys.readouterr().err
    robust = conformal(Shown(), [shown_images(60)], 0.2, 0.25, 0.1)
    assert evaluate_sets(robust, [shown_images(9, seed=1)], steps=0).images[0].attacked is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": -1}, "steps=-1 is not allowed"),
        ({"average": 0}, "average=0 is not allowed"),
        ({"seed": -1}, "seed=-1 is not allowed"),
        ({"loader": []}, "gave no images: there is nothing to measure"),
        ({"loader": [(torch.rand(1, 1, 2, 2), torch.tensor([3]))]}, "3 classes: give .* from 0 to 2"),
        ({"loader": [(torch.rand(1, 1, 2, 2) + 2, torch.tensor([0]))]}, r"pixels in \[0, 1\]"),
    ],
)
def test_bad_calls(change, message):
    predictor = conformal(Shown(), [shown_images(60)], 0.2, 0.25, 0.1)
    with pytest.raises(ValueError, match=message):
        evaluate_sets(**{"predictor": predictor, "loader": [shown_images(9, seed=1)], **FAST, **change})


@pytest.mark.slow
@pytest.mark.parametrize("method", ["rscp+", "rscp+ptt", "one-sample"])
def test_attacked_sets_cover_over_20_splits(model, images, method):
    """The attacked images depend on neither the split nor the limit, so that they are found once."""
    settings = {"alpha": 0.1, "sigma": 0.25, "radius": 0.25, "method": method, "n": 30}
    smoothed = conformal(model, [part(images, 180)], **settings).smoothed
    smoothed.batch_size = 1000
    moved = attacked(smoothed, *images, 0.25, 10, 8, seed=0)
    shares = []
    for split in range(20):
        order = torch.randperm(360, generator=torch.Generator().manual_seed(split))
        used, left = order[:180], order[180:]
        predictor = conformal(model, [(images[0][used], images[1][used])], **settings, seed=split, batch_size=1000)
        labels = images[1][left]
        worst = most_harmful(predictor, [each[left] for each in moved], labels, 8, seed=split)
        sets = predictor.sets(worst, seed=split)
        shares.append(np.mean([label in each for label, each in zip(labels.tolist(), sets, strict=True)]))
    assert np.mean(shares) >= 0.9
