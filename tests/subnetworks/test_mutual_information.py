"""Mutual information against closed forms, of Gaussians and of discrete variables, and against another estimator."""

import math
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import ndtri
from scipy.stats import rankdata

from timm_nrpm.subnetworks.mutual_information import edge, estimate, normal_scores


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def gaussians(count, size, correlation, seed=0):
    """Two variables whose coordinates correlate in pairs, the first one turned so that no pair shows."""
    generator = seeded(seed)
    x, noise = (torch.randn(count, size, generator=generator) for _ in range(2))
    turn = torch.linalg.qr(torch.randn(size, size, generator=generator))[0]
    return x @ turn, correlation * x + math.sqrt(1 - correlation**2) * noise


@pytest.mark.parametrize("correlation", [0.5, 0.9])
@pytest.mark.parametrize("size", [1, 2, 3, 5, 10, 20])
def test_correlated_gaussians_are_within_a_tenth_of_the_closed_form(size, correlation):
    true = -size / 2 * math.log(1 - correlation**2)
    assert edge(*gaussians(10_000, size, correlation)) == pytest.approx(true, rel=0.1)


@pytest.mark.parametrize("size", [1, 2, 3, 20])
def test_independent_gaussians_have_none(size):
    found = estimate(*gaussians(10_000, size, 0.0))
    assert abs(found.nats) < 0.01


def table(weights):
    """Samples of two discrete variables with a joint distribution, and their mutual information."""
    joint = torch.tensor(weights, dtype=torch.float64)
    joint /= joint.sum()
    rows, columns = joint.sum(1, keepdim=True), joint.sum(0, keepdim=True)
    true = float((joint * (joint / (rows * columns)).clamp_min(1e-300).log()).sum())
    drawn = torch.multinomial(joint.flatten(), 10_000, replacement=True, generator=seeded())
    return drawn // joint.shape[1], drawn % joint.shape[1], true


@pytest.mark.parametrize(
    "weights",
    [
        [[0.4, 0.1], [0.1, 0.4]],
        [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
        [[3, 1, 1, 1], [1, 3, 1, 1], [1, 1, 3, 1], [1, 1, 1, 3]],
        (torch.eye(10) * 5 + 0.2).tolist(),
    ],
)
def test_discrete_variables_are_within_a_tenth_of_the_closed_form(weights):
    x, y, true = table(weights)
    assert edge(x, y) == pytest.approx(true, rel=0.1)
    assert edge(x * 1_000_000 - 7, y.bool() if len(weights) == 2 else y.byte()) == pytest.approx(true, rel=0.1)


def test_independent_discrete_variables_have_none():
    generator = seeded()
    x, y = (torch.randint(10, (10_000,), generator=generator) for _ in range(2))
    assert abs(edge(x, y)) < 0.01


@pytest.mark.parametrize("size", [1, 5])
def test_a_class_and_what_depends_on_it(size):
    """Two Gaussians apart: the information is the entropy of the class less that of its posterior, by quadrature."""
    generator, shift = seeded(), 2.0
    y = torch.randint(2, (10_000,), generator=generator)
    x = torch.randn(10_000, size, generator=generator)
    x[:, 0] += shift * y
    at = torch.linspace(-12, 14, 100_001, dtype=torch.float64)
    densities = torch.stack([torch.exp(-((at - c) ** 2) / 2) / math.sqrt(2 * math.pi) for c in (0.0, shift)])
    mixed = densities.mean(0)
    true = float(((densities * (densities / mixed).log()).mean(0)).nan_to_num().sum() * (at[1] - at[0]))
    assert edge(x, y) == pytest.approx(true, rel=0.1)
    assert edge(y, x) == pytest.approx(true, rel=0.1)


@pytest.mark.parametrize("count", [3000, 10_000])
def test_many_classes_and_many_coordinates(count):
    """Ten classes far apart in ten coordinates tell all: the entropy of the classes. Nearer ones, against a posterior
    that is known."""
    generator = seeded()
    y = torch.randint(10, (count,), generator=generator)
    noise = torch.randn(count, 10, generator=generator)
    for distance in (6.0, 2.0):
        x = noise + distance * torch.nn.functional.one_hot(y, 10)
        posterior = (distance * x).log_softmax(1)[torch.arange(count), y]
        true = math.log(10) + float(posterior.mean())
        assert edge(x, y) == pytest.approx(true, rel=0.1)
        assert edge(y, x) == pytest.approx(true, rel=0.1)
    assert abs(edge(noise, y)) < 0.03


def test_a_rare_value_among_few_coordinates():
    x = torch.randn(200, 3, generator=seeded())
    y = torch.zeros(200, dtype=torch.long)
    y[7] = 1
    assert abs(edge(x, y)) < 0.1
    assert abs(edge(x, torch.arange(200))) < 0.5  # every sample its own value: nothing can be known


def test_a_dependence_without_correlation_is_seen_in_few_coordinates():
    x = torch.randn(10_000, 1, generator=seeded())
    y = x**2 + 0.3 * torch.randn(10_000, 1, generator=seeded(1))
    assert edge(x, y) > 0.7


def test_within_a_class_what_the_class_explains_is_gone():
    generator = seeded()
    label = torch.randint(4, (8000,), generator=generator)
    x, y = (3.0 * label[:, None] + torch.randn(8000, 1, generator=generator) for _ in range(2))
    assert edge(x, y) > 0.8
    assert abs(edge(x, y, given=label)) < 0.02
    mixed = torch.where(label[:, None] % 2 == 0, x, y)
    assert edge(x, mixed, given=label) > 1.0  # within half of the classes both are the same


@settings(max_examples=10)
@given(
    seed=st.integers(0, 1000),
    size=st.integers(1, 4),
    change=st.sampled_from([torch.exp, lambda x: x**3, lambda x: 5e6 * x + 3, torch.sigmoid]),
)
def test_increasing_changes_of_a_coordinate_leave_it_as_it_is(seed, size, change):
    x, y = (each.double() for each in gaussians(300, size, 0.7, seed))
    assert edge(change(x), y) == edge(x, y)


def test_shapes_and_constants_do_not_matter():
    x, y = gaussians(1000, 6, 0.8)
    wanted = edge(x, y)
    assert edge(x.view(1000, 2, 3), y.view(1000, 3, 2, 1)) == wanted
    assert edge(torch.cat([x, torch.ones(1000, 1)], dim=1), y) == pytest.approx(wanted, abs=0.02)
    assert edge(torch.ones(1000, 3), y) == 0
    assert edge(x.half(), y) == pytest.approx(wanted, abs=0.1)
    assert edge(x.requires_grad_(), y) == wanted
    assert edge(x.detach(), y, seed=1) != wanted


@given(st.lists(st.integers(-3, 3), min_size=2, max_size=40))
def test_scores_are_those_of_ranks(values):
    column = torch.tensor(values, dtype=torch.float64)[:, None]
    wanted = ndtri((rankdata(values) - 0.5) / len(values))
    assert torch.allclose(normal_scores(column)[:, 0], torch.tensor(wanted))


def test_it_agrees_with_nearest_neighbours_in_one_dimension():
    feature_selection = pytest.importorskip("sklearn.feature_selection", reason="scikit-learn is not installed")
    for correlation in (0.3, 0.6, 0.9):
        x, y = gaussians(4000, 1, correlation)
        theirs = feature_selection.mutual_info_regression(x.numpy(), y[:, 0].numpy(), random_state=0)[0]
        assert edge(x, y) == pytest.approx(float(theirs), abs=0.05)


def test_many_coordinates_of_few_samples_show_no_dependence_that_is_not_there():
    x, y = (torch.randn(300, 2000, generator=seeded(seed)) for seed in (0, 1))
    found = estimate(x, y)
    assert abs(found.nats) < 0.1
    y[:, :50] = x[:, :50]
    assert estimate(x[:, :50], y[:, :50]).nats > 3


@pytest.mark.parametrize(
    ("x", "y", "given", "message"),
    [
        (torch.randn(99, 2), torch.randn(99, 2), None, "99 samples are too few.*give 100 or more"),
        (torch.randn(200, 2), torch.randn(100, 2), None, r"\[200, 2\] and y is \[100, 2\]: give as many"),
        (torch.randn(200), torch.full((200,), math.inf), None, "y has values that are not finite"),
        (torch.randn(200), torch.randn(200), torch.zeros(199).long(), "a class for each sample"),
        (torch.randn(200), torch.randn(200), torch.zeros(200), "of torch.float32"),
        (torch.randn(200), torch.randn(200), torch.arange(200) // 150, "50 samples of class 1 are too few"),
        (torch.randn(200, dtype=torch.complex64), torch.randn(200), None, "x is complex"),
        (torch.tensor(1.0), torch.randn(200), None, r"x is \[\]"),
    ],
)
def test_bad_input_is_refused(x, y, given, message):
    with pytest.raises(ValueError, match=message):
        edge(x, y, given=given)


@pytest.mark.slow
def test_time_grows_with_the_samples():
    """Ten times the samples take about ten times as long; at most thirty here, where a square would take a hundred."""
    seconds = []
    for count in (20_000, 200_000):
        x, y = gaussians(count, 10, 0.5)
        start = time.perf_counter()
        edge(x, y)
        seconds.append(time.perf_counter() - start)
    assert seconds[1] < 30 * seconds[0]
