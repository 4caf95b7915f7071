import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from itertools import pairwise

import pytest
from matplotlib.colors import to_hex
from PIL import Image

from timm_nrpm import (
    NRPMConfig,
    RobustnessReport,
    Threat,
    TuneConfig,
    calibrate_,
    create_model,
    evaluate,
    figures,
    reprogram_,
)
from timm_nrpm.data.loaders import digits
from timm_nrpm.evaluation.history import History
from timm_nrpm.evaluation.pareto import Candidate, ParetoFront
from timm_nrpm.evaluation.report import AttackResult
from timm_nrpm.figures.plot import plot
from timm_nrpm.figures.robustness import CONTROL, MARKERS, SOURCES, WORST, draw_attacks, draw_curves, draw_lambda
from timm_nrpm.models.registry import DIGITS


def attack(name, source, outcome):
    """`outcome`: "1" for an image that survived, "0" for one that did not, "-" for one that was not tried."""
    survived = tuple({"1": True, "0": False, "-": None}[c] for c in outcome)
    return AttackResult(name, source, survived, forwards=10, backwards=5, seconds=0.5)


def report(eps, *attacks, clean="1111111110", norm="Linf", control=None, **more):
    right = tuple(c == "1" for c in clean)
    return RobustnessReport(
        Threat(norm, eps), "adaptive", 20, 100, 0, right, tuple(attacks), control=control, sha256="ab", **more
    )


def at(eps, own, plain, square, control):
    """Ten images of which nine are right; the search tried those alone that were left."""
    plain_model = report(eps, attack("pgd", "own", control))
    attacks = (attack("pgd", "own", own), attack("pgd_plain", "plain", plain), attack("square", "scores", square))
    return report(eps, *attacks, control=replace(plain_model, sha256=""))


SMALL = at(0.1, "111111111-", "111111100-", "1111110---", "111111100-")
LARGE = at(0.2, "111111100-", "111000000-", "110-------", "100000000-")


@pytest.fixture
def drawn(monkeypatch):
    """Every figure that is drawn."""
    found, make = [], figures.canvas.figure
    monkeypatch.setattr(figures.canvas, "figure", lambda *size: found.append(make(*size)) or found[-1])
    return found


def lines(panel):
    return {line.get_label(): line for line in panel.get_lines()}


def test_curves_show_the_numbers_of_the_reports(drawn, tmp_path):
    assert draw_curves([LARGE, SMALL], tmp_path / "curves.png") == tmp_path / "curves.png"
    (panel,) = drawn[0].axes
    found = lines(panel)
    want = {
        "worst case, image by image": [90, 60, 20],
        "worst case of the plain model": [90, 70, 10],
        "pgd: own gradient": [90, 90, 70],
        "pgd_plain: plain model's gradient": [90, 70, 30],
    }
    assert {name: list(line.get_ydata()) for name, line in found.items()} == {
        name: pytest.approx(values) for name, values in want.items()
    }  # and no line of the search, which tried what others left
    assert all(list(line.get_xdata()) == [0, 0.1, 0.2] for line in found.values())
    worst, control = found["worst case, image by image"], found["worst case of the plain model"]
    thin = [line for name, line in found.items() if "pgd" in name]
    assert min(worst.get_linewidth(), control.get_linewidth()) > max(line.get_linewidth() for line in thin)
    assert (worst.get_linestyle(), control.get_linestyle()) == ("-", "--")
    assert (worst.get_color(), control.get_color()) == (WORST, CONTROL)
    assert len({line.get_marker() for line in thin}) == len(thin)
    edges = {(round(x, 6), round(y, 4)) for x, y in panel.collections[0].get_paths()[0].vertices}
    for x, share, of in ((0, 0.9, SMALL), (0.1, 0.6, SMALL), (0.2, 0.2, LARGE)):
        assert {(x, round(100 * edge, 4)) for edge in of.interval(share)} <= edges
    legend = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert sorted(legend) == sorted([*want, "its 95 % interval"])


def test_curves_without_a_control_and_in_255ths(drawn, tmp_path):
    reports = [replace(each, threat=Threat("Linf", k / 255), control=None) for k, each in ((2, SMALL), (8, LARGE))]
    draw_curves(reports, tmp_path / "curves.svg")
    (panel,) = drawn[0].axes
    assert "worst case of the plain model" not in lines(panel)
    assert [label.get_text() for label in panel.get_xticklabels()] == ["0", "2/255", "8/255"]


def test_curves_show_no_more_lines_than_can_be_told_apart(drawn, tmp_path):
    many = [attack(f"other{i}", "own", "1" * i + "0" * (9 - i) + "-") for i in range(9)]
    attacks = (*many, attack("pgd", "own", "111111111-"), attack("pgd_bpda", "bpda", "111111110-"))
    draw_curves([report(eps, *attacks) for eps in (0.1, 0.2)], tmp_path / "curves.png")
    thin = [name for name in lines(drawn[0].axes[0]) if ":" in name]
    assert len(thin) == len(MARKERS)
    assert {name.split(":")[0] for name in thin} == {"pgd", "pgd_bpda", "other0", "other1", "other2", "other3"}


@pytest.mark.parametrize(
    ("reports", "said"),
    [
        ([], "no reports"),
        ([SMALL, replace(LARGE, threat=Threat("L2", 0.2))], "under Linf and L2: draw one curve for each norm"),
        ([SMALL, SMALL], "2 reports have 1 different eps"),
        ([SMALL, replace(LARGE, sha256="cd")], "of 2 models"),
        ([report(0.1, clean="11"), report(0.2, clean="111")], "2 numbers of images"),
    ],
)
def test_reports_that_make_no_curve(reports, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        draw_curves(reports, tmp_path / "curves.png")
    assert not list(tmp_path.iterdir())


def test_every_picture_says_what_is_missing(tmp_path, monkeypatch):
    def everything(path):
        yield lambda: draw_curves([SMALL, LARGE], path)
        yield lambda: draw_lambda({"a": {1.0: SMALL}}, path, "title")
        yield lambda: draw_attacks(SMALL, path)
        yield lambda: plot(History(TuneConfig(), ("fc",)), path)
        yield lambda: plot(ParetoFront(Threat(), 1, 0, 5, 0.1, (Candidate("plain", {"fc": 1.0}, 0.1, 0.9, 0.4),)), path)

    for draw in everything(tmp_path / "picture.pdf"):
        with pytest.raises(ValueError, match=r"must end in \.png or \.svg"):
            draw()
    for empty in ({}, {"a": {}}, {"a": {1.0: SMALL}, "b": {}}):
        with pytest.raises(ValueError, match="no reports to draw"):
            draw_lambda(empty, tmp_path / "lambda.png", "title")
    with pytest.raises(ValueError, match=r"under Linf 0\.1 and Linf 0\.2: give reports under one threat"):
        draw_lambda({"a": {1.0: SMALL, 0.8: LARGE}}, tmp_path / "lambda.png", "title")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for draw in everything(tmp_path / "picture.png"):
        with pytest.raises(ImportError, match=r"pip install 'timm_nrpm\[demo\]'"):
            draw()


def test_lambda_goes_from_the_plain_model_to_the_right(drawn, tmp_path):
    plain = report(0.1, attack("pgd", "own", "111111100-"))  # which has no other model to follow
    draw_lambda({"before": {0.8: SMALL, 1.0: plain}, "after": {0.8: SMALL, 0.6: SMALL}}, tmp_path / "l.svg", "A title")
    before, after = drawn[0].axes
    assert (before.get_title(), after.get_title(), drawn[0].get_suptitle()) == ("before", "after", "A title")
    for panel, most, least in ((before, 1.0, 0.8), (after, 0.8, 0.6)):
        left, right = panel.get_xlim()
        assert left >= most > least >= right
    found = {name: dict(zip(*line.get_data(), strict=True)) for name, line in lines(before).items()}
    assert found["clean"] == pytest.approx({1.0: 90, 0.8: 90})
    assert found["pgd: own gradient"] == pytest.approx({1.0: 70, 0.8: 90})
    assert found["pgd_plain: plain model's gradient"] == pytest.approx({0.8: 70})
    assert found["worst case, image by image"] == pytest.approx({1.0: 70, 0.8: 60})


def thirty():
    """A report of as many attacks as there may be, each of which breaks an image of those that are left."""
    sources = list(SOURCES)
    attacks = [attack("fgsm", "own", "1" * 39 + "0"), attack("pgd_plain", "plain", "1" * 38 + "00")]
    for i in range(28):
        attacks.append(attack(f"apgd_target{i}_own", sources[i % len(sources)], "1" * (37 - i) + "0" + "-" * (2 + i)))
    control = report(0.1, attack("fgsm", "own", "1" * 30 + "0" * 10), clean="1" * 40)
    return report(0.1, *attacks, clean="1" * 40, control=control, flags=("gradient_masking",))


def test_thirty_attacks_are_readable(drawn, tmp_path):
    found = thirty()
    draw_attacks(found, tmp_path / "attacks.png")
    (panel,) = drawn[0].axes
    names = ["clean", *(a.name for a in found.attacks), "worst case"]
    labels = panel.get_yticklabels()
    assert [label.get_text() for label in labels] == names
    bars = [bar for bar in panel.patches if bar.get_width() > 0 and bar.get_height() > 0]
    shares = [100 * found.accuracy(name) for name in names[:-1]] + [100 * found.worst_case]
    assert [bar.get_width() for bar in bars] == pytest.approx(shares)
    assert [bar.get_alpha() == 1 for bar in bars] == [True] * 3 + [False] * 28 + [True]  # pale: tried what was left
    assert to_hex(bars[-1].get_facecolor()).upper() == WORST
    assert labels[-1].get_fontweight() == "bold"
    points = panel.collections[0].get_offsets().tolist()
    assert points == [pytest.approx(point) for point in ([100, 0], [75, 1], [75, 31])]
    (span,) = [line for line in panel.get_lines() if line.get_label() == "95 % interval"]
    assert list(span.get_xdata()) == pytest.approx([100 * edge for edge in found.interval()])
    texts = [text.get_text() for text in panel.texts]
    assert texts.count("25.0") == 2  # that of the last attack, and the worst case
    assert texts.count("75.0") == 3  # one attack, and the plain model under fgsm and in the worst case
    # No name lies upon another, and none is small.
    boxes = sorted((label.get_window_extent() for label in labels), key=lambda box: box.y0)
    assert all(below.y1 <= above.y0 for below, above in pairwise(boxes))
    assert min(label.get_fontsize() for label in labels) >= 8
    assert "gradient_masking" in panel.get_title()


def test_svg_and_png(tmp_path):
    first, again = (draw_attacks(thirty(), tmp_path / name) for name in ("a.svg", "b.svg"))
    assert first.read_bytes() == again.read_bytes()
    texts = " ".join(ElementTree.parse(first).getroot().itertext())
    for said in ("apgd_target27_own", "worst case", "95 % interval", "plain model, same attack"):
        assert said in texts
    with Image.open(draw_curves([SMALL, LARGE], tmp_path / "curves.PNG")) as picture:
        assert picture.format == "PNG"
        assert picture.width > 1000
        seen = {colour for _, colour in picture.convert("RGB").getcolors(1 << 20)}
    assert {tuple(int(WORST[i : i + 2], 16) for i in (1, 3, 5)), (0, 0, 0)} <= seen


def test_what_a_report_says_is_no_formula(tmp_path):
    odd = replace(SMALL, suite="a$b$", flags=("$\\frac$",), attacks=(attack("$x^{", "$y", "111111111-"),))
    draw_attacks(odd, tmp_path / "attacks.svg")
    draw_curves([odd, replace(odd, threat=Threat("Linf", 0.2))], tmp_path / "curves.svg")
    for name in ("attacks", "curves"):
        assert "$x^{" in " ".join(ElementTree.parse(tmp_path / f"{name}.svg").getroot().itertext())


def test_real_reports(drawn, tmp_path):
    pixels, labels = (t[:40] for t in digits("test"))
    model = reprogram_(create_model(DIGITS, pretrained=True).eval(), NRPMConfig(lam=0.6))
    calibrate_(model, [digits("train")[0][:200]])
    bounds = [Threat("Linf", eps) for eps in (0.1, 0.2)]
    reports = [evaluate(model, [(pixels, labels)], threat, "quick", steps=3) for threat in bounds]
    draw_curves(reports, tmp_path / "curves.png")
    found = lines(drawn[0].axes[0])
    assert list(found["all attacks of quick, image by image"].get_ydata())[1:] == pytest.approx(
        [100 * each.worst_case for each in reports]
    )
    assert {name.split(":")[0] for name in found if ":" in name} == {"fgsm", "pgd", "pgd_plain"}
    draw_attacks(reports[1], tmp_path / "attacks.png")
    draw_lambda({"calibrated": {0.6: reports[0]}}, tmp_path / "lambda.png", DIGITS)
    assert all(Image.open(picture).size[0] > 500 for picture in tmp_path.iterdir())
