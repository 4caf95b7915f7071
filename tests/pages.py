"""The pages of the documentation: their blocks of code, their links, and what a page says that a command prints."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "docs" / "quickstart.ipynb"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

SYNSETS = ("n01440764", "n01443537")  # of ImageNet, so that the labels are those of resnet18

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]+)\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)

NUMBER = re.compile(r"(?<![\w.])[+-]?\d[\d,]*(?:\.\d+)?(?:e-?\d+)?")
SHARE = re.compile(r"[01]\.\d{3,}")
CHANCE = (
    (r"127\.0\.0\.1:\d+", "HOST"),
    (r"\b[0-9a-f]{12,}\b", "HASH"),
    (r"\d{4}-\d\d-\d\d", "DATE"),
    (r"[━─┏┳┓┡╇┩├┼┤└┴┘]+", ""),
)
"""What differs from run to run, or with the width of a table, and what stands for it."""


def photos(folder: Path, trained: int = 2, tested: int = 2) -> None:
    """Noise of 64 x 64, `trained` images of a class to train on, and `tested` more."""
    generator = np.random.default_rng(0)
    for split in ("train", "test"):
        for synset in SYNSETS:
            (folder / "photos" / split / synset).mkdir(parents=True)
            for index in range(trained if split == "train" else tested):
                image = Image.fromarray(generator.integers(0, 256, (64, 64, 3), np.uint8))
                image.save(folder / "photos" / split / synset / f"{index}.png")


def name_of(page: Path) -> str:
    """A page as people name it, such as docs/method.md."""
    return page.relative_to(ROOT).as_posix()


def text_of(page: Path) -> str:
    """The text of a page; of a notebook, that of its cells."""
    text = page.read_text(encoding="utf-8")
    if page.suffix != ".ipynb":
        return text
    return "\n\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"] if cell["cell_type"] == "markdown")


def blocks(page: Path, language: str) -> list[str]:
    """The blocks of code of a page that are marked with a language."""
    return [body for marked, body in FENCE.findall(text_of(page)) if marked == language]


def links(page: Path) -> list[tuple[str, str, str]]:
    """Of each link or picture of a page: "!" for a picture, its words, and where it leads."""
    return LINK.findall(FENCE.sub("", text_of(page)))


def anchors(page: Path) -> set[str]:
    """The anchors of the headings of a page."""
    headings = HEADING.findall(FENCE.sub("", text_of(page)))
    words = (re.sub(r"[^\w\s-]", "", heading).strip().lower() for heading in headings)
    return {re.sub(r"\s+", "-", each) for each in words}


def calls(block: str) -> list[list[str]]:
    """The calls of timm-nrpm in a block of commands, as lists of arguments, without their comments."""
    lines = block.replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("timm-nrpm ")]


def sessions(block: str) -> list[tuple[str, list[str]]]:
    """Each command of a block that shows what commands print, and the lines that it prints there."""
    parts = re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]
    return [(command, printed.splitlines()) for command, _, printed in (part.partition("\n") for part in parts)]


def alike(shown: str, printed: str, tolerance: float) -> bool:
    """Whether two lines have the same words and like numbers.

    A number with three decimals, such as a lambda, is a share: of these, `tolerance` is in the unit of a point.
    """
    for pattern, word in CHANCE:
        shown, printed = re.sub(pattern, word, shown), re.sub(pattern, word, printed)
    if words_of(shown) != words_of(printed):
        return False
    return all(
        abs(float(a.replace(",", "")) - float(b.replace(",", ""))) <= tolerance / (20 if SHARE.fullmatch(a) else 1)
        for a, b in zip(NUMBER.findall(shown), NUMBER.findall(printed), strict=True)
    )


def words_of(line: str) -> list[str]:
    """The words of a line, with a 0 in the place of each number."""
    return NUMBER.sub("0", line).split()


def missing(shown: list[str], printed: list[str], tolerance: float = 3.0) -> list[str]:
    """The lines of a page that a command did not print, in this order. Others may be printed between them."""
    start, absent = 0, []
    for line in filter(str.strip, shown):
        found = next((i for i in range(start, len(printed)) if alike(line, printed[i], tolerance)), None)
        if found is None:
            absent.append(line)
        else:
            start = found + 1
    return absent
