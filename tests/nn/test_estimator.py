"""The mathematics of section 3 of the paper, against NumPy and against itself."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from timm_nrpm.choices import PENALTIES
from timm_nrpm.nn.estimator import Penalty, robust_mean, robust_sum

DELTA, GAMMA = 0.5, 1.5
products = arrays(np.float64, st.integers(1, 40), elements=st.floats(-10, 10, width=32))


def penalty(name, eps=1e-3):
    return Penalty.named(name, eps, DELTA, GAMMA)


def oracle(p, name, eps, iterations):
    """Equation 3 with NumPy, the weights written out penalty by penalty."""
    m = p.mean()
    for _ in range(iterations):
        d = np.abs(p - m) + eps
        w = {
            "l1": 1 / d,
            "l2": np.ones_like(d),
            "huber": np.minimum(DELTA / d, 1),
            "mcp": np.maximum(1 / d - 1 / GAMMA, eps),
            "huber-mcp": np.clip(DELTA / (GAMMA - DELTA) * (GAMMA / d - 1), eps, 1),
        }[name]
        m = (w * p).sum() / w.sum()
    return m


@pytest.mark.parametrize("name", PENALTIES)
@settings(max_examples=40)
@given(p=products, iterations=st.integers(0, 5))
def test_matches_numpy(name, p, iterations):
    got = robust_mean(torch.from_numpy(p), penalty(name), iterations).item()
    assert got == pytest.approx(oracle(p, name, 1e-3, iterations), rel=1e-9, abs=1e-9)
    assert p.min() - 1e-9 <= got <= p.max() + 1e-9


@pytest.mark.parametrize("name", PENALTIES)
def test_slope_is_the_derivative_of_the_weight(name):
    t = torch.linspace(-3, 3, 61, dtype=torch.float64)[1::2].clone().requires_grad_()
    w = penalty(name).weight(t)
    (derivative,) = torch.autograd.grad(w.sum(), t) if w.requires_grad else (torch.zeros_like(t),)
    again, slope = penalty(name).weight_and_slope(t.detach())
    torch.testing.assert_close(again, w.detach())
    torch.testing.assert_close(slope, derivative)


@settings(max_examples=60)
@given(p=products)
def test_l1_loss_never_rises(p):
    """Lemma 3.1: eq. 1 falls along k. The lemma is about eps = 0; a tiny eps may add what it hides, D * eps."""
    p = torch.from_numpy(p)
    losses = [(p - robust_mean(p, penalty("l1", 1e-10), k)).abs().sum().item() for k in range(12)]
    assert all(after <= before + 1e-8 for before, after in itertools.pairwise(losses))


@pytest.mark.parametrize("name", PENALTIES)
@pytest.mark.parametrize("eps", [1e-3, 0.1, 1.0])
def test_every_loss_never_rises(name, eps):
    """The same for the loss that a penalty with a visible eps minimises, whose weight falls with the distance."""
    p = torch.randn(20, 9, dtype=torch.float64)
    rho = penalty(name, eps)
    losses = torch.stack([rho.loss(p - robust_mean(p, rho, k).unsqueeze(1)).sum(1) for k in range(8)])
    assert (losses.diff(dim=0) <= 1e-6).all()


def test_loss_of_l1_is_the_absolute_value():
    t = torch.tensor([-2.0, -0.5, 0.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(penalty("l1", 1e-9).loss(t), t.abs(), atol=1e-3, rtol=1e-3)


def contaminated(p, x0, share, iterations, mass):
    """The estimate over `(1 - share) * F + share * delta(x0)` for K <= 1, F with `mass` at each product."""
    D = len(p)
    values = torch.cat([p, torch.tensor([x0], dtype=p.dtype)])
    w = torch.cat([torch.full_like(p, (1 - share) * mass), torch.tensor([share], dtype=p.dtype)])
    if iterations:  # the theorem keeps the centre of the weights at the clean mean
        w = w * penalty("l1", 1e-12).weight(values - p.mean())
    return D * (w * values).sum() / w.sum()


@pytest.mark.parametrize("x0", [-20.0, -1.0, 0.3, 4.0, 1000.0])
def test_influence_functions(x0):
    """Theorem 3.2, both halves, against a numeric contamination.

    The proof gives the products mass 1 / D each in the linear half and mass 1 each in the robust half; with mass 1 / D
    in both, the robust half is D times what the theorem says.
    """
    p = torch.randn(31, dtype=torch.float64)
    D, share = len(p), 1e-7
    z_lpm, z_nrpm = p.sum(), D * robust_mean(p, penalty("l1", 1e-12), 1)
    linear = (contaminated(p, x0, share, 0, 1 / D) - z_lpm) / share
    torch.testing.assert_close(linear, D * (x0 - z_lpm / D), rtol=1e-5, atol=1e-5)
    w, w0 = 1 / (p - z_lpm / D).abs(), 1 / (x0 - z_lpm / D).abs()
    theorem = D * w0 * (x0 - z_nrpm / D) / w.sum()
    for mass in (1.0, 1 / D):
        robust = (contaminated(p, x0, share, 1, mass) - z_nrpm) / share
        torch.testing.assert_close(robust, theorem / mass, rtol=1e-4, atol=1e-4)


def test_an_outlier_moves_the_robust_sum_less():
    clean, weight = torch.rand(1, 64, dtype=torch.float64) + 0.5, torch.ones(1, 64, dtype=torch.float64)
    dirty = clean.clone()
    dirty[0, 7] = 500.0
    shifts = [
        (robust_sum(dirty, weight, penalty("l1"), k) - robust_sum(clean, weight, penalty("l1"), k)).abs()
        for k in (0, 1, 5)
    ]
    assert shifts[2] < shifts[1] < shifts[0] / 10


@settings(max_examples=30)
@given(p=arrays(np.float64, st.sampled_from([3, 7, 15]), elements=st.floats(-10, 10, width=16), unique=True))
def test_many_iterations_reach_the_median(p):
    got = robust_mean(torch.from_numpy(p), penalty("l1", 1e-9), 3000).item()
    assert len(p) * got == pytest.approx(len(p) * np.median(p), abs=0.02 * len(p))
