"""One HTML file for reports: flags first, then the worst case, every attack, every image, and how to read it."""

from __future__ import annotations

import base64
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from types import MappingProxyType

from jinja2 import Environment, StrictUndefined, Template

from timm_nrpm.attacks.flags import MEANINGS, NON_FINITE, NUMBERS, RANDOM, THRESHOLDS
from timm_nrpm.evaluation.report import RobustnessReport
from timm_nrpm.figures.robustness import SOURCES, draw_curves, tried_all
from timm_nrpm.version import __version__

ASSETS = files("timm_nrpm") / "assets"
"""The folder of `page.html`, the template of the page, and of `page.css`, its style."""

PLAIN_NUMBERS = (NON_FINITE, RANDOM)
"""Flags whose number is shown as it is; the numbers of the other flags are shown in percent."""

ENDINGS = {".png": "png", ".svg": "svg+xml", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp", ".gif": "gif"}
"""Kinds of pictures that browsers show: their media subtype by the ending of the file."""

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class Picture:
    """A picture of the page.

    Attributes:
        alt: Description for readers who do not see the picture.
        caption: Text below the picture, or the reason why it could not be drawn.
        source: The picture itself as a `data:` URL, whose scripts and links do nothing; empty if it was not drawn.
    """

    alt: str
    caption: str
    source: str = ""


@dataclass(frozen=True)
class Number:
    """The number behind a flag.

    Attributes:
        flag: Name of the flag.
        value: The number as text; empty if the report has none.
        above: The threshold above which the flag is raised, as text.
        of: What the number counts.
        report: Heading of the report that the number comes from, followed by a colon; empty if there is one report.
    """

    flag: str
    value: str
    above: str
    of: str
    report: str = ""


@dataclass(frozen=True)
class Flag:
    """A raised flag, its meaning, and its number in every report that raises it."""

    name: str
    meaning: str
    numbers: Sequence[Number]


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


def write_page(
    reports: RobustnessReport | Sequence[RobustnessReport],
    path: str | Path,
    *,
    title: str,
    pictures: Mapping[str, Path] = MappingProxyType({}),
) -> Path:
    """Write one HTML file that shows reports: flags, worst case, every attack, every image, and how to read it.

    The file is complete in itself: it loads nothing from elsewhere, and runs no script. Reports on one model at several
    eps are drawn as a curve as well, if Matplotlib is installed. The file holds each report as JSON, in elements
    `<script id="report-1">` and so on, which :meth:`RobustnessReport.from_json` reads back.

    Args:
        reports: One report, or several, which are shown in this order.
        path: The file to write, which ends in .html or .htm.
        title: Title of the page.
        pictures: Paths of more pictures to embed, by their captions.

    Returns:
        `path`.

    Raises:
        ValueError: `path` has another ending, there are no reports, or browsers do not show that kind of picture.

    Example:
        >>> report = evaluate(model, loader, Threat("Linf", 8 / 255), effort="fast")
        >>> write_page(report, "report.html", title="resnet8_digits at lambda 0.5")
        PosixPath('report.html')
    """
    every = [reports] if isinstance(reports, RobustnessReport) else list(reports)
    if not every:
        raise ValueError("There are no reports to show: give one, or several in a list.")
    target = Path(path)
    if target.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"path={str(path)!r} must end in .html.")
    named = _named(every)
    raised = [_raised(flag, named) for flag in dict.fromkeys(flag for report in every for flag in report.flags)]
    controls = [report.control for report in every if report.control is not None]
    page = _template().render(
        title=title,
        version=__version__,
        style=(ASSETS / "page.css").read_text(encoding="utf-8") + _colours(),
        named=named,
        called=_called(every),
        raised=raised,
        calm=_calm(every),
        plain_flags=sorted({flag for control in controls for flag in control.flags}),
        pictures=[_picture(picture, words, words) for words, picture in pictures.items()],
        curves=_curves(every),
        # A "<" could end the script element. In JSON it occurs in strings alone, where the escape means the same.
        data=[report.to_json().replace("<", "\\u003c") for report in every],
        strip_of=_strip,
        settings_of=_settings,
        tried_all=tried_all,
    )
    target.write_text(page, encoding="utf-8")
    return target


@cache
def _template() -> Template:
    """The template of the page, which escapes every value that it does not mark as safe."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(percent=_percent, interval=_interval, threat=_threat, whose=_whose)
    return environment.from_string((ASSETS / "page.html").read_text(encoding="utf-8"))


def _named(reports: Sequence[RobustnessReport]) -> dict[str, RobustnessReport]:
    """Reports by a heading that tells each from the others."""
    headings = [f"{_threat(report)}, {report.suite}" for report in reports]
    numbered = enumerate(zip(headings, reports, strict=True), 1)
    return {(name if headings.count(name) == 1 else f"{i}. {name}"): report for i, (name, report) in numbered}


def _threat(report: RobustnessReport) -> str:
    """The threat in words, with eps in 255ths where it is a small whole number of them."""
    steps = 255 * report.threat.eps
    whole = report.threat.norm == "Linf" and steps < 33 and abs(steps - round(steps)) < 1e-6
    return f"Linf {round(steps)}/255" if whole else str(report.threat)


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _interval(report: RobustnessReport) -> str:
    low, high = report.interval()
    return f"95 %: {_percent(low)} to {_percent(high)}"


def _raised(flag: str, named: Mapping[str, RobustnessReport]) -> Flag:
    """A flag with its number in every report that raises it."""
    numbers = []
    for name, report in named.items():
        if flag in report.flags:
            known = flag in report.evidence and flag in THRESHOLDS
            value, above = (_value(flag, n) for n in (report.evidence[flag], THRESHOLDS[flag])) if known else ("", "")
            numbers.append(Number(flag, value, above, NUMBERS.get(flag, ""), f"{name}: " if len(named) > 1 else ""))
    return Flag(flag, MEANINGS.get(flag, "This version of timm_nrpm does not know this flag."), numbers)


def _calm(reports: Sequence[RobustnessReport]) -> list[Number]:
    """Flags that no report raises, each with the range of its numbers."""
    raised = {flag for report in reports for flag in report.flags}
    numbers = []
    for flag in (flag for flag in THRESHOLDS if flag not in raised):
        values = [report.evidence[flag] for report in reports if flag in report.evidence]
        ends = dict.fromkeys(_value(flag, end(values)) for end in (min, max)) if values else {}
        numbers.append(Number(flag, " to ".join(ends), _value(flag, THRESHOLDS[flag]), NUMBERS[flag]))
    return numbers


def _value(flag: str, number: float) -> str:
    return f"{number:.2g}" if flag in PLAIN_NUMBERS else f"{_percent(number)} %"


def _called(reports: Iterable[RobustnessReport]) -> str:
    """The heading for the share of images that survived: the worst case only where every suite was adaptive."""
    return "Worst case" if all(report.suite == "adaptive" for report in reports) else "All attacks"


def _whose(source: str) -> str:
    """The source of a gradient in words, for the column "whose gradient"."""
    return SOURCES.get(source, (source, ""))[0].removesuffix(" gradient")


def _curves(reports: Sequence[RobustnessReport]) -> list[Picture]:
    """A curve for every model and norm whose reports are at several eps, with one report for each eps."""
    groups: dict[tuple[str, str, int], list[RobustnessReport]] = {}
    for report in reports:
        groups.setdefault((report.threat.norm, report.sha256, report.samples), []).append(report)
    curves = []
    for (norm, *_), group in groups.items():
        if len(group) < 2 or len({report.threat.eps for report in group}) < len(group):
            continue
        group.sort(key=lambda report: report.threat.eps)
        called = _called(group).lower()
        points = ", ".join(f"{_percent(report.worst_case)} % at {report.threat.eps:.3g}" for report in group)
        alt = f"Curve of accuracy over eps under {norm}; {called} {_percent(group[0].accuracy())} % at 0, {points}."
        with tempfile.TemporaryDirectory() as folder:
            try:
                drawn = draw_curves(group, Path(folder) / "curves.svg")
                caption = f"Accuracy over eps under {norm}: own gradient, other attacks, {called}."
                curves.append(_picture(drawn, alt, caption))
            except ImportError as error:
                curves.append(Picture(alt, str(error)))
    return curves


def _picture(path: str | Path, alt: str, caption: str) -> Picture:
    kind = ENDINGS.get(Path(path).suffix.lower())
    if kind is None:
        raise ValueError(f"The picture {str(path)!r} must end in one of {', '.join(ENDINGS)}.")
    data = base64.b64encode(Path(path).read_bytes()).decode("ascii")
    return Picture(alt, caption, f"data:image/{kind};base64,{data}")


def _fates(report: RobustnessReport) -> list[str]:
    """The fate of each image: `"wrong"` (when clean), `"survived"`, or the name of the attack that broke it first."""
    fates = []
    for i, right in enumerate(report.correct):
        broken = (attack.name for attack in report.attacks if attack.survived[i] is False)
        fates.append(next(broken, "survived") if right else "wrong")
    return fates


def _strip(report: RobustnessReport) -> Strip:
    """The fates of the images under the model and under the plain model, and the cell that shows each fate."""
    models = {"This model": report} | ({} if report.control is None else {"Plain model": report.control})
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


def _settings(report: RobustnessReport) -> dict[str, str]:
    """The settings of an evaluation by name, as text."""
    rows = {"threat": f"{report.threat.norm}, eps {report.threat.eps:.6g} ({_threat(report)})", "suite": report.suite}
    rows |= {"steps of an ascent": str(report.steps), "queries of a search": str(report.queries)}
    rows |= {"seed": str(report.seed), "images": str(report.samples), "seconds": f"{report.seconds:.1f}"}
    rows |= {f"version of {name}": str(number) for name, number in report.versions.items()}
    return {**rows, "sha256 of the model": report.sha256 or "not recorded"}


def _colours() -> str:
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
