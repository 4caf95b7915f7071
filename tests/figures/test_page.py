import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from matplotlib.colors import to_hex
from matplotlib.text import Text
from PIL import Image

from timm_nrpm import RobustnessReport, Threat, create_model, evaluate
from timm_nrpm.attacks import flags
from timm_nrpm.attacks.flags import MASKED, MEANINGS, NUMBERS, RANDOM, THRESHOLDS, ZERO
from timm_nrpm.attacks.glossary import explained
from timm_nrpm.data.loaders import digits
from timm_nrpm.evaluation.report import AttackResult
from timm_nrpm.figures import canvas
from timm_nrpm.figures.illustrations import Illustration, Numbers, attacks_in_words
from timm_nrpm.figures.page import write_page
from timm_nrpm.figures.robustness import SOURCES, draw_attacks, draw_curves
from timm_nrpm.models.registry import DIGITS

HOSTILE = '</script><img src="http://evil.example/x" onerror=alert(1)><!--<script>&amp;\'"'
VOID = {"meta", "img", "br"}
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "microsoft-edge", "firefox")


def attack(name, source, outcome):
    """`outcome`: "1" for an image that survived, "0" for one that did not, "-" for one that was not tried."""
    survived = tuple({"1": True, "0": False, "-": None}[c] for c in outcome)
    return AttackResult(name, source, survived, forwards=1234, backwards=567, seconds=1.25)


def made(eps=0.1, **more):
    """Ten images, of which the last is wrong when clean, and four fall; image 9 to two attacks."""
    attacks = (
        attack("pgd", "own", "111111110-"),
        attack("pgd_plain", "plain", "111111000-"),
        attack("square", "scores", "111110----"),
    )
    settings = {"threat": Threat("Linf", eps), "suite": "adaptive", "steps": 20, "queries": 300, "seed": 7}
    control = RobustnessReport(**settings, correct=(True,) * 10, attacks=(attack("pgd", "own", "1111111000"),))
    evidence = {MASKED: 0.123, RANDOM: 2e-5, ZERO: 0.01}
    told = {"flags": (MASKED,), "evidence": evidence, "versions": {"torch": "9.9"}, "sha256": "a1b2c3", "seconds": 12.3}
    told |= {"warnings": ("Mind the gap.",), "control": control}
    clean = (True,) * 9 + (False,)
    return RobustnessReport(**{**settings, "correct": clean, "attacks": attacks, **told, **more})


class Page(HTMLParser):
    """Every element with its attributes and its text, every table as rows of cells, and everything in order."""

    def __init__(self, path):
        super().__init__()
        self.open, self.elements, self.tables, self.order = [], [], [], []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert self.open == []  # every element is closed

    def handle_starttag(self, tag, attrs):
        element = {"tag": tag, "text": "", **dict(attrs)}
        self.elements.append(element)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_endtag(self, tag):
        assert self.open.pop()["tag"] == tag

    def handle_data(self, data):
        for element in self.open:
            element["text"] += data
        if data.strip():
            self.order.append(data.strip())

    def all(self, tag, **having):
        return [e for e in self.elements if e["tag"] == tag and all(e.get(k) == v for k, v in having.items())]

    def table(self, caption):
        """Its rows, as texts."""
        place = next(i for i, e in enumerate(self.all("caption")) if caption in e["text"])
        return [[cell["text"].strip() for cell in row] for row in self.tables[place]]

    def reports(self):
        return [RobustnessReport.from_json(e["text"]) for e in self.all("script", type="application/json")]


def page_of(tmp_path, reports, **more):
    return Page(write_page(reports, tmp_path / "page.html", **{"title": "A model", **more}))


def test_every_flag_is_explained():
    known = {value for name, value in vars(flags).items() if name.isupper() and isinstance(value, str)}
    assert set(MEANINGS) == set(NUMBERS) == set(THRESHOLDS) == known
    assert all(meaning.endswith(".") for meaning in MEANINGS.values())


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


def test_a_picture_has_its_numbers_in_words_and_in_a_table(tmp_path):
    report = made()
    words = attacks_in_words(report)
    low, high = (100 * edge for edge in report.interval())
    for part in ("clean 90.0 (plain model 100.0)", "pgd 80.0 (plain model 70.0)", "pgd_plain 60.0, square 50.0"):
        assert part in words
    assert f"worst case 50.0 (plain model 70.0), with the 95 % interval {low:.1f} to {high:.1f}." in words
    assert "plain" not in attacks_in_words(made(control=None)).replace("pgd_plain", "")
    path = draw_attacks(report, tmp_path / "attacks.png")
    shown = Illustration(path, words, Numbers(["a", "b"], [["1", "2"], ["3", "4"]]))
    page = page_of(tmp_path, report, pictures={"Bars": shown, "Again": path})
    assert [e["alt"] for e in page.all("img")] == [words, "Again"]
    assert page.table("Numbers in the picture: Bars") == [["a", "b"], ["1", "2"], ["3", "4"]]


def test_text_in_pictures_can_be_read(monkeypatch, tmp_path):
    drawn, make = [], canvas.figure
    monkeypatch.setattr(canvas, "figure", lambda *size: drawn.append(make(*size)) or drawn[-1])
    draw_attacks(made(), tmp_path / "attacks.png")
    draw_curves([made(0.1), made(0.2)], tmp_path / "curves.svg")
    texts = [text for figure in drawn for text in figure.findobj(Text) if text.get_text() and text.get_visible()]
    assert len(texts) > 30
    style = page_of(tmp_path, made()).all("style")[0]["text"]
    paper = re.search(r"\.paper \{[^}]*background: (#\w{6})", style).group(1)  # by day and by night
    assert all(contrast(to_hex(figure.get_facecolor()), "#ffffff") == 1 for figure in drawn)
    for text in texts:
        assert contrast(to_hex(text.get_color()), paper) >= 4.5, text


def test_whatever_may_be_wider_than_the_window_can_be_reached_by_keyboard(tmp_path):
    picture = draw_attacks(made(), tmp_path / "attacks.png")
    page = page_of(tmp_path, [made(0.1), made(0.2)], pictures={"Attacks": picture})
    boxes = [e for e in page.all("div") if e.get("class", "").split()[:1] in (["wide"], ["paper"])]
    assert len(boxes) == len(page.tables) + len(page.all("img"))
    assert all(e["tabindex"] == "0" and e["role"] == "region" and e["aria-label"] for e in boxes)
    assert len({e["aria-label"] for e in boxes}) == len(boxes)


def test_tables_and_pictures_can_be_heard(tmp_path):
    page = page_of(tmp_path, [made(0.1), made(0.2)])
    assert page.all("html")[0]["lang"] == "en"
    assert all(e.get("scope") in ("row", "col") for e in page.all("th"))
    for table in page.tables:
        assert all(cell["tag"] == "th" for cell in table[0])
        assert all(row[0]["tag"] == "th" for row in table)
        assert len({sum(int(cell.get("colspan", 1)) for cell in row) for row in table}) == 1
    assert len(page.all("caption")) == len(page.tables)
    levels = [int(e["tag"][1]) for e in page.elements if re.fullmatch("h[1-6]", e["tag"])]
    assert levels[0] == 1
    assert all(b <= a + 1 for a, b in zip(levels, levels[1:], strict=False))  # noqa: RUF007


def contrast(first, second):
    """As WCAG 2 has it."""

    def luminance(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    light, dark = sorted((luminance(first), luminance(second)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_everything_can_be_read_by_day_and_night(tmp_path):
    style = page_of(tmp_path, made()).all("style")[0]["text"]
    day, night = (
        dict(re.findall(r"--([\w-]+): (#\w{6})", rules)) for rules in re.findall(r":root \{(.*?)\}", style, re.DOTALL)
    )
    assert day.keys() == night.keys()
    for colours in (day, night):
        for text, below in [("ink", name) for name in ("paper", "panel", "bar", "pale", "survived")] + [
            ("quiet", "paper"),
            ("alarm-ink", "alarm-paper"),
        ]:
            assert contrast(colours[text], colours[below]) >= 4.5, (text, below)
    used = set(re.findall(r"(?<![\w-])color: (?:var\(--([\w-]+)\)|(\S+?));", style))
    assert {name for name, _ in used} - {""} == {"ink", "quiet", "alarm-ink"}  # the texts of these pairs, and no other
    assert {colour for _, colour in used} - {""} == {"#000000", "#ffffff"}  # of the cells below
    cells = re.findall(r"\.from-(\w+) \{ background: (#\w{6}); color: (#\w{6})", style)
    assert {name for name, _, _ in cells} == {*SOURCES, "other"}
    assert all(contrast(below, text) >= 4.5 for _, below, text in cells)


@pytest.fixture(scope="module")
def real():
    pixels, labels = (t[:40] for t in digits("test"))
    model = create_model(DIGITS, pretrained=True, lam=0.6).eval()
    threats = (Threat("Linf", 0.1), Threat("Linf", 0.2))
    return [evaluate(model, [(pixels, labels)], threat, "quick", steps=3) for threat in threats]


def test_a_real_report(real, tmp_path):
    page = page_of(tmp_path, real)
    assert page.reports() == real
    for report in real:
        rows = page.table(f"3 attacks on 40 images, {report.threat}")[2:-1]
        assert [(row[0].split()[0], row[2]) for row in rows] == [
            (a.name, f"{100 * report.accuracy(a.name):.1f}") for a in report.attacks
        ]


def beyond(browse, path, width):
    """What is cut off, or wider than a window of this width, outside the boxes that scroll by themselves.

    Chromium's window is at least 500 pixels wide, so the page is shown in a frame; only this copy of the page holds a
    script, which measures the page and writes what it finds into the frame's own text.
    """
    script = """<script>const found = [], edge = document.documentElement.clientWidth;
    if (document.documentElement.scrollWidth > edge) found.push("page " + document.documentElement.scrollWidth);
    for (const each of document.body.querySelectorAll("*")) {
      const box = each.getBoundingClientRect(), inside = each.parentElement.closest(".wide, .paper");
      if (box.width && !inside && (box.right > edge + 1 || box.left < -1)) found.push(each.tagName + " " + box.right);
      if (each.matches(".wide, .paper") && getComputedStyle(each).overflowX !== "auto") found.push("no scrolling");
    }
    parent.postMessage([edge, found], "*");</script>"""
    source = re.sub("<meta http-equiv=[^>]*>", "", path.read_text(encoding="utf-8"))
    copy = path.with_name(f"copy-{width}.html")
    copy.write_text(source.replace("</body>", f"{script}</body>"), encoding="utf-8")
    frame = path.with_name(f"frame-{width}.html")
    frame.write_text(
        "<body><p></p><script>onmessage = e => document.body.firstChild.textContent = JSON.stringify(e.data);</script>"
        f'<iframe src="{copy.name}" style="width:{width}px; height:900px; border:0"></iframe>',
        encoding="utf-8",
    )
    dom = browse("--dump-dom", "--virtual-time-budget=3000", "--window-size=1400,1000", name=f"dom{width}", page=frame)
    edge, found = json.loads(re.search("<p>(.*?)</p>", dom).group(1))
    assert abs(edge - width) <= 16  # a scroll bar may take some
    return found


@pytest.fixture
def browse(tmp_path):
    """Open a page in a browser without a window, and return what it prints."""
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        pytest.skip(f"no browser is installed: none of {', '.join(BROWSERS)}")

    def browse(*arguments, name, page):
        if "firefox" in program:
            if "--dump-dom" in arguments:
                pytest.skip("Firefox does not print the page as it stands")
            command = [program, "--headless", "--profile", str(tmp_path)]
        else:
            command = [program, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
            command += [f"--user-data-dir={tmp_path / name}"]
        command += [*arguments, page.as_uri()]
        return subprocess.run(command, capture_output=True, timeout=120, check=True).stdout.decode()

    return browse


@pytest.mark.parametrize("width", [390, *(pytest.param(width, marks=pytest.mark.slow) for width in (768, 1280))])
def test_nothing_is_cut_off_however_long_its_name(real, browse, width, tmp_path):
    """Of several reports with pictures, of another without a control, and of one with members and flags."""
    long = f"folder_{'without_an_end_' * 12}/{'0123456789abcdef' * 8}"
    odd = [
        real[1],
        replace(real[0], warnings=(long,), sha256=long, suite=long, versions={long: long}),
        replace(real[1], control=None),
    ]
    renamed = tuple(replace(each, name=f"{each.name}_member_{long}") for each in real[1].attacks)
    odd.append(replace(real[1], attacks=renamed, flags=(MASKED, long), plain="member"))
    picture = draw_attacks(made(), tmp_path / "attacks.png")
    path = write_page(odd, tmp_path / "odd.html", title=long, pictures={long: picture})
    assert beyond(browse, path, width) == []


def test_in_a_real_browser(real, browse, tmp_path):
    path = write_page(real, tmp_path / "page.html", title="A model")

    def seen(name, width, *arguments):
        browse(*arguments, f"--window-size={width},1400", f"--screenshot={tmp_path / name}.png", name=name, page=path)
        with Image.open(tmp_path / f"{name}.png") as picture:
            return picture.convert("RGB")

    light = seen("light", 900)
    assert light.width == 900
    colours = {colour for _, colour in light.getcolors(1 << 21)}
    assert len(colours) > 100
    assert max(light.getcolors(1 << 21))[1] == (255, 255, 255)
    dom = browse("--dump-dom", name="dom", page=path)
    dark = seen("dark", 600, "--blink-settings=preferredColorScheme=0")
    assert dark.width == 600
    assert max(dark.getcolors(1 << 21))[1] == (0x14, 0x17, 0x1B)
    (tmp_path / "dom.html").write_text(dom, encoding="utf-8")
    page, written = Page(tmp_path / "dom.html"), Page(path)
    assert len(page.all("tr")) == len(written.all("tr")) > 30
    for report in real:
        caption = f"3 attacks on 40 images, {report.threat}"
        assert page.table(caption) == written.table(caption)
    assert page.reports() == real
