import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from fractions import Fraction
from statistics import NormalDist

import forked
import numpy as np
import pytest
import timm
import torch
import torch.nn as nn
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch.utils.data import DataLoader, TensorDataset

import timm_nrpm
from timm_nrpm import NRPMConfig, reprogram_
from timm_nrpm.data.loaders import digits
from timm_nrpm.evaluation.certificates import Certificate, CertificationReport, certified_radius, lower_bound
from timm_nrpm.evaluation.certification import certify, smoothed_predict
from timm_nrpm.figures.certified import draw_certified
from timm_nrpm.models.registry import DIGITS
from timm_nrpm.nn.pixel_model import PixelModel

PIXELS = 12


class Line(nn.Module):
    """Class 1 where w.x + b > 0, else class 0; keeps what it sees."""

    def __init__(self, weight=None, bias=0.0, pause=0.0):
        super().__init__()
        weight = torch.linspace(-1, 2, PIXELS) if weight is None else torch.as_tensor(weight)
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(torch.tensor(bias))
        self.seen, self.pause = [], pause

    def margin(self, pixels):
        return pixels.flatten(1) @ self.weight + self.bias

    def forward(self, x):
        time.sleep(self.pause)
        self.seen.append(x.clone())
        margin = self.margin(x)
        return torch.stack((torch.zeros_like(margin), margin), 1)

    def distances(self, pixels):
        """Of every image from the plane, in pixel units: its true radius."""
        return (self.margin(pixels).abs() / self.weight.norm()).detach()


def loader(count=6, batch=2, seed=1):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.rand(count, 3, 2, 2, generator=generator)
    return list(zip(pixels.split(batch), (Line().margin(pixels) > 0).long().split(batch), strict=True))


# --- the bound and the radius --------------------------------------------------------------------------------------


def at_least(votes, n, p):
    """P(X >= votes) of a binomial, term by term."""
    k = np.arange(votes, n + 1)
    choose = [math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) for i in k]
    return float(np.exp(choose + k * np.log(p) + (n - k) * np.log1p(-p)).sum())


def inverted(votes, n, alpha):
    """The p at which `votes` or more have probability alpha, by bisection."""
    low, high = 0.0, 1.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if middle == 0 or at_least(votes, n, middle) < alpha else (low, middle)
    return low


@pytest.mark.parametrize("confidence", [0.999, 0.95, 0.5])
@pytest.mark.parametrize(("votes", "n"), [(1, 1), (1, 10), (7, 10), (10, 10), (51, 100), (990, 1000), (999, 1000)])
def test_the_bound_is_exact(votes, n, confidence):
    found = lower_bound(votes, n, confidence)
    assert found == pytest.approx(inverted(votes, n, 1 - confidence), rel=1e-9)
    interval = stats.binomtest(votes, n, alternative="greater").proportion_ci(confidence, method="exact")
    assert found == pytest.approx(interval.low, rel=1e-9)


@pytest.mark.parametrize("confidence", [0.999, 1 - 1e-6, 1 - 1e-12, 1 - 2**-53])
@pytest.mark.parametrize(("votes", "n"), [(9, 10), (10, 10), (900, 1000)])
def test_the_bound_keeps_its_precision_near_certainty(votes, n, confidence):
    """At the bound, as many votes or more have the probability alpha, summed in exact fractions."""
    alpha, p = 1 - Fraction(confidence), Fraction(lower_bound(votes, n, confidence))
    tail = sum(math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(votes, n + 1))
    assert float(tail / alpha) == pytest.approx(1.0, rel=1e-10)
    assert lower_bound(n, n, confidence) == pytest.approx(math.exp(math.log(alpha) / n), rel=1e-12)


def test_the_ends_of_the_bound():
    assert lower_bound(0, 10, 0.999) == 0.0
    for n in (1, 10, 1000, 100_000):
        assert lower_bound(n, n, 0.999) == pytest.approx(0.001 ** (1 / n), rel=1e-12)
    assert lower_bound(10**17, 10**17, 0.5) < 1.0  # where 1 would be the nearest number
    assert math.isfinite(certified_radius(lower_bound(10**17, 10**17, 0.5), 1.0))


@given(n=st.integers(1, 60), confidence=st.floats(0.5, 1 - 1e-6), p=st.floats(1e-4, 1 - 1e-4))
def test_the_bound_is_too_high_at_most_that_often(n, confidence, p):
    """Coverage, summed over all outcomes."""
    k = np.arange(n + 1)
    too_high = np.array([lower_bound(int(votes), n, confidence) > p * (1 + 1e-12) for votes in k])
    assert stats.binom.pmf(k, n, p)[too_high].sum() <= (1 - confidence) * (1 + 1e-6)


@given(n=st.integers(2, 200), confidence=st.floats(0.5, 1 - 1e-6))
def test_more_votes_bound_more(n, confidence):
    bounds = [lower_bound(votes, n, confidence) for votes in range(n + 1)]
    assert bounds == sorted(bounds)
    assert all(bound <= votes / n for votes, bound in enumerate(bounds))
    assert lower_bound(n, n, (1 + confidence) / 2) < bounds[-1]


def test_confidence_is_the_probability_of_being_right():
    """900 of 1000 votes: the interval that SciPy gives at 95 % ends at 0.883, the certificate at Phi^-1 of it."""
    interval = stats.binomtest(900, 1000, alternative="greater").proportion_ci(0.95, method="exact")
    bound = lower_bound(900, 1000, confidence=0.95)
    assert bound == pytest.approx(interval.low, rel=1e-12)
    assert certified_radius(bound, 1.0) == pytest.approx(NormalDist().inv_cdf(interval.low), rel=1e-9)
    assert certified_radius(bound, 1.0) < NormalDist().inv_cdf(0.9)  # no estimate is beyond the votes themselves
    pixels = torch.full((1, 1, 1, 1), 0.5)
    data = [(pixels, torch.ones(1, dtype=torch.long))]
    radii = [certify(Line([1.0], bias=-0.3), data, confidence=c).images[0].radius for c in (0.5, 0.95, 0.999)]
    assert radii == sorted(radii, reverse=True)
    assert radii[2] == certify(Line([1.0], bias=-0.3), data).images[0].radius  # the paper's alpha is 0.001
    assert certify(Line(), loader(1)).confidence == 0.999


def test_the_radius_by_hand():
    assert certified_radius(0.5, 0.25) == 0.0
    assert certified_radius(0.3, 0.25) == 0.0
    assert certified_radius(0.9772498680518208, 0.25) == pytest.approx(0.5)  # Phi(2)
    assert certified_radius(0.9772498680518208, 0.25, 0.8413447460685429) == pytest.approx(0.25)  # Phi(2), Phi(1)
    assert certified_radius(0.5, 0.25, 0.15865525393145707) == pytest.approx(0.25)  # Phi(0), Phi(-1)
    report = certify(Line(bias=50.0), loader(1), 0.5, n=100)
    want = 0.5 * NormalDist().inv_cdf(0.001 ** (1 / 100))  # all agree
    assert report.images == (Certificate(label=report.images[0].label, predicted=1, radius=pytest.approx(want),
                                         candidate=1, selected=100, votes=100),)  # fmt: skip
    assert report.largest_radius == pytest.approx(want)


# --- a model whose smoothed answer is known ------------------------------------------------------------------------


def test_a_plane_is_certified_up_to_its_distance():
    """Noise moves x over the plane with probability Phi(-distance / sigma); the true radius is the distance."""
    model, data = Line(bias=-2.4), loader(8)
    pixels = torch.cat([x for x, _ in data])
    true = model.distances(pixels)
    assert 0.02 < true.min() < 0.1
    assert true.max() < 0.6
    few, many = (certify(model, data, 0.25, n=n, batch_size=5000) for n in (500, 10_000))
    for i, (rough, fine) in enumerate(zip(few.images, many.images, strict=True)):
        assert rough.radius <= true[i]
        assert 0.75 * true[i] < fine.radius <= true[i]
        assert fine.predicted == int(model.margin(pixels)[i] > 0)
        share = NormalDist().cdf(float(true[i]) / 0.25)
        assert fine.votes / 10_000 == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / 10_000))
    assert sum(r.radius for r in few.images) < sum(r.radius for r in many.images)
    assert smoothed_predict(model, pixels, 0.25, n=2000, batch_size=2000) == tuple(r.predicted for r in many.images)


def test_certificates_are_wrong_as_often_as_allowed_and_no_oftener():
    """300 images at one distance: the exact bound is too high in a share of them just below 1 - `confidence`."""
    model, n, confidence, sigma = Line([1.0], bias=-0.3), 60, 0.8, 0.25
    data = [(torch.full((300, 1, 1, 1), 0.5), torch.ones(300, dtype=torch.long))]
    wrong = sum(row.radius > 0.2 for row in certify(model, data, sigma, n=n, confidence=confidence).images)
    share = NormalDist().cdf(0.2 / sigma)
    k = np.arange(n + 1)
    high = np.array([certified_radius(lower_bound(int(v), n, confidence), sigma) > 0.2 for v in k])
    expected = stats.binom.pmf(k, n, share)[high].sum()
    assert 0.05 < expected <= 1 - confidence
    assert wrong == pytest.approx(300 * expected, abs=4 * math.sqrt(300 * expected * (1 - expected)))


def test_it_abstains_where_both_classes_are_as_likely():
    pixels = torch.full((5, 1, 1, 1), 0.5)
    model = Line([1.0], bias=-0.5)
    report = certify(model, [(pixels, torch.ones(5, dtype=torch.long))], 0.25, n=400)
    assert [(row.predicted, row.radius) for row in report.images] == [(None, 0.0)] * 5
    assert (report.abstained, report.certified_accuracy(0.0), report.average_certified_radius) == (1.0, 0.0, 0.0)
    assert all(150 < row.votes < 250 for row in report.images)
    assert smoothed_predict(model, pixels, 0.25) == (None,) * 5


@pytest.mark.parametrize(("confidence", "certifies", "predicts"), [(0.5, 2, 2), (0.95, 5, 6), (0.999, 10, 11)])
def test_so_many_samples_it_takes_at_least(tmp_path, confidence, certifies, predicts):
    """All agree: certify needs alpha ** (1 / n) > 1/2, predict 2 * 2 ** -n <= alpha. Fewer are refused before work."""
    model, data, alpha = Line(bias=50.0), loader(1), 1 - confidence
    assert alpha ** (1 / certifies) > 0.5 >= alpha ** (1 / (certifies - 1))
    assert 2 * 2**-predicts <= alpha < 2 * 2 ** -(predicts - 1)
    assert certify(model, data, n0=1, n=certifies, confidence=confidence).images[0].predicted == 1
    assert smoothed_predict(model, data[0][0], n=predicts, confidence=confidence) == (1,)
    model.seen.clear()
    refused = rf"n={certifies - 1} is not allowed: .* confidence {confidence} .* give n={certifies} or more"
    with pytest.raises(ValueError, match=refused):
        certify(model, data, n0=1, n=certifies - 1, confidence=confidence, resume=tmp_path / "certified.jsonl")
    with pytest.raises(ValueError, match=rf"n={predicts - 1} is not allowed: .* give n={predicts} or more"):
        smoothed_predict(model, data[0][0], n=predicts - 1, confidence=confidence)
    assert not model.seen
    assert not list(tmp_path.iterdir())


def test_the_report_says_why_all_abstained():
    pixels = torch.full((3, 1, 1, 1), 0.5)
    data = [(pixels, torch.ones(3, dtype=torch.long))]
    report = certify(Line([1.0], bias=-0.5), data, 0.25, n=400)
    most = max(row.votes for row in report.images)
    needed = next(k for k in range(401) if stats.binom.sf(k - 1, 400, 0.5) < 0.001)
    assert report.votes_needed == needed == 232
    assert f"a certificate takes 232 of 400 votes for one class, and no image had more than {most}" in str(report)
    assert "more samples n" in str(report)
    assert "takes" not in str(certify(Line([1.0], bias=-0.3), data, 0.25, n=400))
    nothing = certify(Constant(float("nan"), 0.0), data, n=400)
    assert "1500 of 1500 noisy samples gave logits that are no numbers" in str(nothing)


# --- noise ---------------------------------------------------------------------------------------------------------


def shown(batch_size, batch=2, n0=7, n=30, **options):
    model = Line()
    report = certify(model, loader(batch=batch), n0=n0, n=n, batch_size=batch_size, **options)
    return torch.cat([x for x in model.seen if len(x) == 1 or batch_size > 1][1:]), report


def test_noise_depends_on_seed_image_and_sample_alone():
    seen, report = shown(batch_size=100)
    for batch_size, batch in ((1, 6), (3, 1), (37, 4)):
        other, same = shown(batch_size=batch_size, batch=batch)
        assert torch.equal(seen, other)
        assert report == same
    assert len(seen.unique(dim=0)) == 6 * 37  # none is used twice
    fewer, _ = shown(batch_size=100, n=20)
    assert torch.equal(fewer[:27], seen[:27])  # of the first image
    assert torch.equal(fewer[27:54], seen[37:64])  # of the second
    assert not torch.equal(seen, shown(batch_size=100, seed=1)[0])


def test_noise_is_normal_and_added_before_normalisation():
    seen, _ = shown(batch_size=100, n0=2000, n=2000, sigma=0.5)
    noise = seen.view(6, 4000, PIXELS) - torch.cat([x for x, _ in loader()]).view(6, 1, PIXELS)
    assert stats.kstest(noise.flatten().numpy()[:20_000], stats.norm(0, 0.5).cdf).pvalue > 0.001
    assert np.abs(np.corrcoef(noise[:, :, 0].numpy()) - np.eye(6)).max() < 0.08  # images have noise of their own
    assert seen.min() < 0  # and it is not clamped
    normalised, _ = shown(batch_size=100, n0=2000, n=2000, sigma=0.5, mean=(0.25,), std=(0.5,))
    torch.testing.assert_close(normalised, (seen - 0.25) / 0.5)


def test_another_default_dtype_changes_nothing():
    seen, _ = shown(batch_size=100)
    torch.set_default_dtype(torch.float64)
    try:
        model = Line().float()
        certify(model, loader_of_float32(), n0=7, n=30)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(torch.cat(model.seen[1:]), seen)


def loader_of_float32():
    torch.set_default_dtype(torch.float32)
    data = loader()
    torch.set_default_dtype(torch.float64)
    return data


def test_model_and_generators_are_left_as_they_were():
    model = timm_nrpm.create_model(DIGITS, pretrained=True, lam=0.9).train()
    model.fc.weight.requires_grad_(False)
    model.bn1.eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    pixels, labels = (t[:2] for t in digits("test"))
    torch.manual_seed(5)
    want = torch.rand(3)
    torch.manual_seed(5)
    certify(model, DataLoader(TensorDataset(pixels, labels), batch_size=1), n0=2, n=10)
    smoothed_predict(model, pixels, n=11)
    assert torch.equal(torch.rand(3), want)
    assert model.training
    assert not model.bn1.training
    assert not model.fc.weight.requires_grad
    assert model.conv1.weight.requires_grad
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


# --- resuming ------------------------------------------------------------------------------------------------------

SETTINGS = {"sigma": 0.5, "n0": 10, "n": 40, "batch_size": 7, "seed": 3}
KILLED = """
import sys
sys.path[:0] = [{tests!r}, {tests!r} + "/.."]
from test_certification import SETTINGS, Line, certify, loader
certify(Line(bias=-2.4, pause=0.01), loader(12), **SETTINGS, resume={path!r})
"""


def rows(path):
    """What a file holds but for the time it took."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines[1:]:
        line["certificate"].pop("seconds")
    return lines


@pytest.mark.parametrize("finished", [0, 4])
def test_a_killed_run_goes_on(tmp_path, finished):
    whole = certify(Line(bias=-2.4), loader(12), **SETTINGS, resume=tmp_path / "whole.jsonl")
    path = tmp_path / "killed.jsonl"
    code = KILLED.format(tests=os.path.dirname(__file__), path=str(path))
    with forked.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True) as process:
        until = time.monotonic() + 120
        while not path.exists() or path.read_bytes().count(b"\n") < 1 + finished:
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < until
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    done = path.read_bytes().count(b"\n") - 1
    assert finished <= done < 12
    model = Line(bias=-2.4)
    resumed = certify(model, loader(12), **SETTINGS, resume=path)
    assert resumed == whole
    assert rows(path) == rows(tmp_path / "whole.jsonl")
    assert sum(map(len, model.seen)) == 1 + 50 * (12 - done)  # one look at the number of classes, and no image twice
    assert certify(model, loader(12), **SETTINGS, resume=path) == whole == certify(model, loader(12), **SETTINGS)
    assert sum(row.seconds for row in resumed.images) == resumed.seconds > 0


def test_a_file_cut_anywhere_goes_on(tmp_path):
    path = tmp_path / "new" / "folder" / "certified.jsonl"
    whole = certify(Line(bias=-2.4), loader(3), **SETTINGS, resume=path)
    content, want = path.read_bytes(), rows(path)
    for cut in [*range(0, len(content), 23), len(content) - 1]:
        path.write_bytes(content[:cut])
        assert certify(Line(bias=-2.4), loader(3), **SETTINGS, resume=path) == whole, cut
        assert rows(path) == want


def test_more_images_are_added(tmp_path):
    path = tmp_path / "certified.jsonl"
    certify(Line(), loader(12)[:2], **SETTINGS, resume=path)
    assert certify(Line(), loader(12), **SETTINGS, resume=path) == certify(Line(), loader(12), **SETTINGS)


def reordered(data):
    return [(x.flip(0), y.flip(0)) for x, y in data]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sigma": 0.25}, r"another run \(sigma: 0.5 then, 0.25 now\): give its settings, or another file"),
        ({"n": 41, "seed": 4}, "n: 40 then, 41 now; seed: 3 then, 4 now"),
        ({"confidence": 0.99}, "confidence: 0.999 then, 0.99 now"),
        ({"mean": (0.5,)}, r"mean: \[0.0\] then, \[0.5\] now"),
        ({"model": Line(bias=0.1)}, "weights: '[0-9a-f]{64}' then"),
        ({"loader": loader(6, seed=2)}, "Row 0 of .* is of other images or labels.*shuffle=False"),
        ({"loader": reordered(loader())}, "Row 0 of .* is of other images or labels"),
        ({"loader": [(x, 1 - y) for x, y in loader()]}, "Row 0 of .* is of other images or labels"),
        ({"loader": loader()[:2]}, "holds 6 images, and the loader gave 4"),
    ],
)
def test_another_runs_file_is_refused(tmp_path, change, message):
    path = tmp_path / "certified.jsonl"
    certify(Line(), loader(), **SETTINGS, resume=path)
    content = path.read_bytes()
    with pytest.raises(ValueError, match=message):
        certify(**{"model": Line(), "loader": loader(), **SETTINGS, **change}, resume=path)
    assert path.read_bytes() == content


def test_another_estimate_of_the_same_weights_is_refused(tmp_path):
    model, path = timm_nrpm.create_model(DIGITS, pretrained=True, lam=0.9), tmp_path / "certified.jsonl"
    pixels, labels = (t[:1] for t in digits("test"))
    certify(model, [(pixels, labels)], n0=1, n=10, resume=path)
    reprogram_(model, NRPMConfig(lam=0.9, iterations=2))
    with pytest.raises(ValueError, match=r"another run \(modules: "):
        certify(model, [(pixels, labels)], n0=1, n=10, resume=path)


@pytest.mark.parametrize(
    "content", [b'{"a": 1}', b"some text\nand more\n", b"[]\n", b'{"format": 1}\n{"x": 1}\n', b"\n"]
)
def test_a_file_of_something_else_is_left_alone(tmp_path, content):
    path = tmp_path / "notes.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"is no journal|holds another run"):
        certify(Line(), loader(), **SETTINGS, resume=path)
    assert path.read_bytes() == content


def test_two_runs_do_not_share_a_file(tmp_path):
    path = tmp_path / "certified.jsonl"

    def meddled():
        for i, batch in enumerate(loader()):
            if i == 1:
                certify(Line(), loader(), **SETTINGS, resume=path)
            yield batch

    with pytest.raises(ValueError, match="was changed meanwhile: give every run a file of its own"):
        certify(Line(), meddled(), **SETTINGS, resume=path)
    assert len(rows(path)) == 7
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:3], lines[2]]))
    with pytest.raises(ValueError, match=r"does not hold each image once|holds a row twice"):
        certify(Line(), loader(), **SETTINGS, resume=path)


# --- the report ----------------------------------------------------------------------------------------------------


def report_of(*images, **more):
    """From (label, predicted, radius)."""
    made = tuple(Certificate(label, predicted, radius, 0, 9, 90) for label, predicted, radius in images)
    common = {"name": "net", "sigma": 0.25, "n0": 10, "n": 100, "confidence": 0.999, "seed": 0}
    return CertificationReport(**{**common, "weights": "ab", "versions": {"torch": "2"}, **more}, images=made)


def test_the_numbers_of_a_report_by_hand():
    report = report_of((0, 0, 0.3), (1, 1, 0.1), (2, 1, 0.5), (3, None, 0.0), (4, 4, 0.3))
    assert [report.certified_accuracy(r) for r in (0, 0.1, 0.2, 0.3, 0.31)] == [0.6, 0.6, 0.4, 0.4, 0.0]
    assert report.curve() == ((0.0, 0.1, 0.3), (0.6, 0.6, 0.4))
    assert report.average_certified_radius == pytest.approx(0.7 / 5)
    assert report.abstained == 0.2
    assert str(report) == (
        "net, 5 images, sigma 0.25: certified 60.0 %, abstained 20.0 %, average certified radius 0.140"
    )
    assert "Certificate" not in repr(report)
    nothing = report_of((0, None, 0.0))
    assert nothing.curve() == ((0.0,), (0.0,))


@given(
    st.lists(
        st.tuples(st.integers(0, 2), st.none() | st.integers(0, 2), st.sampled_from([0.0, 0.1, 0.25, 0.7])),
        min_size=1,
        max_size=20,
    )
)
def test_the_curve_falls_and_is_the_certified_accuracy(images):
    report = report_of(*images)
    radii, accuracies = report.curve()
    assert radii[0] == 0.0
    assert list(radii) == sorted(set(radii))
    assert list(accuracies) == sorted(accuracies, reverse=True)
    assert accuracies == tuple(map(report.certified_accuracy, radii))
    for left, right, accuracy in zip(radii, radii[1:], accuracies[1:], strict=False):
        assert report.certified_accuracy((left + right) / 2) == accuracy
    assert report.certified_accuracy(radii[-1] + 0.01) == 0.0
    # The area below it is the average certified radius.
    area = sum((b - a) * y for a, b, y in zip(radii, radii[1:], accuracies[1:], strict=False))
    assert area == pytest.approx(report.average_certified_radius)


def test_json_both_ways():
    report = certify(Line(bias=-2.4), loader(), 0.25, n=50)
    again = CertificationReport.from_json(report.to_json())
    assert again == report
    assert again.seconds == report.seconds > 0
    assert json.loads(report.to_json())["summary"]["abstained"] == report.abstained
    assert report.versions["torch"] == torch.__version__
    assert len(report.weights) == 64
    assert report.name == "Line"


def test_the_bundled_model_and_its_name():
    plain = timm.create_model(DIGITS, pretrained=True)
    ours = timm_nrpm.create_model(DIGITS, pretrained=True, lam=1.0)
    pixels, labels = (t[:6] for t in digits("test"))
    a, b = (certify(model, [(pixels, labels)], 0.12, n0=20, n=50) for model in (plain, ours))
    assert a.images == b.images  # lambda = 1 is the plain layer
    assert a.certified_accuracy(0.0) == 1.0
    assert a.certified_accuracy(0.1) > 0.5
    assert (a.name, b.name) == ("resnet8_digits", "resnet8_digits, lambda 1")
    mixed = timm_nrpm.create_model(DIGITS, pretrained=True, lam={"*": 0.5, "fc": 1.0})
    assert certify(mixed, [(pixels[:1], labels[:1])], n0=1, n=10).name == "resnet8_digits, lambda 0.5 to 1"
    assert certify(plain, [(pixels[:1], labels[:1])], n0=1, n=10, name="mine").name == "mine"
    assert smoothed_predict(plain, pixels, 0.12, n=50) == tuple(labels.tolist())


def test_a_wrapper_changes_nothing(tmp_path):
    model = timm_nrpm.create_model(DIGITS, pretrained=True, lam=0.9)
    pixels, labels = (t[:2] for t in digits("test"))
    settings = {"n0": 2, "n": 20, "resume": tmp_path / "certified.jsonl"}
    want = certify(model, [(pixels, labels)], **settings)
    for wrapped in (nn.DataParallel(model), torch.optim.swa_utils.AveragedModel(model), PixelModel(model)):
        assert certify(wrapped, [(pixels, labels)], **settings) == want
        assert smoothed_predict(wrapped, pixels, n=20) == smoothed_predict(model, pixels, n=20)
        assert wrapped.training
    with pytest.raises(ValueError, match=r"The model is a function: give a torch\.nn\.Module"):
        certify(lambda x: x, [(pixels, labels)])


def test_the_bar_counts_images(capsys):
    certify(Line(), loader(), n0=1, n=10)
    assert capsys.readouterr().err == ""
    certify(Line(), loader(5), n0=1, n=10, progress=True)
    assert "5/5" in capsys.readouterr().err
    certify(Line(), iter(loader(5)), n0=1, n=10, progress=True)  # of no known length
    assert "5/" in capsys.readouterr().err


def test_a_picture(tmp_path, monkeypatch):
    one = report_of((0, 0, 0.3), (1, 1, 0.1), (2, None, 0.0))
    others = [replace(one, sigma=0.5), replace(one, name="other"), report_of(*[(0, None, 0.0)] * 3, name="nothing")]
    assert draw_certified([one, *others], tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    drawn = draw_certified([one, *others], str(tmp_path / "a.svg")).read_text()
    for text in ("net, sigma 0.25", "net, sigma 0.5", "other, sigma 0.25", "3 images, n = 100, confidence 0.999 each"):
        assert text in drawn
    for reports, path, message in (
        ([], "a.png", "0 reports .* give at least one"),
        ([one, replace(one, seed=1)], "a.png", "same model and sigma"),
        ([replace(one, sigma=i) for i in range(1, 9)], "a.png", "at most 7 sigmas"),
        ([one], "a.jpg", r"must end in .png or .svg"),
    ):
        with pytest.raises(ValueError, match=message):
            draw_certified(reports, tmp_path / path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"timm_nrpm\[demo\]"):
        draw_certified([one], tmp_path / "a.png")


# --- what else one may give ----------------------------------------------------------------------------------------


class Constant(nn.Linear):
    """The same logits for every image."""

    def __init__(self, *logits):
        super().__init__(1, 1)
        self.logits = torch.tensor(logits)

    def forward(self, x):
        return self.logits.to(x).expand(len(x), -1)


def test_one_image_and_one_sample():
    one = [(torch.rand(1, 1, 2, 2), torch.tensor([0]))]
    with pytest.raises(ValueError, match="two classes at least"):
        certify(Constant(0.0), one, n=100)
    assert smoothed_predict(Constant(1.0, 0.0), one[0][0], n=100) == (0,)
    assert certify(Constant(1.0, 0.0), one, n0=1, n=10, batch_size=1).images[0].predicted == 0
    assert certify(Constant(1.0, 1.0), one).images[0].predicted == 0  # of equals the first, as argmax says


def test_what_is_no_number_votes_for_nobody():
    one = [(torch.rand(1, 1, 2, 2), torch.tensor([0]))]
    row = certify(Constant(float("nan"), 0.0), one, n0=10, n=20).images[0]
    assert (row.predicted, row.votes, row.not_a_number) == (None, 0, 30)
    assert smoothed_predict(Constant(float("nan"), 0.0), one[0][0], n=100) == (None,)
    assert certify(Constant(float("-inf"), 0.0), one, n=20).images[0].predicted == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_see_the_same_noise(dtype):
    pixels, labels = (t[:2] for t in digits("test"))
    model = timm.create_model(DIGITS, pretrained=True)
    want = certify(model, [(pixels, labels)], 0.12, n=50)
    found = certify(model.to(dtype), [(pixels, labels.int())], 0.12, n=50)
    assert [row.predicted for row in found.images] == [row.predicted for row in want.images]
    assert all(abs(a.votes - b.votes) <= 2 for a, b in zip(found.images, want.images, strict=True))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: certify(Line(), loader(), 0), "sigma=0 is not allowed: give a number > 0"),
        (lambda: certify(Line(), loader(), float("inf")), "sigma=inf"),
        (lambda: certify(Line(), loader(), float("nan")), "sigma=nan"),
        (lambda: certify(Line(), loader(), "0.25"), "sigma='0.25'"),
        (lambda: certify(Line(), loader(), n0=0), "n0=0 is not allowed: give an integer >= 1"),
        (lambda: certify(Line(), loader(), n=0), "n=0 is"),
        (lambda: certify(Line(), loader(), n=1e3), "n=1000.0 is"),
        (lambda: certify(Line(), loader(), batch_size=0), "batch_size=0"),
        (lambda: certify(Line(), loader(), seed=-1), "seed=-1 is not allowed: give an integer >= 0"),
        (
            lambda: certify(Line(), loader(), confidence=0),
            "confidence=0 is not allowed: give a number >= 0.5 and < 1, the probability that a certificate is right",
        ),
        (
            lambda: certify(Line(), loader(), confidence=0.001),
            "confidence=0.001 is not allowed: .* an alpha.* of 0.001 is confidence=0.999",
        ),
        (lambda: smoothed_predict(Line(), torch.rand(1, 3, 2, 2), confidence=0.05), "of 0.05 is confidence=0.95"),
        (lambda: report_of((0, 0, 0.1), confidence=0.001), "an alpha.* of 0.001 is confidence=0.999"),
        (lambda: lower_bound(9, 10, 1e-3), "an alpha.* of 0.001 is confidence=0.999"),
        (lambda: certify(Line(), loader(), confidence=1), "confidence=1 is"),
        (lambda: certify(Line(), loader(), confidence="0.999"), "confidence='0.999' is"),
        (lambda: certify(Line(), loader(), confidence=float("nan")), "confidence=nan is"),
        (lambda: certify(Line(), []), "gave no images"),
        (lambda: certify(Line(), [torch.rand(1, 3, 2, 2)]), "gives Tensor: give pairs"),
        (lambda: certify(Line(), [(torch.full((1, 3, 2, 2), 255.0), torch.tensor([0]))]), r"pixels in \[0, 1\]"),
        (lambda: certify(Line(), [(torch.rand(1, 3, 2, 2), torch.tensor([2]))]), "2 classes: give .* from 0 to 1"),
        (lambda: certify(Line(), [(torch.rand(2, 3, 2, 2), torch.tensor([1]))]), "give 2 integers, one for each image"),
        (lambda: certify(nn.Conv2d(3, 3, 1), loader()), r"gives \[1, 3, 2, 2\] for 1 images: give a classifier"),
        (lambda: certify(Line(), loader(), mean=(0.5, 0.5)), "have 3 channels, and the model's normalisation has 2"),
        (lambda: smoothed_predict(Line(), torch.rand(1, 3, 2, 2), -1), "sigma=-1"),
        (lambda: smoothed_predict(Line(), torch.rand(1, 3, 2, 2), n=0), "n=0"),
        (lambda: smoothed_predict(Line(), torch.rand(1, 3, 2, 2) + 2), r"pixels in \[0, 1\]"),
        (lambda: report_of((0, 0, 0.1)).certified_accuracy(-0.1), "radius=-0.1 is not allowed"),
        (lambda: report_of((0, 0, 0.1)).certified_accuracy(float("nan")), "radius=nan"),
    ],
)
def test_bad_calls(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_failure_leaves_the_model_as_it_was():
    model = Line().train()
    with pytest.raises(ValueError, match="labels"):
        certify(model, [(torch.rand(1, 3, 2, 2), torch.tensor([7]))])
    assert model.training
