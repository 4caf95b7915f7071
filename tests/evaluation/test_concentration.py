import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from timm_nrpm.evaluation.concentration import deviation


def by_hand(samples, beta):
    """Hoeffding's bound and that of Maurer and Pontil, each wrong with half of `beta`, in NumPy."""
    n, each = len(samples), beta / 2
    hoeffding = np.sqrt(np.log(1 / each) / (2 * n))
    bernstein = np.sqrt(2 * np.var(samples, ddof=1) * np.log(2 / each) / n) + 7 * np.log(2 / each) / (3 * (n - 1))
    return min(hoeffding, bernstein)


@pytest.mark.parametrize("beta", [0.5, 0.05, 0.001, 1e-9])
@pytest.mark.parametrize("n", [2, 10, 256, 5000])
def test_the_smaller_of_both_bounds(n, beta):
    generator = np.random.default_rng(n)
    rows = [generator.beta(0.5, 0.5, n), generator.beta(0.1, 20, n), np.zeros(n), np.full(n, 0.7), np.arange(n) % 2]
    found = deviation(torch.tensor(np.stack(rows)), beta)
    np.testing.assert_allclose(found, [by_hand(row, beta) for row in rows], rtol=1e-12)


def test_each_bound_is_the_smaller_one_somewhere():
    spread, quiet = torch.tensor([0.0, 1.0] * 128).double(), torch.full((256,), 0.5).double()
    assert float(deviation(spread, 0.001)) == pytest.approx(math.sqrt(math.log(2000) / 512))
    assert float(deviation(quiet, 0.001)) == pytest.approx(7 * math.log(4000) / (3 * 255))


@given(n=st.integers(2, 60), p=st.floats(0.001, 0.999), beta=st.floats(1e-4, 0.9))
def test_it_is_wrong_at_most_that_often_on_either_side(n, p, beta):
    """Coins with probability p, summed over all outcomes."""
    votes = np.arange(n + 1)
    coins = torch.tensor(votes[:, None] > np.arange(n)).double()
    reach, means = deviation(coins, beta).numpy(), votes / n
    chances = stats.binom.pmf(votes, n, p)
    assert chances[means - p > reach + 1e-12].sum() <= beta * (1 + 1e-9)
    assert chances[p - means > reach + 1e-12].sum() <= beta * (1 + 1e-9)


def test_more_samples_bound_more():
    reach = [float(deviation(torch.tensor([0.1, 0.3] * n).double(), 0.01)) for n in (1, 4, 16, 64, 256)]
    assert reach == sorted(reach, reverse=True)
    assert deviation(torch.rand(3, 4, 5), 0.1).shape == (3, 4)
