import json
import math
from statistics import NormalDist

import numpy as np
import pytest
import timm
import torch
import torch.nn as nn
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from test_certification import Line, loader, report_of

import timm_nrpm
from timm_nrpm.attacks.apgd import climb
from timm_nrpm.attacks.threats import Threat
from timm_nrpm.data.loaders import digits
from timm_nrpm.evaluation.certificates import CertificationReport, certified_radius, halves_radius, lower_bound
from timm_nrpm.evaluation.certification import certify, smoothed_predict
from timm_nrpm.evaluation.halves import certify_halves, filled, predict_halves
from timm_nrpm.figures.certified import draw_certified
from timm_nrpm.models.registry import DIGITS
from timm_nrpm.nn.pixel_model import PixelModel

NORMAL = NormalDist()


# --- the halves ----------------------------------------------------------------------------------------------------


def filled_by_hand(image, half):
    """Pixel by pixel, of `[C, H, W]`."""
    channels, height, width = image.shape
    result = np.zeros_like(image)
    for c in range(channels):
        for i in range(height):
            for j in range(width):
                if (i + j) % 2 == half:
                    result[c, i, j] = image[c, i, j]
                    continue
                around = [(i - 1, j), (i + 1, j), (i, j - 1), (i, j + 1)]
                found = [image[c, a, b] for a, b in around if 0 <= a < height and 0 <= b < width]
                result[c, i, j] = sum(found) / len(found)
    return result


@pytest.mark.parametrize("shape", [(1, 2, 2), (3, 5, 4), (1, 1, 5), (2, 7, 1), (3, 8, 8), (1, 1, 2)])
@pytest.mark.parametrize("half", [0, 1])
def test_holes_are_the_mean_of_their_neighbours(shape, half):
    images = np.random.default_rng(0).normal(0.5, 1.0, (2, *shape))
    found = filled(torch.tensor(images), half).numpy()
    np.testing.assert_allclose(found, [filled_by_hand(image, half) for image in images], rtol=1e-12)


@pytest.mark.parametrize("half", [0, 1])
def test_a_half_tells_nothing_of_the_other(half):
    images = torch.rand(2, 3, 6, 5)
    places = (torch.arange(6).view(-1, 1) + torch.arange(5)) % 2
    other = images.where(places == half, torch.full_like(images, float("nan")))
    assert torch.equal(filled(other, half), filled(images, half))
    constant = torch.full((1, 3, 6, 5), 0.3)
    torch.testing.assert_close(filled(constant, half), constant)


# --- the radius ----------------------------------------------------------------------------------------------------


def least_that_breaks(p, q, sigma):
    """The shortest change that two halfspaces, the worst of all classifiers, do not survive: over all ways to share its
    length, by bisection."""
    angles = np.linspace(0, np.pi / 2, 2001)
    first, second = np.cos(angles), np.sin(angles)

    def survives(r):
        a, b = (stats.norm.cdf(stats.norm.ppf(x) - r * share / sigma) for x, share in ((p, first), (q, second)))
        return bool((a + b > 1).all())

    low, high = 0.0, 20 * sigma
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if survives(middle) else (low, middle)
    return low


@pytest.mark.parametrize("votes", [(500, 500), (480, 300), (300, 480), (500, 100), (400, 100), (0, 500), (250, 250)])
@pytest.mark.parametrize("sigma", [0.25, 1.0])
def test_the_radius_is_the_longest_that_is_safe(votes, sigma):
    bounds = [
        stats.binomtest(each, 500, alternative="greater").proportion_ci(0.9995, method="exact").low for each in votes
    ]
    want = least_that_breaks(*bounds, sigma) if sum(bounds) > 1 else 0.0
    assert halves_radius(votes, 500, 0.999, sigma) == pytest.approx(want, abs=1e-5 * sigma)


def test_the_radius_by_hand():
    """All agree: both bounds are 0.0005 ** (1 / 500), and the radius is sqrt(2) times that of one half."""
    want = 0.25 * math.sqrt(2) * NORMAL.inv_cdf(0.0005 ** (1 / 500))
    assert halves_radius((500, 500), 500, 0.999, 0.25) == pytest.approx(want, rel=1e-9)
    assert want > certified_radius(lower_bound(1000, 1000, 0.999), 0.25)  # of as many samples
    assert halves_radius((500, 0), 500, 0.999, 0.25) == 0.0
    # A half that is against the class takes away from the other, as it would not if it counted as 0.
    alone = 0.25 * NORMAL.inv_cdf(0.0005 ** (1 / 500)) / math.sqrt(2)
    assert 0 < halves_radius((500, 100), 500, 0.999, 0.25) < alone
    assert math.isfinite(halves_radius((10**17, 10**17), 10**17, 1 - 2**-53, 1.0))


@given(
    first=st.floats(0.02, 0.98),
    second=st.floats(0.02, 0.98),
    n=st.integers(5, 25),
    confidence=st.sampled_from([0.5, 0.9, 0.999]),
)
def test_the_radius_is_too_long_at_most_that_often(first, second, n, confidence):
    """Coverage, summed over all outcomes of both halves."""
    true = max(0.0, (NORMAL.inv_cdf(first) + NORMAL.inv_cdf(second)) / math.sqrt(2))
    bounds = [[stats.binom.pmf(k, n, p) for k in range(n + 1)] for p in (first, second)]
    low = [stats.norm.ppf(lower_bound(k, n, (1 + confidence) / 2)) for k in range(n + 1)]
    wrong = 0.0
    for i in range(n + 1):
        for j in range(n + 1):
            together = low[i] + low[j]
            if together / math.sqrt(2) > true + 1e-9:
                wrong += bounds[0][i] * bounds[1][j]
    assert wrong <= 1 - confidence + 1e-9
    assert halves_radius((n, n - 1), n, confidence, 1.0) == pytest.approx(max(0, low[n] + low[n - 1]) / math.sqrt(2))


# --- a model whose smoothed answer is known ------------------------------------------------------------------------


class Plane(Line):
    """A plane in images of 4 x 4 pixels."""

    def __init__(self, bias=0.0):
        super().__init__(torch.linspace(-1, 2, 16), bias)

    def seen_in(self, pixels, half):
        """Distance of each image, as this half of its pixels shows it, from the plane in that half's pixels alone."""
        jacobian = torch.autograd.functional.jacobian(lambda x: self.margin(filled(x, half)), pixels[:1]).flatten()
        return (self.margin(filled(pixels, half)) / jacobian.norm()).detach()


def planes(count=8, bias=-6.0):
    pixels = torch.rand(count, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    labels = (Plane(bias).margin(pixels) > 0).long()
    return pixels, labels


def test_a_plane_is_certified_up_to_its_distance():
    """Each half sees a plane in its own pixels. The sum of both probabilities exceeds 1 while the sum of the signed
    distances is above 0: a plane again, whose distance is that sum over sqrt(2). So the certificate is tight."""
    pixels, labels = planes()
    model = Plane(-6.0)
    together = sum(model.seen_in(pixels, half) for half in (0, 1))
    true = together.abs() / math.sqrt(2)
    assert 0.1 < true.max() < 1.2
    few, many = (certify_halves(model, [(pixels, labels)], 0.5, n=n, batch_size=5000) for n in (500, 10_000))
    for i, (rough, fine) in enumerate(zip(few.images, many.images, strict=True)):
        assert rough.radius <= true[i]
        assert fine.radius <= true[i]
        assert fine.radius > true[i] - 0.08
        if true[i] > 0.1:
            assert fine.predicted == int(together[i] > 0)
        for half, votes in enumerate((fine.first_votes, fine.votes - fine.first_votes)):
            sign = 1 if fine.candidate else -1
            share = NORMAL.cdf(sign * float(model.seen_in(pixels, half)[i]) / 0.5)
            assert votes / 5000 == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / 5000))
    assert sum(r.radius for r in few.images) < sum(r.radius for r in many.images)
    predicted = predict_halves(model, pixels, 0.5, n=10_000, batch_size=5000)
    assert predicted == tuple(row.predicted for row in many.images)


def test_the_plane_is_crossed_just_beyond_its_distance():
    """The shortest change there is moves the exact prediction, and any shorter one does not."""
    pixels, _ = planes()
    model = Plane(-6.0)

    def signed(x):
        return sum(model.seen_in(x, half) for half in (0, 1))

    slope = torch.autograd.functional.jacobian(lambda x: sum_of(model, x), pixels[:1]).view(1, 1, 4, 4)
    assert float(slope.norm()) == pytest.approx(math.sqrt(2), rel=1e-5)
    step = -signed(pixels).view(-1, 1, 1, 1).sign() * slope / slope.norm()
    true = (signed(pixels).abs() / math.sqrt(2)).view(-1, 1, 1, 1)
    assert (signed(pixels + 0.99 * true * step).sign() == signed(pixels).sign()).all()
    assert (signed(pixels + 1.01 * true * step).sign() == -signed(pixels).sign()).all()


def sum_of(model, x):
    norms = [
        torch.autograd.functional.jacobian(lambda y, h=half: model.margin(filled(y, h)), x).norm() for half in (0, 1)
    ]
    return sum(model.margin(filled(x, half)) / norms[half] for half in (0, 1))


# --- attacks -------------------------------------------------------------------------------------------------------

COPIES = 24


def follow_of(model, pixels, views, sigma):
    """The logarithm of the mean probability under fixed noise, over all views."""
    noise = sigma * torch.randn(len(pixels), COPIES, *pixels.shape[1:], generator=torch.Generator().manual_seed(9))
    net = PixelModel(model)

    def follow(x):
        noisy = (x.unsqueeze(1) + noise).flatten(0, 1)
        logs = torch.stack([net(view(noisy)).log_softmax(1).view(len(x), COPIES, -1) for view in views], 1)
        return logs.flatten(1, 2).logsumexp(1)

    return follow


def changed_by_attack(report, views, predict, pixels, sigma):
    """Number of certified images whose prediction an attack within 99 % of the radius, or 4 times it, changes."""
    model = timm.create_model(DIGITS, pretrained=True).eval().requires_grad_(False)
    counts = []
    for times in (0.99, 4.0):
        changed = 0
        for image, row in zip(pixels, report.images, strict=True):
            if row.radius == 0:
                continue
            one, label = image[None], torch.tensor([row.predicted])
            follow = follow_of(model, one, views, sigma)
            moved, _ = climb(
                follow, one, label, Threat("L2", times * row.radius), [0], steps=10, loss="margin", fooled=False
            )
            changed += predict(model, moved, sigma, n=200, seed=5) not in ((row.predicted,), (None,))
        counts.append(changed)
    return counts


@pytest.mark.parametrize("kind", ["halves", "whole"])
def test_no_attack_contradicts_a_certificate(kind):
    pixels, labels = (part[:4] for part in digits("test"))
    model = timm.create_model(DIGITS, pretrained=True).eval()
    measure, views, predict = {
        "halves": (certify_halves, [lambda x: filled(x, 0), lambda x: filled(x, 1)], predict_halves),
        "whole": (certify, [lambda x: x], smoothed_predict),
    }[kind]
    report = measure(model, [(pixels, labels)], 0.25, n=200, confidence=0.99)
    assert sum(row.radius > 0 for row in report.images) >= 3
    within, beyond = changed_by_attack(report, views, predict, pixels, 0.25)
    assert within == 0
    assert beyond >= 1  # the attack is strong enough to matter


# --- samples, noise and models -------------------------------------------------------------------------------------


def test_it_takes_as_many_forwards_as_the_whole():
    pixels, labels = planes(3)
    seen = {}
    for measure in (certify, certify_halves):
        model = Plane()
        measure(model, [(pixels, labels)], n0=10, n=40)
        seen[measure] = sum(len(x) for x in model.seen[1:])
    assert seen[certify_halves] == seen[certify] == 3 * 50


def test_the_noise_of_the_halves_is_independent_and_of_their_own_pixels():
    pixels = torch.full((1, 1, 2, 2), 0.5)
    model = Line([1.0, 1.0, 1.0, 1.0])
    certify_halves(model, [(pixels, torch.tensor([1]))], 0.5, n0=4000, n=22)
    seen = torch.cat(model.seen[1:])[:4000, 0] - 0.5
    first, second = seen[:2000], seen[2000:]
    for part, (a, b) in ((first, ((0, 0), (1, 1))), (second, ((0, 1), (1, 0)))):
        own = torch.stack((part[:, a[0], a[1]], part[:, b[0], b[1]])).numpy()
        assert stats.kstest(own.flatten(), stats.norm(0, 0.5).cdf).pvalue > 0.001
        assert abs(np.corrcoef(own)[0, 1]) < 0.08
        hole = ({(0, 0), (0, 1), (1, 0), (1, 1)} - {a, b}).pop()
        np.testing.assert_allclose(part[:, hole[0], hole[1]].numpy(), own.mean(0), atol=1e-6)
    assert abs(np.corrcoef(first[:, 0, 0], second[:, 0, 1])[0, 1]) < 0.08


def test_seed_batches_and_wrappers_change_nothing():
    pixels, labels = planes(3)
    want = certify_halves(Plane(-6.0), [(pixels, labels)], n0=10, n=40)
    assert certify_halves(Plane(-6.0), [(pixels[:1], labels[:1]), (pixels[1:], labels[1:])], n0=10, n=40) == want
    assert certify_halves(Plane(-6.0), [(pixels, labels)], n0=10, n=40, batch_size=7) == want
    assert certify_halves(nn.DataParallel(Plane(-6.0)), [(pixels, labels)], n0=10, n=40) == want
    assert certify_halves(Plane(-6.0), [(pixels, labels)], n0=10, n=40, seed=1).images != want.images


def test_what_is_no_number_votes_for_nobody():
    pixels = torch.rand(1, 1, 2, 2)
    row = certify_halves(Line([float("nan")] * 4), [(pixels, torch.tensor([0]))], n0=10, n=40).images[0]
    assert (row.predicted, row.votes, row.not_a_number) == (None, 0, 50)


# --- resuming and the report ---------------------------------------------------------------------------------------

SETTINGS = {"sigma": 0.5, "n0": 10, "n": 40, "seed": 3}


def test_a_run_goes_on_and_the_two_ways_do_not_mix(tmp_path):
    path = tmp_path / "certified.jsonl"
    data = loader(6)
    want = certify_halves(Line(), data, **SETTINGS)
    certify_halves(Line(), data[:1], **SETTINGS, resume=path)
    resumed = Line()
    assert certify_halves(resumed, data, **SETTINGS, resume=path) == want
    assert sum(len(x) for x in resumed.seen) == 1 + 4 * 50
    with pytest.raises(ValueError, match=r"another run \(format: '2, halves' then, 2 now\)"):
        certify(Line(), data, **SETTINGS, resume=path)
    other = tmp_path / "whole.jsonl"
    certify(Line(), data, **SETTINGS, resume=other)
    with pytest.raises(ValueError, match=r"another run \(format: 2 then, '2, halves' now\)"):
        certify_halves(Line(), data, **SETTINGS, resume=other)


def test_journals_and_reports_from_before_the_halves_are_read(tmp_path):
    path, data = tmp_path / "certified.jsonl", loader(6)
    want = certify(Line(), data, **SETTINGS, resume=path)
    head, *lines = path.read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    for row in rows:
        del row["certificate"]["first_votes"]
    path.write_text("\n".join([head, *map(json.dumps, rows)]) + "\n")
    assert certify(Line(), data, **SETTINGS, resume=path) == want
    report = json.loads(want.to_json())
    assert report.pop("smoothing") == "whole"
    for image in report["images"]:
        del image["first_votes"]
    assert CertificationReport.from_json(json.dumps(report)) == want


def test_the_report_says_how_it_was_smoothed(tmp_path):
    report = certify_halves(Line(bias=50.0), loader(3), **SETTINGS)
    assert CertificationReport.from_json(report.to_json()) == report
    assert str(report).startswith("Line, in halves, 3 images, sigma 0.5: certified ")
    want = 0.5 * math.sqrt(2) * NORMAL.inv_cdf(0.0005 ** (1 / 20))
    assert report.largest_radius == pytest.approx(want, rel=1e-9)
    assert [row.radius for row in report.images] == pytest.approx([want] * 3, rel=1e-9)
    assert all((row.votes, row.first_votes, row.predicted) == (40, 20, 1) for row in report.images)
    whole = certify(Line(bias=50.0), loader(3), **SETTINGS)
    drawn = draw_certified([report, whole], tmp_path / "a.svg").read_text()
    assert "Line, in halves, sigma 0.5" in drawn
    assert "Line, sigma 0.5" in drawn
    with pytest.raises(ValueError, match="smoothing='thirds' is not known: choose one of whole, halves"):
        report_of((0, 0, 0.1), smoothing="thirds")


def test_the_report_says_why_all_abstained():
    pixels = torch.full((3, 1, 1, 2), 0.5)
    data = [(pixels, torch.ones(3, dtype=torch.long))]
    report = certify_halves(Line([1.0, 1.0], bias=-1.0), data, 0.25, n=400)
    needed = next(k for k in range(201) if stats.binom.sf(k - 1, 200, 0.5) < 0.0005)
    assert report.abstained == 1.0
    assert report.votes_needed == 2 * needed
    assert halves_radius((needed, needed), 200, 0.999, 0.25) > 0 == halves_radius((needed - 1,) * 2, 200, 0.999, 0.25)
    assert f"takes {2 * needed} of 400 votes for one class, if both halves give as many, and no image" in str(report)


def test_the_bundled_model():
    plain = timm.create_model(DIGITS, pretrained=True)
    ours = timm_nrpm.create_model(DIGITS, pretrained=True, lam=1.0)
    pixels, labels = (t[:6] for t in digits("test"))
    a, b = (timm_nrpm.halves.certify_halves(m, [(pixels, labels)], 0.12, n0=20, n=100) for m in (plain, ours))
    assert a.images == b.images  # lambda = 1 is the plain layer
    assert str(b).startswith("resnet8_digits, lambda 1, in halves, 6 images")
    assert a.certified_accuracy(0.0) > 0.5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: certify_halves(Line(), loader(), 0), "sigma=0 is not allowed: give a number > 0"),
        (lambda: certify_halves(Line(), loader(), n=101), "n=101 is not allowed: 2 parts of an image share"),
        (lambda: certify_halves(Line(), loader(), n0=9), "n0=9 is not allowed: .* give a multiple of 2"),
        (lambda: certify_halves(Line(), loader(), n0=0), "n0=0 is not allowed: give an integer >= 1"),
        (lambda: certify_halves(Line(), loader(), n=20), "n=20 is not allowed: .* give n=22 or more"),
        (lambda: certify_halves(Line(), loader(), confidence=0.01), "of 0.01 is confidence=0.99"),
        (lambda: certify_halves(Line(), []), "gave no images"),
        (lambda: predict_halves(Line(), torch.rand(1, 3, 2, 2) + 2), r"pixels in \[0, 1\]"),
        (lambda: predict_halves(Line(), torch.rand(3, 2, 2)), r"give images \[B, C, H, W\]"),
        (
            lambda: certify_halves(Line([1.0]), [(torch.rand(1, 1, 1, 1), torch.tensor([0]))]),
            r"An image of \[1, 1, 1\] has one pixel, and no halves",
        ),
    ],
)
def test_bad_calls(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_so_many_samples_it_takes_at_least():
    """All agree: both bounds exceed one half if (alpha / 2) ** (1 / n) does, of 22 samples or more."""
    assert 0.0005 ** (1 / 11) > 0.5 >= 0.0005 ** (1 / 10)
    assert certify_halves(Line(bias=50.0), loader(1), n0=2, n=22).images[0].predicted == 1
