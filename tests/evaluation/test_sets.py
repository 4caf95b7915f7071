import bisect
import math
from fractions import Fraction
from statistics import NormalDist

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from timm_nrpm.evaluation.sets import METHODS, SCORES, Calibrated, Rule, calibrated, members, own_scores, plain_scores

NORMAL = NormalDist()


def drawn(images=40, copies=1, classes=5, seed=0):
    """Probabilities `[M, S, N]` and labels `[M]`, which resemble those of a classifier under noise."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, classes, images)
    logits = generator.normal(0, 1, (images, 1, classes)) + generator.normal(0, 1, (images, copies, classes))
    logits[np.arange(images), :, labels] += 2
    odds = np.exp(logits)
    return torch.tensor(odds / odds.sum(2, keepdims=True)), torch.tensor(labels)


# --- scores --------------------------------------------------------------------------------------------------------


def scores_by_hand(score, row):
    if score == "hps":
        return [1 - p for p in row]
    return [sum(q for q in row if q > p) for p in row]


@pytest.mark.parametrize("score", SCORES)
def test_the_scores(score):
    probabilities, _ = drawn(copies=3)
    found = plain_scores(score, probabilities)
    want = [[scores_by_hand(score, row) for row in image] for image in probabilities.tolist()]
    np.testing.assert_allclose(found, want, atol=1e-12)
    assert found.min() >= 0
    assert found.max() <= 1


@pytest.mark.parametrize("score", SCORES)
def test_what_is_no_number_fits_worst(score):
    probabilities = torch.full((1, 1, 3), float("nan"), dtype=torch.float64)
    assert plain_scores(score, probabilities).tolist() == [[[1.0, 1.0, 1.0]]]


# --- levels and ranks ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "level", "least"),
    [
        (Rule("vanilla", 0.1, 0.25, 0.25), 0.9, 9),
        (Rule("vanilla", 0.05, 0.25, 9.0), 0.95, 19),  # whatever the radius
        (Rule("vanilla", 0.5, 0.25, 0), 0.5, 1),
        (Rule("rscp+", 0.1, 0.25, 0.25, beta=0.001), 0.902, 10),
        (Rule("rscp+ptt", 0.1, 0.25, 0.25, beta=0.01), 0.92, 12),
        (Rule("one-sample", 0.1, 0.25, 0.0), 0.9, 9),
        (Rule("one-sample", 0.1, 0.25, 0.25), NORMAL.cdf(NORMAL.inv_cdf(0.9) + 1), 88),
        (Rule("one-sample", 0.1, 0.25, 0.5), NORMAL.cdf(NORMAL.inv_cdf(0.9) + 2), 1937),
    ],
)
def test_levels_and_the_images_they_take(rule, level, least):
    assert rule.level == pytest.approx(level, rel=1e-12)
    assert rule.least == least
    assert 1 <= rule.rank(least) <= least
    if least > 1:
        refused = rf"{least - 1} calibration images.* are too few: alpha={rule.alpha:g} with .* takes {least:,} or more"
        with pytest.raises(ValueError, match=refused.replace("+", r"\+")):
            rule.rank(least - 1)


@given(hundredths=st.integers(1, 99), count=st.integers(1, 500))
def test_the_rank_is_exact(hundredths, count):
    """The smallest k of which k / (count + 1) is not below 1 - alpha, in fractions."""
    want = math.ceil((count + 1) * (1 - Fraction(hundredths, 100)))
    rule = Rule("vanilla", hundredths / 100, 0.25, 0.0)
    if want > count:
        with pytest.raises(ValueError, match="too few"):
            rule.rank(count)
    else:
        assert rule.rank(count) == want
        assert count >= rule.least


@given(alpha=st.floats(0.01, 0.9), ratio=st.floats(0, 3))
def test_the_guarantee_follows_from_the_level(alpha, ratio):
    """A change of the image costs a Gaussian as much as the level was raised by."""
    rule = Rule("one-sample", alpha, 0.5, 0.5 * ratio)
    kept = stats.norm.sf(stats.norm.isf(1 - rule.level) * -1 + ratio) if rule.level < 1 - 1e-12 else 1 - alpha
    assert kept == pytest.approx(1 - alpha, rel=1e-3)


def test_a_radius_that_no_number_of_images_is_enough_for():
    with pytest.raises(ValueError, match="takes inf or more"):
        Rule("one-sample", 0.1, 0.01, 1.0).rank(10**9)


# --- calibration against NumPy -------------------------------------------------------------------------------------


def reach_by_hand(samples, beta):
    n = len(samples)
    bernstein = np.sqrt(2 * np.var(samples, ddof=1) * np.log(4 / beta) / n) + 7 * np.log(4 / beta) / (3 * (n - 1))
    return min(np.sqrt(np.log(2 / beta) / (2 * n)), bernstein)


def limit_by_hand(rule, own):
    """From the scores `[M, S]` of the right classes."""
    if rule.method in ("vanilla", "one-sample"):
        missed = rule.alpha
        if rule.method == "one-sample":
            missed = 1 - NORMAL.cdf(NORMAL.inv_cdf(1 - rule.alpha) + rule.radius / rule.sigma)
        return np.sort(own[:, 0])[math.ceil((len(own) + 1) * (1 - missed) - 1e-9) - 1]
    upper = np.sort([row.mean() + reach_by_hand(row, rule.beta) for row in own])
    threshold = upper[math.ceil((len(own) + 1) * (1 - rule.alpha + 2 * rule.beta) - 1e-9) - 1]
    if threshold >= 1:
        return 1.0
    return NORMAL.cdf(NORMAL.inv_cdf(threshold) + rule.radius / rule.sigma)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("method", ["vanilla", "one-sample", "rscp+"])
@pytest.mark.parametrize("radius", [0.0, 0.1, 0.25])
def test_limits_and_sets(method, score, radius):
    rule = Rule(method, 0.2, 0.25, radius, score, n=64)
    copies = max(rule.copies, 1)
    probabilities, labels = drawn(60, copies)
    found = calibrated(rule, own_scores(rule.score, probabilities, labels))
    scores = np.array([[scores_by_hand(score, row) for row in image] for image in probabilities.tolist()])
    limit = limit_by_hand(rule, scores[np.arange(60), :, labels])
    assert found.limit == pytest.approx(limit, rel=1e-9)
    assert found.images == 60
    others, _ = drawn(20, copies, seed=1)
    inside = found.inside(others)
    for image, row in zip(others.tolist(), inside.tolist(), strict=True):
        each = np.array([scores_by_hand(score, copy) for copy in image])
        low = each.mean(0)
        if method == "rscp+":
            low = low - [reach_by_hand(column, rule.beta) for column in each.T]
        assert row == [bool(value <= limit + 1e-12) for value in low]
    assert members(inside) == tuple(tuple(np.flatnonzero(row)) for row in inside.numpy())


def test_the_transformation_by_hand():
    """The ranks among the scores held out, a steep sigmoid around 1 - alpha, and then RSCP+ on the other images."""
    rule = Rule("rscp+ptt", 0.2, 0.25, 0.1, n=64, holdout=0.25)
    probabilities, labels = drawn(80, 64)
    found = calibrated(rule, own_scores("hps", probabilities, labels), seed=3)
    order = torch.randperm(80, generator=torch.Generator().manual_seed(3)).numpy()
    own = 1 - probabilities.numpy()[np.arange(80), :, labels]
    reference = sorted(own[order[:20], 0])
    assert found.reference == pytest.approx(reference)
    assert found.images == 60

    def transformed(value):
        rank = bisect.bisect_right(reference, value) / 20
        return 1 / (1 + math.exp(min(400 * (0.8 - rank), 700)))

    rest = np.array([[transformed(value) for value in row] for row in own[order[20:]]])
    assert found.limit == pytest.approx(limit_by_hand(rule, rest), rel=1e-9)
    others, _ = drawn(10, 64, seed=1)
    want = [[[transformed(1 - p) for p in copy] for copy in image] for image in others.tolist()]
    np.testing.assert_allclose(found.scores(others), want, atol=1e-12)
    other = calibrated(rule, own_scores("hps", probabilities, labels), seed=4)
    assert other.reference != found.reference


def test_a_threshold_of_1_gives_all_classes():
    rule = Rule("rscp+", 0.1, 0.25, 0.25, n=4)
    probabilities, labels = drawn(30, 4)
    found = calibrated(rule, own_scores(rule.score, probabilities, labels))
    assert found.limit == 1.0
    assert found.is_trivial
    assert found.inside(drawn(7, 4, seed=1)[0]).all()
    assert found.inside(torch.full((1, 4, 5), float("nan"), dtype=torch.float64)).all()
    assert not Calibrated(rule, 30, 0.9).is_trivial


def test_too_few_images_say_how_many_it_takes():
    probabilities, labels = drawn(40)
    rule = Rule("one-sample", 0.1, 0.25, 0.25)
    with pytest.raises(ValueError, match=r"40 calibration images are too few: alpha=0.1 .* takes 88 or more"):
        calibrated(rule, own_scores("hps", probabilities, labels))
    with pytest.raises(ValueError, match=r"8 calibration images beside the share of 0.2 .* takes 10 or more"):
        calibrated(Rule("rscp+ptt", 0.1, 0.25, 0.25, n=4), own_scores("hps", *drawn(10, 4)))


# --- the guarantees, where the worst attack is known ---------------------------------------------------------------


def line_scores(x, noise):
    """Probabilities of two classes `[M, S, 2]`, the second of which grows with a pixel `x` under noise."""
    p = torch.sigmoid(x.view(-1, 1) + noise)
    return torch.stack((1 - p, p), -1)


@pytest.mark.parametrize(("method", "ratio"), [("one-sample", 0.5), ("one-sample", 1.0), ("rscp+", 1.0)])
def test_the_worst_attack_on_a_line(method, ratio):
    """The score of class 1 falls with one pixel, so that the worst change within r lowers it by r. If all images are
    alike, the share that one copy's threshold covers is an order statistic of uniform numbers, and so is known what
    remains of it under attack: 1 - alpha at least, and more only since calibration images are few."""
    generator = torch.Generator().manual_seed(0)
    sigma, alpha, rounds = 1.0, 0.2, 400
    rule = Rule(method, alpha, sigma, ratio * sigma, n=200)
    copies, labels = max(rule.copies, 1), torch.ones(60, dtype=torch.long)
    covered = []
    for _ in range(rounds if method == "one-sample" else 20):
        x = torch.zeros(120) if method == "one-sample" else 0.5 * torch.randn(120, generator=generator)
        x = x.double()
        noise = sigma * torch.randn(120, copies, generator=generator).double()
        found = calibrated(rule, own_scores("hps", line_scores(x[:60], noise[:60]), labels))
        covered.append(found.inside(line_scores(x[60:] - ratio * sigma, noise[60:]))[:, 1].double().mean())
    mean, error = float(np.mean(covered)), float(np.std(covered) / math.sqrt(len(covered)))
    assert mean >= 1 - alpha - 3 * error
    if method == "one-sample":
        covers = stats.beta(rule.rank(60), 61 - rule.rank(60))
        want = covers.expect(lambda share: stats.norm.cdf(stats.norm.ppf(share) - ratio))
        assert 1 - alpha <= want < 0.9
        assert mean == pytest.approx(want, abs=4 * error)


def test_without_the_guarantee_the_line_is_missed():
    generator = torch.Generator().manual_seed(0)
    labels = torch.ones(500, dtype=torch.long)
    noise = torch.randn(1000, 1, generator=generator).double()
    own = own_scores("hps", line_scores(torch.zeros(500).double(), noise[:500]), labels)
    found = calibrated(Rule("vanilla", 0.2, 1.0, 1.0), own)
    shifted = found.inside(line_scores(torch.full((500,), -1.0).double(), noise[500:]))[:, 1].double().mean()
    assert float(shifted) == pytest.approx(NORMAL.cdf(NORMAL.inv_cdf(0.8) - 1), abs=0.08)


# --- what else one may give ----------------------------------------------------------------------------------------


def test_the_guarantee_in_words():
    plain, robust = (Rule(method, 0.1, 0.25, 0.125).guarantee for method in ("vanilla", "one-sample"))
    assert plain.endswith("of an attacked image nothing is known.")
    assert "with probability 0.9 or more" in plain
    assert "even if the image was changed by up to L2 0.125" in robust
    assert "anything but the noise" in robust


def test_harm_is_what_decides():
    labels = torch.tensor([0, 0])
    probabilities = torch.tensor([[[0.9, 0.1], [0.2, 0.8]], [[0.45, 0.55], [0.45, 0.55]]]).double()
    one = Calibrated(Rule("one-sample", 0.1, 0.25, 0.1), 99, 0.6)
    assert one.harm(probabilities, labels).tolist() == pytest.approx([0.5 + 0.00045, 0.00055])
    several = Calibrated(Rule("rscp+", 0.1, 0.25, 0.1), 99, 0.6)
    assert several.harm(probabilities, labels).tolist() == pytest.approx([0.45, 0.55])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "rscp"}, r"method='rscp' is not known: choose one of vanilla, rscp\+, rscp\+ptt, one-sample"),
        ({"score": "raps"}, "score='raps' is not known: choose one of hps, aps"),
        ({"alpha": 0}, "alpha=0 is not allowed: give a number > 0 and < 1"),
        ({"alpha": 1}, "alpha=1 is"),
        ({"alpha": float("nan")}, "alpha=nan is"),
        ({"sigma": 0}, "sigma=0 is not allowed: give a number > 0, in pixel units"),
        ({"sigma": -0.1}, "sigma=-0.1 is"),
        ({"radius": -0.1}, "radius=-0.1 is not allowed: give a number >= 0, an L2 distance"),
        ({"n": 1}, "n=1 is not allowed: give an integer >= 2"),
        ({"beta": 0}, "beta=0 is"),
        ({"beta": 0.05}, "beta=0.05 is not allowed: 2 .* of the alpha of 0.1 .* give less than 0.05, such as 0.001"),
        ({"holdout": 1}, "holdout=1 is"),
    ],
)
def test_bad_rules(change, message):
    with pytest.raises(ValueError, match=message):
        Rule(**{"method": "rscp+", "alpha": 0.1, "sigma": 0.25, "radius": 0.1, **change})


def test_every_method_has_its_copies():
    copies = {method: Rule(method, 0.1, 0.25, 0.1, n=7).copies for method in METHODS}
    assert copies == {"vanilla": 0, "one-sample": 1, "rscp+": 7, "rscp+ptt": 7}
