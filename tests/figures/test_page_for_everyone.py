import re

from matplotlib.colors import to_hex
from matplotlib.text import Text
from report_pages import contrast, made, page_of

from timm_nrpm.figures import canvas
from timm_nrpm.figures.illustrations import Illustration, Numbers, attacks_in_words
from timm_nrpm.figures.robustness import SOURCES, draw_attacks, draw_curves


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
