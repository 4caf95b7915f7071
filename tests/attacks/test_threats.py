import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from timm_nrpm import Threat
from timm_nrpm.attacks.gradients import generators
from timm_nrpm.attacks.threats import NORMS

BOUNDS = {
    "Linf": st.floats(1e-3, 1),
    "L2": st.floats(1e-3, 5),
    "L1": st.floats(1e-2, 20),
    "L0": st.integers(1, 20),
    "patch": st.integers(1, 5),
}


@st.composite
def cases(draw):
    norm = draw(st.sampled_from(NORMS))
    threat = Threat(norm, draw(BOUNDS[norm]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    shape = (draw(st.integers(1, 3)), draw(st.sampled_from([1, 3])), draw(st.integers(1, 4)), draw(st.integers(1, 4)))
    pixels = torch.rand(shape, generator=generator)
    return threat, pixels, pixels + draw(st.floats(0, 3)) * torch.randn(shape, generator=generator)


@given(cases())
def test_what_is_brought_back_is_within_and_stays(case):
    threat, pixels, moved = case
    back = threat.project(pixels, moved)
    assert bool(threat.allows(pixels, back).all())
    torch.testing.assert_close(threat.project(pixels, back), back, atol=1e-5, rtol=1e-4)
    inside = pixels.clone()
    assert torch.equal(threat.project(pixels, inside), inside)


@given(cases(), st.integers(0, 1000))
def test_a_start_is_within_and_each_images_own(case, seed):
    threat, pixels, _ = case
    seeds = [seed + i for i in range(len(pixels))]
    start = threat.around(pixels, generators(seeds))
    assert bool(threat.allows(pixels, start).all())
    last = threat.around(pixels[-1:], generators(seeds[-1:]))
    torch.testing.assert_close(last, start[-1:])


@settings(max_examples=15)
@given(st.integers(0, 2**31), st.floats(0.1, 3))
def test_l1_finds_the_nearest_as_a_solver_does(seed, eps):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.rand(1, 1, 2, 3, generator=generator, dtype=torch.float64)
    moved = pixels + torch.randn(1, 1, 2, 3, generator=generator, dtype=torch.float64)
    x, goal = pixels.flatten().numpy(), moved.flatten().numpy()
    # The change as a difference of two non-negative parts, so that its L1 norm is linear.
    n = len(x)
    found = minimize(
        lambda v: ((x + v[:n] - v[n:] - goal) ** 2).sum(),
        np.zeros(2 * n),
        bounds=[(0, 1 - a) for a in x] + [(0, a) for a in x],
        constraints=[{"type": "ineq", "fun": lambda v: eps - v.sum()}],
        method="SLSQP",
        options={"ftol": 1e-12, "maxiter": 500},
    ).x
    got = Threat("L1", eps).project(pixels, moved).flatten().numpy()
    np.testing.assert_allclose(got, x + found[:n] - found[n:], atol=2e-4)


def test_distances_by_hand():
    pixels = torch.zeros(1, 2, 1, 3)
    moved = torch.tensor([[[[0.3, 0.0, 0.4]], [[0.0, 0.0, 0.5]]]])
    want = {"Linf": 0.5, "L2": math.sqrt(0.5), "L1": 1.2, "L0": 2, "patch": 3}
    for norm, distance in want.items():
        assert float(Threat(norm, 1).distance(pixels, moved)[0]) == pytest.approx(distance, rel=1e-6)
    kept = Threat("L0", 1).project(pixels, moved)
    assert torch.equal(kept, torch.tensor([[[[0.0, 0.0, 0.4]], [[0.0, 0.0, 0.5]]]]))  # one position, both channels
    moved[0, 1, 0, 1] = 0.4
    kept = Threat("patch", 2).project(pixels, moved)  # in an image of one line, a patch is two pixels wide
    assert torch.equal(kept, torch.tensor([[[[0.0, 0.0, 0.4]], [[0.0, 0.4, 0.5]]]]))
    assert Threat("patch", 2).distance(pixels, kept).tolist() == [2]
    assert Threat("patch", 2).distance(pixels, pixels).tolist() == [0]


@pytest.mark.parametrize(("norm", "eps"), [("Linf", 0.1), ("L2", 0.5), ("L1", 1.0), ("L0", 2), ("patch", 2)])
def test_cheating_is_seen(norm, eps):
    threat, pixels = Threat(norm, eps), torch.full((4, 1, 3, 3), 0.5)
    moved = pixels.clone()
    moved[0, 0, 0, 0] += 0.05  # allowed
    moved[1] = 0.9  # too far
    moved[2, 0, 0, 0] = 1.0001  # no image
    moved[3, 0, 0, 0] = math.nan
    assert threat.allows(pixels, moved).tolist() == [True, False, False, False]


@pytest.mark.parametrize(
    ("norm", "eps", "message"),
    [
        ("L7", 0.1, "norm='L7' is not known: choose one of Linf, L2, L1, L0, patch"),
        ("Linf", 8, "> 0 and <= 1; under Linf it is the largest change of a pixel in .0, 1., like 8 / 255"),
        ("Linf", 0, "eps=0"),
        ("L2", None, "eps= is missing: under L2 it is the length of the change in pixel units, like 0.5"),
        ("L2", -1.0, "> 0; under L2 it is the length"),
        ("L1", float("nan"), "eps=nan"),
        ("L2", float("inf"), "eps=inf"),
        ("L0", 1.5, "whole number of pixels"),
        ("L0", True, "eps=True"),
        ("patch", 0.2, "the side of a square, a whole number of pixels"),
        ("Linf", "8/255", "eps='8/255'"),
    ],
)
def test_bad_threats(norm, eps, message):
    with pytest.raises(ValueError, match=message):
        Threat(norm, eps)
