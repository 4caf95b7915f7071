import re
import sys
from dataclasses import replace

import pytest
from report_pages import attack, made, page_of

from timm_nrpm import RobustnessReport, Threat
from timm_nrpm.attacks.flags import MASKED, MEANINGS, NUMBERS, RANDOM, THRESHOLDS, ZERO
from timm_nrpm.attacks.glossary import explained
from timm_nrpm.figures.page import write_page
from timm_nrpm.figures.robustness import draw_attacks

HOSTILE = '</script><img src="http://evil.example/x" onerror=alert(1)><!--<script>&amp;\'"'


def test_the_table_has_the_numbers_of_the_report(tmp_path):
    page = page_of(tmp_path, made())
    head, clean, *rows, worst = page.table("3 attacks on 10 images, Linf 0.1")
    assert head[:4] == ["attack", "whose gradient", "accuracy left, %", "plain model, %"]
    assert clean == ["clean No attack: the images as they are.", "", "90.0", "100.0", *[""] * 5]
    rows = [[row[0].split()[0], *row[1:]] for row in rows]
    assert rows == [
        ["pgd", "own", "80.0", "70.0", "9", "1", "1,234", "567", "1.2"],
        ["pgd_plain", "plain model's", "60.0", "–", "9", "3", "1,234", "567", "1.2"],  # noqa: RUF001
        ["square", "scores alone", "50.0", "–", "6", "1", "1,234", "567", "1.2"],  # noqa: RUF001
    ]
    assert worst[0].startswith("worst case Right when clean")
    low, high = (100 * edge for edge in made().interval())
    assert worst[2:] == ["50.0", "70.0", f"95 %: {low:.1f} to {high:.1f}"]
    bars = [(cell["style"], cell["class"]) for cell in page.all("td") if "share" in cell.get("class", "")]
    full, pale = ("share", "share pale")  # pale: tried what others left
    looks = zip(("90.0", "80.0", "60.0", "50.0", "50.0"), (full, full, full, pale, full), strict=True)
    assert bars == [(f"--share:{share}%", look) for share, look in looks]


def test_the_verdict_is_shown_and_the_worst_case_is_adaptive(tmp_path):
    for reports in (made(), [made(0.1), made(0.2)]):
        page = page_of(tmp_path, reports)
        for report in [reports] if isinstance(reports, RobustnessReport) else reports:
            assert report.verdict in [e["text"] for e in page.all("p") if e.get("class") == "verdict"]
    page = page_of(tmp_path, made(suite="quick"))
    assert "All attacks" in [e["text"] for e in page.all("dt")]
    assert "Run the suite adaptive (--suite adaptive)" in page.source
    assert page.table("3 attacks on 10 images")[-1][0].startswith("all attacks of quick ")


def test_the_verdict_comes_first_then_flags_then_how_to_read_it(tmp_path):
    report = made(labels=(0,) * 10)
    for reports in (report, [report, made(0.2)]):
        page = page_of(tmp_path, reports)
        order = page.order[page.order.index("A model", page.order.index("A model") + 1) :]  # the second is the heading
        assert order[:3] == ["A model", "Verdict", report.verdict]
        flag = order.index("Flags")
        assert order[flag : flag + 4] == ["Flags", "Flag:", MASKED, MEANINGS[MASKED]]
        ends = [order.index(name) for name in ("Flags", "How to read this", "What to do next", "Attacks")]
        assert ends == sorted(ends)
        tags = [e["tag"] for e in page.elements]
        sections = [e["text"] for e in page.all("h2")]
        assert sections[:3] == ["Verdict", "Flags", "How to read this"]
        guide = next(i for i, e in enumerate(page.elements) if e.get("id") == "guide")
        assert not {"table", "img", "figure"} & set(tags[:guide])
    assert (
        page_of(tmp_path, report).all("article")[0]["text"].endswith(f"12.3 % ({NUMBERS[MASKED]}), raised above 2.0 %")
    )


def test_how_to_read_this_explains_every_number_before_the_tables(tmp_path):
    page = page_of(tmp_path, made())
    terms = [e["text"] for e in page.all("dt")]
    assert terms == [
        *("Clean", "Along the own gradient", "Worst case", "Why there are two numbers"),
        *("95 % interval", "Control", "Flag"),
    ]
    meanings = [e["text"] for e in page.all("dd")]
    assert len(meanings) == len(terms)
    assert all(meaning.endswith(".") for meaning in meanings)
    assert "lambda is 1 in every layer" in meanings[terms.index("Control")]
    alone = page_of(tmp_path, made(control=None)).all("dd")
    assert "nothing can be said about a gain" in alone[terms.index("Control")]["text"]


@pytest.mark.parametrize(
    ("plain", "name"),
    [
        ("reprogrammed", "plain model"),
        ("given", "model it was made from"),
        ("trained", "same weights at lambda 1"),
        ("member", "member that it is compared with"),
    ],
)
def test_the_control_has_its_own_name(plain, name, tmp_path):
    page = page_of(tmp_path, made(plain=plain))
    assert page.table("3 attacks")[0][3] == f"{name}, %"
    assert f"{name[0].upper()}{name[1:]}, same attacks" in page.source
    assert f"The {name}" in next(e["text"] for e in page.all("dd") if "McNemar" in e["text"])
    strips = [e["aria-label"].split(":")[0] for e in page.all("div", **{"class": "strip"})]
    assert strips == ["This model", name.capitalize()]


def test_every_attack_is_explained_in_its_row(tmp_path):
    report = made()
    rows = page_of(tmp_path, report).table("3 attacks on 10 images")[2:-1]
    assert [row[0] for row in rows] == [f"{a.name} {explained(a.name, a.source)}" for a in report.attacks]


def test_a_dash_is_explained_where_there_is_a_control(tmp_path):
    words = "A dash stands where the control was not put under that attack."
    assert words in page_of(tmp_path, made()).source
    assert words not in page_of(tmp_path, made(control=None)).source


def test_classes_have_a_table(tmp_path):
    labels, right = (3,) * 20 + (5,) * 20, (True,) * 30 + (False,) * 10
    report = made(labels=labels, correct=right, attacks=(attack("pgd", "own", "1" * 10 + "0" * 20 + "-" * 10),))
    control = replace(report, control=None, attacks=(), correct=(True,) * 40)
    rows = page_of(tmp_path, replace(report, control=control)).table("Accuracy of each class")
    assert rows[0] == ["class", "images", "clean, %", "worst case, %", "95 % interval", "plain model, %"]
    bounds = report.by_class.kept.bounds()
    want = [f"{100 * low:.1f} to {100 * high:.1f}" for low, high in bounds]
    assert rows[1:] == [["3", "20", "100.0", "50.0", want[0], "100.0"], ["5", "20", "50.0", "0.0", want[1], "100.0"]]
    assert "Classes" not in [e["text"] for e in page_of(tmp_path, made()).all("h2")]


def test_flags_that_are_not_raised_have_their_numbers(tmp_path):
    page = page_of(tmp_path, made())
    calm = {row[0]: row[1:3] for row in page.table("Flags that are not raised")[1:]}
    assert MASKED not in calm
    assert calm[RANDOM] == ["2e-05", "0.0001"]
    assert calm[ZERO] == ["1.0 %", "5.0 %"]
    assert next(row for row in calm.values() if row[0] == "not checked")
    assert set(calm) == set(THRESHOLDS) - {MASKED}


def test_no_flag_and_flags_of_another_version(tmp_path):
    page = page_of(tmp_path, made(flags=(), control=None))
    assert not page.all("article")
    assert "No flag is raised." in page.source
    page = page_of(tmp_path, made(flags=("new_flag", ZERO), evidence={}))
    assert [e["text"].count("its number is not in the report") for e in page.all("article")] == [1, 1]
    assert "This version of timm_nrpm does not know this flag." in page.all("article")[0]["text"]


def test_the_headline_is_beside_the_control(tmp_path):
    report = made()
    cards = [e["text"] for e in page_of(tmp_path, report).all("div", **{"class": "card"})]
    assert len(cards) == 2
    for card, each in zip(cards, (report, report.control), strict=True):
        low, high = (100 * edge for edge in each.interval())
        assert f"{100 * each.worst_case:.1f} %" in card
        assert f"95 %: {low:.1f} to {high:.1f}" in card
    page = page_of(tmp_path, report)
    # Images 1 to 5 survive in this model, and 1 to 7 in the plain one.
    assert "no difference can be told, 0 images against 2" in page.source
    assert len(page_of(tmp_path, made(control=None)).all("div", **{"class": "card"})) == 1


def test_the_strip_has_a_cell_for_each_image(tmp_path):
    page = page_of(tmp_path, made())
    strips = page.all("div", **{"class": "strip"})
    cells = [e for e in page.all("i") if "title" in e]
    assert len(strips) == 2
    assert len(cells) == 20
    titles = [cell["title"] for cell in cells[:10]]
    fates = ["survived every attack"] * 5 + ["broken first by square"] + ["broken first by pgd_plain"] * 2
    fates += ["broken first by pgd", "wrong when clean"]
    assert titles == [f"image {i}: {fate}" for i, fate in enumerate(fates, 1)]
    assert [cell["text"] for cell in cells[5:10]] == ["C", "B", "B", "A", "×"]  # noqa: RUF001
    assert [cell["class"] for cell in cells[5:9]] == ["from-scores", "from-plain", "from-plain", "from-own"]
    assert [cell["text"] for cell in cells[17:]] == ["A"] * 3
    legend = {row[0]: row[1:] for row in page.table("What became of the images")[1:]}
    assert legend == {
        "× wrong when clean": ["", "1", "0"],  # noqa: RUF001
        "survived every attack": ["", "5", "7"],
        "A pgd": ["own", "1", "3"],
        "B pgd_plain": ["plain model's", "2", "0"],
        "C square": ["scores alone", "1", "0"],
    }


def test_settings(tmp_path):
    rows = dict(page_of(tmp_path, made(eps=8 / 255)).table("What was run, Linf 8/255")[1:])
    assert rows["threat"] == "Linf, eps 0.0313725 (Linf 8/255)"
    assert (rows["seed"], rows["queries of a search"], rows["images"]) == ("7", "300", "10")
    assert (rows["version of torch"], rows["sha256 of the model"], rows["seconds"]) == ("9.9", "a1b2c3", "12.3")
    page = page_of(tmp_path, made())
    assert [e["text"] for e in page.all("ul", **{"class": "warnings"})] == ["Mind the gap."]


def test_what_a_report_says_is_text_and_comes_back(tmp_path):
    evil = made(
        suite=HOSTILE,
        flags=(HOSTILE,),
        evidence={HOSTILE: 1.0},
        versions={HOSTILE: HOSTILE},
        sha256=HOSTILE,
        warnings=(HOSTILE,),
        attacks=(attack(HOSTILE, HOSTILE, "111111110-"),),
    )
    evil = replace(evil, control=replace(evil.control, flags=(HOSTILE,), attacks=evil.attacks))
    reports = [evil, replace(evil, threat=Threat("Linf", 0.2))]
    picture = draw_attacks(made(), tmp_path / "attacks.png")
    page = page_of(tmp_path, reports, title=HOSTILE, pictures={HOSTILE: picture})
    assert page.reports() == reports
    assert {e["tag"] for e in page.all("script")} == {"script"}
    assert len(page.all("script")) == 2
    assert not [e for e in page.elements if any(key.startswith("on") for key in e)]
    assert [e["text"] for e in page.all("title") + page.all("h1")] == [HOSTILE] * 2
    assert "<img src=" not in page.source
    assert {e["alt"] for e in page.all("img")} > {HOSTILE}
    row = page.table("1 attacks on 10 images, Linf 0.1")[2]
    assert row[0] == f"{HOSTILE} {explained(HOSTILE, HOSTILE)}"
    assert row[1] == HOSTILE


def test_nothing_comes_from_elsewhere(tmp_path):
    picture = draw_attacks(made(), tmp_path / "attacks.svg")
    page = page_of(tmp_path, [made(0.1), made(0.2)], pictures={"Attacks": picture, "Again": picture})
    assert not re.search(r"https?:|url\(|@import|<link|<iframe|srcset", page.source.lower())
    assert {e["type"] for e in page.all("script")} == {"application/json"}
    images = page.all("img")
    assert len(images) == 3
    assert all(e["src"].startswith("data:image/svg+xml;base64,") for e in images)
    assert all(e["alt"] for e in images)
    policy = next(e["content"] for e in page.all("meta") if e.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")


def test_several_reports(tmp_path):
    reports = [made(0.2), made(0.1, flags=()), made(0.1, sha256="other")]
    page = page_of(tmp_path, reports)
    assert page.reports() == reports
    assert [e["id"] for e in page.all("script")] == ["report-1", "report-2", "report-3"]
    headings = [e["text"] for e in page.all("h2")]
    assert headings.index("Curves") == headings.index("Attacks") + 1
    curve = page.table("Numbers in the picture: Accuracy over eps under Linf")
    assert curve[0] == ["eps", "worst case, %", "95 % interval", "plain model, %", "pgd, %", "pgd_plain, %"]
    low, high = (100 * edge for edge in reports[0].interval())
    interval = f"{low:.1f} to {high:.1f}"
    assert curve[2:] == [[eps, "50.0", interval, "70.0", "80.0", "60.0"] for eps in ("0.1", "0.2")]
    assert curve[1][:2] + curve[1][3:] == ["0", "90.0", "100.0", "90.0", "90.0"]
    assert len(page.all("img")) == 1  # of the model with two bounds
    assert page.all("img")[0]["alt"].endswith("worst case 90.0 % at 0, 50.0 % at 0.1, 50.0 % at 0.2.")
    rows = page.table("Share of the images that no attack broke")[1:]
    assert [row[0] for row in rows] == ["Linf 0.2, adaptive", "2. Linf 0.1, adaptive", "3. Linf 0.1, adaptive"]
    assert [row[-1] for row in rows] == [MASKED, "none", MASKED]
    assert all(row[1].startswith("50.0 (95 %: ") and row[2].startswith("70.0 (95 %: ") for row in rows)
    assert [row[5] for row in rows] == ["80.0"] * 3  # along the own gradient
    said = [e["text"].split(":")[0] for e in page.all("li") if NUMBERS[MASKED] in e["text"]]
    assert said == ["Linf 0.2, adaptive", "3. Linf 0.1, adaptive"]  # those that have the flag


def test_without_matplotlib_the_curve_is_told(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    page = page_of(tmp_path, [made(0.1), made(0.2)])
    assert not page.all("img")
    assert "50.0 % at 0.1, 50.0 % at 0.2. The picture needs Matplotlib" in page.source


@pytest.mark.parametrize(
    ("reports", "name", "pictures", "said"),
    [
        ([], "page.html", {}, "no reports to show"),
        (made(), "page.pdf", {}, r"must end in \.html"),
        (made(), "page.html", {"A": "picture.pdf"}, r"'picture.pdf' must end in one of \.png, \.svg"),
    ],
)
def test_bad_input_leaves_nothing(reports, name, pictures, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        write_page(reports, tmp_path / name, title="A model", pictures=pictures)
    assert not list(tmp_path.iterdir())


def test_a_real_report(real, tmp_path):
    page = page_of(tmp_path, real)
    assert page.reports() == real
    for report in real:
        rows = page.table(f"3 attacks on 40 images, {report.threat}")[2:-1]
        assert [(row[0].split()[0], row[2]) for row in rows] == [
            (a.name, f"{100 * report.accuracy(a.name):.1f}") for a in report.attacks
        ]
