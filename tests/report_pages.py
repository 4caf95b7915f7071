"""Made reports, and the page that shows them, taken apart."""

from html.parser import HTMLParser

from timm_nrpm import RobustnessReport, Threat
from timm_nrpm.attacks.flags import MASKED, RANDOM, ZERO
from timm_nrpm.evaluation.report import AttackResult
from timm_nrpm.figures.page import write_page

VOID = {"meta", "img", "br"}


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


def contrast(first, second):
    """As WCAG 2 has it."""

    def luminance(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    light, dark = sorted((luminance(first), luminance(second)), reverse=True)
    return (light + 0.05) / (dark + 0.05)
