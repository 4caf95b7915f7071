"""The fate of every image as a page shows it: a strip with a cell for each image, and the colours of the cells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from timm_nrpm.evaluation.report import RobustnessReport
from timm_nrpm.figures.robustness import SOURCES, control_of

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class Cell:
    """A cell of a strip, which shows the fate of one image.

    Attributes:
        look: CSS class of the cell.
        letter: The character shown in the cell.
        name: Name of the fate in the table below the strip.
        words: The fate in words, for the tooltip.
        source: Source of the gradient that the attack which broke the image followed; empty if none broke it.
    """

    look: str
    letter: str
    name: str
    words: str
    source: str = ""


@dataclass(frozen=True)
class Strip:
    """The fate of every image, by the name of the model, and the cell that shows each fate."""

    fates: Mapping[str, Sequence[str]]
    cells: Mapping[str, Cell]


def _fates(report: RobustnessReport) -> list[str]:
    """The fate of each image: `"wrong"` (when clean), `"survived"`, or the name of the attack that broke it first."""
    fates = []
    for i, right in enumerate(report.correct):
        broken = (attack.name for attack in report.attacks if attack.survived[i] is False)
        fates.append(next(broken, "survived") if right else "wrong")
    return fates


def strip_of(report: RobustnessReport) -> Strip:
    """The fates of the images under the model and under the plain model, and the cell that shows each fate."""
    models = {"This model": report} | (
        {} if report.control is None else {control_of(report).capitalize(): report.control}
    )
    fates = {name: _fates(model) for name, model in models.items()}
    sources = {attack.name: attack.source for model in models.values() for attack in model.attacks}
    breaking = [name for name in sources if any(name in each for each in fates.values())]
    cells = {
        "wrong": Cell("wrong", "\u00d7", "wrong when clean", "wrong when clean"),
        "survived": Cell("survived", "\u00a0", "survived every attack", "survived every attack"),
    }
    for i, name in enumerate(breaking):
        source = sources[name] if sources[name] in SOURCES else "other"
        letter = LETTERS[i] if i < len(LETTERS) else "*"
        cells[name] = Cell(f"from-{source}", letter, name, f"broken first by {name}", sources[name])
    return Strip(fates, cells)


def cell_colours() -> str:
    """CSS rules for the sources of attacks, with letters in black or white, whichever is easier to read."""
    rules = ""
    for name, colour in {**{name: colour for name, (_, colour) in SOURCES.items()}, "other": "#767676"}.items():
        rules += f".from-{name} {{ background: {colour}; color: {_readable_on(colour)}; }}\n"
    return rules


def _readable_on(colour: str) -> str:
    """Black or white, whichever is easier to read on a colour `#rrggbb`."""
    red, green, blue = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    luminance = 0.2126 * red**2.2 + 0.7152 * green**2.2 + 0.0722 * blue**2.2
    return "#000000" if luminance > 0.18 else "#ffffff"
