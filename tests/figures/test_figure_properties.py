"""Names are text and numbers are told, in the page and in pictures, whatever they are."""

import re
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from matplotlib.cbook import is_math_text
from matplotlib.text import Text
from report_pages import attack, made, page_of
from torch import nn

from timm_nrpm.evaluation.certificates import Certificate, CertificationReport
from timm_nrpm.evaluation.diagnostics import embedding_differences
from timm_nrpm.evaluation.landscape import loss_landscape
from timm_nrpm.figures import attacked, canvas, certified, diagnostics, robustness
from timm_nrpm.figures.illustrations import Illustration, Numbers, attacks_in_words

letters = ["<b>", "</script>", "<script>", "&amp;", "-->", "<!--", "{{ x }}", *"<&>\"'$\\%_ a\u00e4\n"]
names = st.lists(st.sampled_from(letters), min_size=1, max_size=8).map("".join)


def shape(page):
    """The elements of a page, whatever their texts are."""
    return [(element["tag"], sorted(element.keys())) for element in page.elements]


@settings(max_examples=25)
@given(title=names, called=names, caption=names, alt=names, warning=names)
@example(title="</script>", called="</td></script>", caption="<", alt='" onload="x', warning="&lt;")
def test_no_name_changes_the_page_or_is_changed_by_it(title, called, caption, alt, warning):
    """It reads as it was given, and the page has the same elements with the same attributes as for a harmless one."""

    def written(folder, title, called, caption, alt, warning):
        picture = folder / "picture.png"
        picture.write_bytes(b"")
        shown = {caption: Illustration(picture, alt, Numbers([called], [[called]]))}
        told = {"warnings": (warning,), "versions": {"torch": called}, "suite": called}
        report = made(attacks=(attack(called, "own", "111111110-"),), **told)
        return report, page_of(folder, report, title=title, pictures=shown)

    with tempfile.TemporaryDirectory() as folder:
        _, harmless = written(Path(folder), *["name"] * 5)
        report, page = written(Path(folder), title, called, caption, alt, warning)
    assert shape(page) == shape(harmless)
    assert page.reports() == [report]
    assert [each["text"] for each in page.all("title") + page.all("h1")] == [title, title]
    assert [each["alt"] for each in page.all("img")] == [alt]
    assert [each["text"].strip() for each in page.all("ul", **{"class": "warnings"})] == [warning.strip()]
    tables = [[[cell["text"].strip() for cell in row] for row in table] for table in page.tables]
    assert [[called.strip()]] * 2 in tables
    assert any(row[0].startswith(called.strip()) for row in page.table("1 attacks on 10 images"))


attacks = st.integers(1, 3)
fates = attacks.flatmap(lambda n: st.lists(st.lists(st.booleans(), min_size=n, max_size=n), min_size=1, max_size=30))


@settings(max_examples=40)
@given(fates)
def test_the_alternative_text_has_the_number_of_every_bar(images):
    """Of each image it is given which attacks it survives; in the worst case it has to survive all."""
    outcomes = ["".join("01"[each] for each in of_attack) for of_attack in zip(*images, strict=True)]
    results = tuple(attack(f"attack{i}", "own", outcome) for i, outcome in enumerate(outcomes))
    words = attacks_in_words(made(correct=(True,) * len(images), attacks=results, control=None))
    told = [float(number) for number in re.findall(r"(?:clean|attack\d+|case) (\d+\.\d)", words)]
    kept = [len(images), *(outcome.count("1") for outcome in outcomes), sum(map(all, images))]
    assert told == [float(f"{100 * count / len(images):.1f}") for count in kept]
    assert f"on {len(images)} images under Linf 0.1" in words


def text_of(draw):
    """The text of a picture as a reader sees it, without its file."""
    drawn, make = [], canvas.figure

    def kept(*size):
        drawn.append(make(*size))
        drawn[-1].savefig = lambda *_, **__: None
        return drawn[-1]

    with pytest.MonkeyPatch.context() as patch:
        for module in (attacked, canvas, diagnostics):
            patch.setattr(module, "figure", kept)
        draw()
    texts = [text.get_text() for text in drawn[0].findobj(Text)]
    assert not any(map(is_math_text, texts)), texts
    return "\n".join(text.replace("\\$", "$") for text in texts)


PIXELS, LABEL = torch.rand(1, 1, 4, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0])
MODEL = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
CERTIFIED = CertificationReport("", 0.5, 9, 90, 0.999, 0, "", {}, (Certificate(0, 0, 0.1, 0, 9, 90),))
NUMBERS = {"mean": (0.0,), "std": (1.0,)}
DRAWN = ("class", "certified", "differences", "embeddings", "landscape", "attack")


@pytest.fixture(scope="module")
def drawings():
    """Functions that draw a picture with a name in it."""
    moved = embedding_differences(MODEL, PIXELS, 1 - PIXELS, layers="*", **NUMBERS)
    around = loss_landscape(MODEL, PIXELS, LABEL, eps=0.1, directions=("random", "random"), resolution=3, **NUMBERS)
    each = (
        lambda name: attacked.draw_attacked(PIXELS, PIXELS, LABEL, LABEL, "x.png", [name]),
        lambda name: certified.draw_certified([replace(CERTIFIED, name=name)], "x.png"),
        lambda name: diagnostics.draw_differences({name: moved}, "x.png"),
        lambda name: diagnostics.draw_embeddings({name: MODEL}, PIXELS, PIXELS, "x.png", "*", **NUMBERS),
        lambda name: diagnostics.draw_landscape({name: around}, "x.png"),
        lambda name: robustness.draw_attacks(made(attacks=(attack(name, "own", "1" * 10),)), "x.png"),
    )
    return dict(zip(DRAWN, each, strict=True))


@pytest.mark.parametrize("kind", DRAWN)
@settings(max_examples=6)
@given(name=names)
@example(name="$5 to $10")
@example(name="_hidden")
def test_the_name_of_a_class_a_model_or_an_attack_is_seen_as_written(drawings, kind, name):
    assert name in text_of(lambda: drawings[kind](name))
