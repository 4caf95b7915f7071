"""One HTML file for reports: the verdict, flags, how to read it, and then every attack and every image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from types import MappingProxyType

from jinja2 import Environment, StrictUndefined, Template

from timm_nrpm.attacks.glossary import explained
from timm_nrpm.evaluation.report import SIGNIFICANT, RobustnessReport
from timm_nrpm.figures.fates import cell_colours, strip_of
from timm_nrpm.figures.flagged import not_raised, raised_in
from timm_nrpm.figures.guide import next_steps
from timm_nrpm.figures.illustrations import Illustration, curves_of, embedded, kept_under
from timm_nrpm.figures.robustness import SOURCES, control_of, tried_all
from timm_nrpm.version import __version__

ASSETS = files("timm_nrpm") / "assets"
"""The folder of `page.html`, the template of the page, and of `page.css`, its style."""


def write_page(
    reports: RobustnessReport | Sequence[RobustnessReport],
    path: str | Path,
    *,
    title: str,
    pictures: Mapping[str, Path | Illustration] = MappingProxyType({}),
) -> Path:
    """Write one HTML file that shows reports: the verdict, flags, how to read it, every attack and every image.

    The file is complete in itself: it loads nothing from elsewhere, and runs no script. Reports on one model at several
    eps are drawn as a curve as well, if Matplotlib is installed. The file holds each report as JSON, in elements
    `<script id="report-1">` and so on, which :meth:`RobustnessReport.from_json` reads back.

    Args:
        reports: One report, or several, which are shown in this order.
        path: The file to write, which ends in .html or .htm.
        title: Title of the page.
        pictures: More pictures to embed, by their captions: a path, whose alternative text is the caption, or an
            :class:`timm_nrpm.illustrations.Illustration`, which has a better one and a table.

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
    raised = [raised_in(flag, named) for flag in dict.fromkeys(flag for report in every for flag in report.flags)]
    controls = [report.control for report in every if report.control is not None]
    page = _template().render(
        title=title,
        version=__version__,
        style=(ASSETS / "page.css").read_text(encoding="utf-8") + cell_colours(),
        named=named,
        level=3 if len(named) == 1 else 4,
        called=kept_under(every),
        raised=raised,
        calm=not_raised(every),
        plain_flags=sorted({flag for control in controls for flag in control.flags}),
        pictures=[embedded(_illustration(shown, words), words) for words, shown in pictures.items()],
        curves=curves_of(every),
        # A "<" could end the script element. In JSON it occurs in strings alone, where the escape means the same.
        data=[report.to_json().replace("<", "\\u003c") for report in every],
        strip_of=strip_of,
        settings_of=_settings,
        tried_all=tried_all,
        control_of=control_of,
        explained=explained,
        next_steps=next_steps(every),
        beside=list(dict.fromkeys(control_of(report) for report in every if report.control is not None)),
        significant=SIGNIFICANT,
        with_classes=any(report.by_class is not None for report in every),
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


def _whose(source: str) -> str:
    """The source of a gradient in words, for the column "whose gradient"."""
    return SOURCES.get(source, (source, ""))[0].removesuffix(" gradient")


def _illustration(shown: Path | Illustration, caption: str) -> Illustration:
    return shown if isinstance(shown, Illustration) else Illustration(shown, caption)


def _settings(report: RobustnessReport) -> dict[str, str]:
    """The settings of an evaluation by name, as text."""
    rows = {"threat": f"{report.threat.norm}, eps {report.threat.eps:.6g} ({_threat(report)})", "suite": report.suite}
    rows |= {"steps of an ascent": str(report.steps), "queries of a search": str(report.queries)}
    rows |= {"seed": str(report.seed), "images": str(report.samples), "seconds": f"{report.seconds:.1f}"}
    rows |= {f"version of {name}": str(number) for name, number in report.versions.items()}
    return {**rows, "sha256 of the model": report.sha256 or "not recorded"}
