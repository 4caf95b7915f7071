"""Intervals against their definitions."""

import math

import numpy as np
import pytest
from scipy.stats import beta, norm

from timm_nrpm.evaluation.intervals import exact, of_mean, paired, quantile


@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.999])
def test_the_quantile_is_that_of_the_normal_distribution(confidence):
    assert quantile(confidence) == pytest.approx(norm.ppf((1 + confidence) / 2))


@pytest.mark.parametrize(("right", "count"), [(0, 20), (7, 20), (20, 20)])
@pytest.mark.parametrize("confidence", [0.95, 0.995])
def test_the_exact_interval_is_clopper_and_pearsons_at_any_confidence(right, count, confidence):
    low, high = exact(right, count, confidence)
    tail = (1 - confidence) / 2
    assert low == pytest.approx(beta.ppf(tail, right, count - right + 1) if right else 0.0)
    assert high == pytest.approx(beta.ppf(1 - tail, right + 1, count - right) if right < count else 1.0)


def test_the_paired_interval_is_walds_after_half_an_image_in_each_cell():
    low, high = paired(8, 2, 100, 2.5)
    p, q, n = 8.5 / 102, 2.5 / 102, 102
    half = 2.5 * math.sqrt((p + q - (p - q) ** 2) / n)
    assert (low, high) == pytest.approx((p - q - half, p - q + half))


def test_the_interval_of_a_mean():
    values = np.random.default_rng(0).normal(3, 2, 50)
    half = 1.96 * values.std(ddof=1) / math.sqrt(50)
    assert of_mean(values.tolist()) == pytest.approx((values.mean() - half, values.mean() + half))
    assert of_mean([1.0]) == (-math.inf, math.inf)
    assert of_mean([1.0, 3.0]) == pytest.approx((2 - 1.96, 2 + 1.96))
