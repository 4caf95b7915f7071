"""Corruption errors against what the paper's formula gives, and their picture."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from timm_nrpm.evaluation.corruption_report import Answers, CorruptionReport
from timm_nrpm.figures.corruptions import draw_corruptions


def answers(clean, **by_kind):
    return Answers(clean, {kind: dict(enumerate(runs, 1)) for kind, runs in by_kind.items()})


def right(count, of=10):
    return tuple(i < count for i in range(of))


def test_mean_corruption_error_by_hand():
    """Errors 2 + 4 over 3 + 5 and 1 + 1 over 2 + 6; beyond the clean one at each severity 4 over 6 and 0 over 6."""
    model = answers(right(9), fog=[right(8), right(6)], snow=[right(9), right(9)])
    baseline = answers(right(9), fog=[right(7), right(5)], snow=[right(8), right(4)])
    report = CorruptionReport(model, baseline, 0, {})
    assert report.corruption_errors() == {"fog": 6 / 8, "snow": 2 / 8}
    assert report.mean_corruption_error == 0.5
    assert report.corruption_errors(relative=True) == {"fog": 4 / 6, "snow": 0.0}
    assert report.relative_mean_corruption_error == pytest.approx(1 / 3)
    assert model.accuracy == {"fog": {1: 0.8, 2: 0.6}, "snow": {1: 0.9, 2: 0.9}}
    text = str(report)
    assert "10 images, clean 90.0 % (baseline 90.0 %), mCE 50.0 %, relative mCE 33.3 %" in text
    assert "undefined" not in text
    assert text.splitlines()[2].split() == ["fog", "80.0", "60.0", "75.0", "%"]


def test_corruption_errors_against_numpy():
    drawn = np.random.default_rng(0).random((2, 4, 5, 50)) < 0.7  # model, kind, severity, image
    clean = np.random.default_rng(1).random((2, 50)) < 0.9
    names = ("a", "b", "c", "d")
    both = [
        answers(tuple(c.tolist()), **{k: [tuple(s.tolist()) for s in kind] for k, kind in zip(names, d, strict=True)})
        for c, d in zip(clean, drawn, strict=True)
    ]
    report = CorruptionReport(*both, 0, {})
    rates = 1 - drawn.mean(-1)
    assert report.mean_corruption_error == pytest.approx((rates[0].sum(1) / rates[1].sum(1)).mean())
    beyond = (rates - (1 - clean.mean(-1))[:, None, None]).sum(-1)
    assert report.relative_mean_corruption_error == pytest.approx((beyond[0] / beyond[1]).mean())


@pytest.mark.parametrize(
    ("of_baseline", "absolute", "relative", "line"),
    [
        ((10, 10), None, None, "mCE is undefined: the baseline makes no error under fog."),
        ((9, 9), 1.5, None, "relative mCE is undefined: the baseline loses nothing under fog."),
        ((10, 9), 3.0, None, "relative mCE is undefined: the baseline loses nothing under fog."),
        ((9, 8), 1.0, 1.0, None),
    ],
)
def test_a_baseline_that_makes_no_error_is_named(of_baseline, absolute, relative, line):
    clean, snow = right(9), [right(5), right(5)]
    model = answers(clean, fog=[right(9), right(8)], snow=snow)
    baseline = answers(clean, fog=[right(n) for n in of_baseline], snow=snow)
    report = CorruptionReport(model, baseline, 0, {})
    assert report.corruption_errors() == {"fog": absolute, "snow": 1.0}
    assert report.mean_corruption_error == (None if absolute is None else (absolute + 1) / 2)
    assert report.corruption_errors(relative=True) == {"fog": relative, "snow": 1.0}
    assert report.relative_mean_corruption_error == (None if relative is None else (relative + 1) / 2)
    assert ("undefined" in str(report)) == (line is not None)
    assert line is None or line in str(report)
    assert CorruptionReport.from_json(report.to_json()) == report


@st.composite
def reports(draw):
    """Any answers of a model and, perhaps, a baseline."""
    count = draw(st.integers(1, 6))
    images = st.lists(st.booleans(), min_size=count, max_size=count).map(tuple)
    kinds = draw(st.lists(st.sampled_from(["fog", "snow", "white_noise"]), min_size=1, max_size=3, unique=True))
    severities = draw(st.lists(st.integers(1, 5), min_size=1, max_size=5, unique=True))
    both = [Answers(draw(images), {k: {s: draw(images) for s in severities} for k in kinds}) for _ in range(2)]
    return CorruptionReport(
        both[0], draw(st.sampled_from([None, both[0], both[1]])), draw(st.integers(0, 9)), {"a": "1"}
    )


@given(reports())
def test_any_report_says_the_same_again(report):
    again = CorruptionReport.from_json(report.to_json())
    assert again == report
    assert str(again) == str(report)
    assert again.mean_corruption_error == report.mean_corruption_error


@given(reports())
def test_what_holds_of_all_corruption_errors(report):
    for relative in (False, True):
        errors = report.corruption_errors(relative)
        assert list(errors) == list(report.model.corrupted)
        if report.baseline is None:
            assert set(errors.values()) == {None}
        elif report.baseline == report.model:
            assert set(errors.values()) <= {None, 1.0}
    for kind, error in report.corruption_errors().items():
        if error is not None:  # rates divide as counts do
            mean = [1 - np.mean(list(of.accuracy[kind].values())) for of in (report.model, report.baseline)]
            assert error == pytest.approx(mean[0] / mean[1])


def some(of_model, of_baseline=None):
    runs = {"gaussian_noise": [right(of_model), right(3)], "fog": [right(4), right(2)]}
    model = answers(right(9), **runs)
    baseline = None if of_baseline is None else answers(right(8), **{**runs, "fog": [right(of_baseline), right(1)]})
    return CorruptionReport(model, baseline, 0, {})


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_the_picture_shows_what_it_is_given(tmp_path, ending):
    import matplotlib

    before = matplotlib.get_backend()
    seen = set()
    for i, report in enumerate((some(6), some(5), some(6, 3), some(6, 5))):
        path = tmp_path / f"{i}.{ending}"
        assert draw_corruptions(report, str(path)) == path
        data = path.read_bytes()
        if ending == "svg":
            assert b"<svg" in data
            seen.add(b"".join(line for line in data.splitlines() if b"dc:date" not in line and b"id=" not in line))
        else:
            seen.add(matplotlib.image.imread(path).tobytes())
    assert len(seen) == 4
    assert matplotlib.get_backend() == before


def test_the_picture_says_the_numbers(tmp_path):
    import matplotlib as mpl

    with mpl.rc_context({"svg.fonttype": "none"}):
        text = draw_corruptions(some(6, 3), tmp_path / "a.svg").read_text()
    for said in (
        "gaussian noise",
        "clean 90.0 %",
        "clean 80.0 %",
        "clean +10.0",
        "CE 88 %",
        "mCE 94 %",
        ">+10<",
        ">0<",
    ):
        assert said in text, said
    with mpl.rc_context({"svg.fonttype": "none"}):
        text = draw_corruptions(some(6), tmp_path / "a.svg").read_text()
    assert "CE" not in text
    assert "baseline" not in text


def test_a_picture_of_another_kind_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"must end in .png or .svg"):
        draw_corruptions(some(6), tmp_path / "a.pdf")
    assert not list(tmp_path.iterdir())
