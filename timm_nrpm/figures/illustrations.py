"""Pictures as a page shows them: inside the page itself, described with their numbers, and with a table of these."""

from __future__ import annotations

import base64
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from timm_nrpm.evaluation.report import RobustnessReport
from timm_nrpm.figures.robustness import compared, control_of, draw_curves

ENDINGS = {".png": "png", ".svg": "svg+xml", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp", ".gif": "gif"}
"""Kinds of pictures that browsers show: their media subtype by the ending of the file."""


@dataclass(frozen=True)
class Numbers:
    """A table of the numbers that a picture shows.

    Attributes:
        heads: Titles of the columns.
        rows: Texts of the cells, row by row, as many as there are titles.
    """

    heads: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Illustration:
    """A picture in a file, with what it shows in words.

    Attributes:
        path: The file, of a kind that browsers show.
        alt: Description with the numbers for readers who do not see the picture.
        numbers: Table of these numbers; None if the page has one elsewhere.
    """

    path: Path
    alt: str
    numbers: Numbers | None = None


@dataclass(frozen=True)
class Picture:
    """A picture of the page.

    Attributes:
        alt: Description for readers who do not see the picture.
        caption: Text below the picture, or the reason why it could not be drawn.
        source: The picture itself as a `data:` URL, whose scripts and links do nothing; empty if it was not drawn.
        numbers: Table of the numbers in the picture; None if there is none.
    """

    alt: str
    caption: str
    source: str = ""
    numbers: Numbers | None = field(default=None, repr=False)


def embedded(shown: Illustration, caption: str) -> Picture:
    """The picture with its file inside.

    Raises:
        ValueError: Browsers do not show that kind of file.
    """
    kind = ENDINGS.get(Path(shown.path).suffix.lower())
    if kind is None:
        raise ValueError(f"The picture {str(shown.path)!r} must end in one of {', '.join(ENDINGS)}.")
    data = base64.b64encode(Path(shown.path).read_bytes()).decode("ascii")
    return Picture(shown.alt, caption, f"data:image/{kind};base64,{data}", shown.numbers)


def attacks_in_words(report: RobustnessReport) -> str:
    """Return what :func:`draw_attacks` draws in words with its numbers, as an alternative text."""
    control = report.control
    known = {} if control is None else {attack.name: control.accuracy(attack.name) for attack in control.attacks}

    def words(name: str, share: float, beside: float | None) -> str:
        other = "" if beside is None else f" ({control_of(report)} {100 * beside:.1f})"
        return f"{name} {100 * share:.1f}{other}"

    bars = [words("clean", report.clean, None if control is None else control.clean)]
    bars += [words(attack.name, report.accuracy(attack.name), known.get(attack.name)) for attack in report.attacks]
    last = words(report.name, report.worst_case, None if control is None else control.worst_case)
    low, high = (100 * end for end in report.interval())
    return (
        f"Bars of the accuracy left, in %, on {report.samples} images under {report.threat}: {', '.join(bars)}; "
        f"{last}, with the 95 % interval {low:.1f} to {high:.1f}."
    )


def kept_under(reports: Iterable[RobustnessReport]) -> str:
    """The heading for the share of images that survived: the worst case only where every suite was adaptive."""
    return "Worst case" if all(report.suite == "adaptive" for report in reports) else "All attacks"


def curves_of(reports: Sequence[RobustnessReport]) -> list[Picture]:
    """A curve for every model and norm whose reports are at several eps, with one report for each eps."""
    groups: dict[tuple[str, str, int], list[RobustnessReport]] = {}
    for report in reports:
        groups.setdefault((report.threat.norm, report.sha256, report.samples), []).append(report)
    curves = []
    for (norm, *_), group in groups.items():
        if len(group) < 2 or len({report.threat.eps for report in group}) < len(group):
            continue
        group.sort(key=lambda report: report.threat.eps)
        called = kept_under(group).lower()
        points = ", ".join(f"{100 * report.worst_case:.1f} % at {report.threat.eps:.3g}" for report in group)
        alt = f"Curve of accuracy over eps under {norm}; {called} {100 * group[0].clean:.1f} % at 0, {points}."
        numbers = _along(group)
        with tempfile.TemporaryDirectory() as folder:
            try:
                shown = Illustration(draw_curves(group, Path(folder) / "curves.svg"), alt, numbers)
                curves.append(
                    embedded(shown, f"Accuracy over eps under {norm}: own gradient, other attacks, {called}.")
                )
            except ImportError as error:
                curves.append(Picture(alt, str(error), numbers=numbers))
    return curves


def _along(group: Sequence[RobustnessReport]) -> Numbers:
    """The numbers of a curve: a row for each eps, the smallest first, and a column for each line."""
    names = list(compared(group, len(group)))
    first = group[0]
    heads = [
        "eps",
        f"{kept_under(group).lower()}, %",
        "95 % interval",
        f"{control_of(first)}, %",
        *(f"{name}, %" for name in names),
    ]
    rows = []
    for eps, report in [(0.0, None), *((report.threat.eps, report) for report in group)]:
        of = first if report is None else report
        shares = (first.clean, None if first.control is None else first.control.clean)
        if report is not None:
            shares = (report.worst_case, None if report.control is None else report.control.worst_case)
        low, high = (f"{100 * end:.1f}" for end in of.interval(shares[0]))
        each = [100 * (first.clean if report is None else report.accuracy(name)) for name in names]
        beside = "\u2013" if shares[1] is None else f"{100 * shares[1]:.1f}"
        rows.append([f"{eps:.3g}", f"{100 * shares[0]:.1f}", f"{low} to {high}", beside, *(f"{n:.1f}" for n in each)])
    return Numbers(heads, rows)
