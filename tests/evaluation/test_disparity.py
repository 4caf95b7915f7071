"""Classes of a report: intervals and the permutation test against NumPy, their coverage, and where they are told."""

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import beta

import timm_nrpm
from timm_nrpm import RobustnessReport, Threat, evaluate
from timm_nrpm.data.loaders import digits
from timm_nrpm.evaluation.class_shares import DRAWS, ClassShare, ClassShares
from timm_nrpm.evaluation.disparity import ENOUGH, Disparity, by_class
from timm_nrpm.evaluation.report import AttackResult
from timm_nrpm.figures.page import write_page


def report(labels, correct, survived, control=None, suite="adaptive"):
    survived = tuple(s if c else None for s, c in zip(survived, correct, strict=True))
    attack = AttackResult("pgd", "own", survived, 1, 1, 0.1)
    found = RobustnessReport(Threat("Linf", 0.1), suite, 1, 1, 0, tuple(correct), (attack,), labels=tuple(labels))
    return dataclasses.replace(found, control=control)


def blocks(*rows):
    """Labels and whether each image is right: for each (label, count, right) so many images, the first ones right."""
    labels = [label for label, count, _ in rows for _ in range(count)]
    return labels, [i < right for _, count, right in rows for i in range(count)]


def clopper(right, count, risk):
    low = beta.ppf(risk / 2, right, count - right + 1) if right else 0.0
    return low, beta.ppf(1 - risk / 2, right + 1, count - right) if right < count else 1.0


@settings(max_examples=40)
@given(st.lists(st.tuples(st.integers(20, 60), st.floats(0, 1)), min_size=2, max_size=6))
def test_worst_class_and_gap_by_numpy(drawn):
    rows = [(label, count, round(share * count)) for label, (count, share) in enumerate(drawn)]
    labels, right = blocks(*rows)
    found = by_class(report(labels, [True] * len(labels), right)).kept
    shares = np.array([r / n for _, n, r in rows])
    bounds = np.array([clopper(r, n, 0.05 / len(rows)) for _, n, r in rows])
    assert found.worst.share == shares.min()
    assert found.gap == pytest.approx(np.ptp(shares))
    assert found.worst_interval == pytest.approx(bounds.min(0))
    low, high = bounds[:, 0].max() - bounds[:, 1].min(), bounds[:, 1].max() - bounds[:, 0].min()
    assert found.gap_interval == pytest.approx((max(0, low), high))
    assert found.gap_interval[0] <= found.gap <= found.gap_interval[1]


def test_the_p_value_is_that_of_permuted_labels():
    rows = [(0, 30, 24), (1, 25, 15), (2, 40, 33)]
    labels, right = map(np.array, blocks(*rows))
    random = np.random.default_rng(1)

    def gap(order):
        return np.ptp([right[order == label].mean() for label in range(3)])

    slow = np.mean([gap(random.permutation(labels)) >= gap(labels) - 1e-12 for _ in range(4000)])
    found = by_class(report(labels.tolist(), [True] * 95, right.tolist())).kept.p_value
    assert found == pytest.approx(slow, abs=0.03)
    assert 0.02 < found < 0.5
    far = ClassShares((ClassShare(0, 50, 50), ClassShare(1, 50, 0)))
    assert far.p_value == 1 / (DRAWS + 1)
    assert ClassShares((ClassShare(0, 50, 25), ClassShare(1, 50, 25))).p_value == 1.0


def drawn_pair(random, shares, control, count):
    """Two models on the same images: where they differ in accuracy, the better one is right on all of the other's."""
    u = random.random((len(shares), count))
    ours, theirs = ((u < np.array(each)[:, None]).ravel().tolist() for each in (shares, control))
    labels, clean = np.repeat(range(len(shares)), count).tolist(), [True] * len(shares) * count
    return report(labels, clean, ours, report(labels, clean, theirs))


@pytest.mark.parametrize(
    ("shares", "control"),
    [
        ([0.6] * 4, [0.6] * 4),  # all classes alike: the naive minimum is most biased
        ([0.2, 0.6, 0.6, 0.9], [0.3, 0.4, 0.6, 0.8]),
        ([0.6] * 4, [0.1, 0.6, 0.6, 0.6]),
    ],
)
def test_the_intervals_hold_the_truth_though_the_naive_worst_class_is_biased(shares, control):
    random, covered, naive = np.random.default_rng(0), [], []
    for _ in range(60):
        found = by_class(drawn_pair(random, shares, control, 30))
        truths = {
            found.kept.worst_interval: min(shares),
            found.kept.gap_interval: max(shares) - min(shares),
            (found.worst_change.low, found.worst_change.high): min(shares) - min(control),
            (found.gap_change.low, found.gap_change.high): np.ptp(shares) - np.ptp(control),
        }
        covered.append([low <= truth <= high for (low, high), truth in truths.items()])
        naive.append(found.kept.worst.share)
    assert np.mean(covered, axis=0).min() >= 0.95
    if shares == [0.6] * 4:
        assert np.mean(naive) < 0.6 - 0.05


def test_a_bootstrap_would_miss_the_truth_where_several_classes_are_equally_bad():
    """The reason for the wider bounds that hold at once: drawn again, the lowest of equal shares is lower yet."""
    random, ours, theirs, count = np.random.default_rng(0), np.full(10, 0.6), np.array([0.1, *[0.6] * 9]), 50
    held = []
    for _ in range(200):
        right = [random.binomial(count, each) / count for each in (ours, theirs)]
        again = [random.binomial(count, each, (300, 10)) / count for each in right]
        low, high = np.quantile(again[0].min(1) - again[1].min(1), [0.025, 0.975])
        held.append(low <= 0.5 <= high)
    assert np.mean(held) < 0.5


def test_with_many_images_the_change_of_the_worst_class_can_be_told():
    found = by_class(drawn_pair(np.random.default_rng(0), [0.5, 0.9, 0.9], [0.2, 0.9, 0.9], 400))
    assert 0.1 < found.worst_change.low < 0.3 < found.worst_change.high
    assert found.gap_change.low < -0.3 < found.gap_change.high < -0.1


def test_the_control_is_paired_image_by_image():
    labels, ours = blocks((0, 20, 10), (1, 20, 20))
    theirs = [not each for each in ours]
    found = by_class(report(labels, [True] * 40, ours, report(labels, [True] * 40, theirs)))
    assert found.apart == ((10, 10), (20, 0))
    assert (found.kept.worst.label, found.control.kept.worst.label) == (0, 1)
    assert found.worst_change.value == 0.5
    assert found.gap_change.value == 0.0


@pytest.mark.parametrize(
    "rows", [[(0, 200, 100)], [(0, 200, 100), (1, ENOUGH - 1, 0)], [(i, 1, 1) for i in range(100)]]
)
def test_without_two_classes_of_enough_images_nothing_is_said(rows):
    labels, right = blocks(*rows)
    found = report(labels, [True] * len(labels), right)
    assert found.by_class is None
    assert found.class_verdict == ""
    assert len(str(found).splitlines()) == 3
    unlabelled = dataclasses.replace(report(*blocks((0, 50, 1), (1, 50, 1)), [True] * 100), labels=())
    assert unlabelled.by_class is None


def test_classes_with_few_images_are_left_out():
    labels, right = blocks((7, 30, 30), (2, 5, 0), (4, 20, 10))
    found = by_class(report(labels, [True] * 55, right))
    assert [(each.label, each.count, each.right) for each in found.kept.classes] == [(4, 20, 10), (7, 30, 30)]


def told():
    labels, ours = blocks((3, 40, 10), (5, 40, 40))
    theirs = blocks((3, 40, 40), (5, 40, 20))[1]
    return report(labels, [*ours[:20], *[True] * 60], ours, report(labels, [True] * 80, theirs))


def test_the_sentences_by_hand(tmp_path):
    low, high = clopper(10, 40, 0.025)
    top = clopper(40, 40, 0.025)
    p = told().by_class.kept.p_value
    assert p == 1 / 2000
    first = (
        f"Of 2 classes with 20 images or more, class 3 has the lowest accuracy: 25.0 % ({100 * low:.1f} to "
        f"{100 * high:.1f}, for all classes at once) in the worst case and 75.0 % clean; the best, class 5, has 75.0 "
        f"points more ({100 * (top[0] - high):.1f} to {100 * (top[1] - low):.1f}; permutation test, p = 0.0005)."
    )
    assert dataclasses.replace(told(), control=None).class_verdict == first
    second = told().class_verdict.removeprefix(first)
    assert second.startswith(
        " With the plain model the lowest is class 5 at 50.0 %, and the best has 50.0 points more: "
    )
    assert "a difference of -25.0 points (" in second
    assert " for the worst class and of +25.0 points (" in second
    lines = str(told()).splitlines()
    assert lines[1] == told().class_verdict
    quick = dataclasses.replace(told(), suite="quick", control=None).class_verdict
    assert "for all classes at once) under all attacks of quick and 75.0 % clean" in quick
    page = write_page(told(), tmp_path / "page.html", title="a title").read_text()
    assert f"<p>{told().class_verdict}</p>" in page
    assert json.loads(told().to_json())["summary"]["class_verdict"] == told().class_verdict


def test_the_table_has_every_class():
    lines = str(told().by_class).splitlines()
    assert lines[0].split("  ")[0] == "class"
    assert [line.split()[:3] for line in lines[1:3]] == [["3", "40", "75.0"], ["5", "40", "100.0"]]
    assert "100.0 (" in lines[1].rpartition("25.0")[2]  # the plain model keeps all of class 3
    assert isinstance(told().by_class, Disparity)


def test_labels_go_to_json_and_back_and_earlier_reports_have_none():
    found = told()
    again = RobustnessReport.from_json(found.to_json())
    assert again == found
    assert again.labels == found.labels == found.control.labels
    data = found.to_dict()
    del data["labels"], data["control"]["labels"]
    earlier = RobustnessReport.from_dict(data)
    assert earlier.labels == ()
    assert earlier.survivors == found.survivors
    for wrong in ([0], [0.5] * 80, ["a"] * 80, [True] * 80):
        with pytest.raises(ValueError, match="its labels are not one integer for each image"):
            RobustnessReport.from_dict({**data, "labels": wrong})


def test_an_evaluation_keeps_the_labels_and_one_that_continues_does_too(tmp_path):
    pixels, labels = (part[:70] for part in digits("test"))
    loader = list(zip(pixels.split(32), labels.split(32), strict=True))
    model = timm_nrpm.create_model("resnet8_digits", pretrained=True, lam=0.9).eval()
    found = evaluate(model, loader, Threat("Linf", 0.1), "quick", steps=1, resume=tmp_path / "journal.jsonl")
    assert found.labels == found.control.labels == tuple(labels.tolist())
    again = evaluate(model, loader, Threat("Linf", 0.1), "quick", steps=1, resume=tmp_path / "journal.jsonl")
    assert again.labels == found.labels
