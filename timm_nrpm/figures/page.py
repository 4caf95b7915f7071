"""One HTML file that shows evaluations to people: flags first, then the worst case, then everything behind it.

It needs no script and nothing from elsewhere, and carries the reports as JSON.
"""

from __future__ import annotations

import base64
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from types import MappingProxyType

from timm_nrpm.attacks.flags import MEANINGS, NON_FINITE, NUMBERS, RANDOM, THRESHOLDS
from timm_nrpm.evaluation.report import RobustnessReport
from timm_nrpm.figures.robustness import SOURCES, draw_curves, tried_all
from timm_nrpm.version import __version__

STYLE = files("timm_nrpm") / "assets" / "page.css"

PLAIN_NUMBERS = (NON_FINITE, RANDOM)
"""Flags whose number is no share."""

READING = (
    "Believe the worst case. An attack that follows the model's own gradient finds what is weak only where that "
    "gradient points to it. The gradient of a reprogrammed model is steep and erratic, which stops an attacker who "
    "follows it and nobody else: one who follows the plain model, the linear maps or a smoother surrogate, or who "
    "searches without any gradient, still gets through. So the accuracy under the own gradient may be far above the "
    "worst case, and says little about robustness. The worst case counts an image as right if none of the attacks "
    "broke it; a stronger one could only lower it. Compare it with the plain model's on the same images: where their "
    "intervals overlap widely, reprogramming has not been shown to help."
)

ORDER_NOTE = (
    '<p class="quiet">In the order in which they were tried. A pale bar is an attack that tried the images alone that '
    "were still right: its accuracy is what it and all above it leave together.</p>"
)

STRIP_NOTE = (
    '<p class="quiet">One cell for each image, in the order of the data, ten to a group. The letter and the colour say '
    "which attack broke it first, in the order of the table above.</p>"
)

ENDINGS = {".png": "png", ".svg": "svg+xml", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp", ".gif": "gif"}
"""Of pictures, and what browsers call them."""

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"

ABSENT = "&ndash;"


def write_page(
    reports: RobustnessReport | Sequence[RobustnessReport],
    path: str | Path,
    *,
    title: str,
    pictures: Mapping[str, Path] = MappingProxyType({}),
) -> Path:
    """Write one HTML file that shows reports: flags, worst case, every attack, every image, and how to read it.

    It can be sent, printed and kept as it is: nothing in it comes from elsewhere, and no script runs. Reports of one
    model at several eps are drawn as a curve too, if Matplotlib is installed. Each report is in it as JSON, in the
    script `report-1` and so on, which :meth:`RobustnessReport.from_json` reads back.

    Args:
        reports: One or several, shown in this order.
        path: Ends in .html or .htm.
        title: At the top.
        pictures: More to embed, by what they show.

    Returns:
        `path`.

    Raises:
        ValueError: Another ending, no reports, or a picture of a kind that browsers do not show.

    Example:
        >>> report = evaluate(model, loader, Threat("Linf", 8 / 255))
        >>> write_page(report, "report.html", title="resnet18 at lambda 0.8")
    """
    every = [reports] if isinstance(reports, RobustnessReport) else list(reports)
    if not every:
        raise ValueError("There are no reports to show: give one, or several in a list.")
    target = Path(path)
    if target.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"path={str(path)!r} must end in .html.")
    shown = [_picture(picture, said, said) for said, picture in pictures.items()]
    named = _named(every)
    sections = [
        _flags(named),
        _section(_called(every), _headline(named)),
        _section("Attacks", ORDER_NOTE + _each(named, _attacks)),
        _curves(every),
        _section("Image by image", STRIP_NOTE + _each(named, _strip)),
        _section("Pictures", "".join(shown)) if shown else "",
        _section("Settings", _each(named, _settings)),
        _section("How to read this", f"<p>{READING}</p>"),
    ]
    data = ""
    for i, report in enumerate(every, 1):
        # In a script "<" could end it or confuse a reader; in JSON it is only ever inside a string.
        safe = report.to_json().replace("<", "\\u003c")
        data += f'<script type="application/json" id="report-{i}">{safe}</script>\n'
    content = "\n".join(section for section in sections if section)
    style = STYLE.read_text(encoding="utf-8") + _colours()
    parts = {"title": escape(title), "style": style, "version": escape(__version__)}
    target.write_text(PAGE.format(**parts, content=content, data=data), encoding="utf-8")
    return target


def _named(reports: Sequence[RobustnessReport]) -> dict[str, RobustnessReport]:
    """By a heading that tells each from the others."""
    said = [f"{_threat(report)}, {report.suite}" for report in reports]
    both = enumerate(zip(said, reports, strict=True), 1)
    return {(name if said.count(name) == 1 else f"{i}. {name}"): report for i, (name, report) in both}


def _threat(report: RobustnessReport) -> str:
    """With the bound in 255ths where it is a small whole number of them."""
    steps = 255 * report.threat.eps
    whole = report.threat.norm == "Linf" and steps < 33 and abs(steps - round(steps)) < 1e-6
    return f"Linf {round(steps)}/255" if whole else str(report.threat)


def _each(named: Mapping[str, RobustnessReport], show: Callable[[RobustnessReport], str]) -> str:
    """Every report shown, under its heading if there are several."""
    if len(named) == 1:
        return show(*named.values())
    return "".join(f"<h3>{escape(name)}</h3>{show(report)}" for name, report in named.items())


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _interval(report: RobustnessReport) -> str:
    low, high = report.interval()
    return f"95 %: {_percent(low)} to {_percent(high)}"


def _section(heading: str, content: str) -> str:
    return f"<section><h2>{heading}</h2>\n{content}</section>\n"


def _table(caption: str, heads: Sequence[str], rows: Iterable[str], foot: str = "", look: str = "") -> str:
    """Rows of `_row`, in a box that scrolls by itself where it is too narrow for them."""
    head = "".join(f'<th scope="col">{text}</th>' for text in heads)
    foot = f"<tfoot>{foot}</tfoot>" if foot else ""
    return (
        f'<div class="wide{look}" role="region" tabindex="0" aria-label="{escape(caption)}"><table>'
        f"<caption>{escape(caption)}</caption>\n<thead><tr>{head}</tr></thead>\n"
        f"<tbody>\n{''.join(rows)}</tbody>{foot}</table></div>\n"
    )


def _row(head: str, *cells: str) -> str:
    """The cells are HTML already, `<td>` or what belongs in one."""
    tags = "".join(cell if cell.startswith("<td") else f"<td>{cell}</td>" for cell in cells)
    return f'<tr><th scope="row">{head}</th>{tags}</tr>\n'


def _flags(named: Mapping[str, RobustnessReport]) -> str:
    """Those that are raised, each on its own, then the others in short."""
    raised = dict.fromkeys(flag for report in named.values() for flag in report.flags)
    cards = []
    for flag in raised:
        meaning = escape(MEANINGS.get(flag, "This version does not know it."))
        numbers = [
            _number(flag, report, f"{name}: " if len(named) > 1 else "")
            for name, report in named.items()
            if flag in report.flags
        ]
        cards.append(
            f'<article class="flag"><h3>Flag: <code>{escape(flag)}</code></h3><p>{meaning}</p>'
            f"<ul>{''.join(numbers)}</ul></article>\n"
        )
    if not raised:
        cards = ["<p>No flag is raised. That rules out what was checked, and nothing else.</p>"]
    calm = []
    for flag in (flag for flag in THRESHOLDS if flag not in raised):
        values = [report.evidence[flag] for report in named.values() if flag in report.evidence]
        number = (
            " to ".join(dict.fromkeys(_value(flag, end(values)) for end in (min, max))) if values else "not checked"
        )
        calm.append(_row(f"<code>{flag}</code>", number, _value(flag, THRESHOLDS[flag]), NUMBERS[flag]))
    if calm:
        heads = ("flag", "number", "raised above", "of what")
        cards.append(_table("Flags that are not raised", heads, calm, look=" words"))
    plain = {flag for report in named.values() if report.control is not None for flag in report.control.flags}
    if plain:
        said = ", ".join(f"<code>{escape(flag)}</code>" for flag in sorted(plain))
        cards.append(f"<p>Of the plain model, under the same attacks: {said}.</p>")
    return f'<section id="flags"><h2>Flags</h2>\n{"".join(cards)}</section>\n'


def _number(flag: str, report: RobustnessReport, name: str) -> str:
    """Its number against its threshold."""
    if flag not in report.evidence or flag not in THRESHOLDS:
        return f"<li>{escape(name)}its number is not in the report</li>"
    value, above = (_value(flag, number) for number in (report.evidence[flag], THRESHOLDS[flag]))
    return f"<li>{escape(name)}<strong>{value}</strong> ({NUMBERS[flag]}), raised above <strong>{above}</strong></li>"


def _value(flag: str, number: float) -> str:
    return f"{number:.2g}" if flag in PLAIN_NUMBERS else f"{_percent(number)} %"


def _called(reports: Iterable[RobustnessReport]) -> str:
    """What the share that survived is called, the worst case only where every suite was the adaptive one."""
    return "Worst case" if all(report.suite == "adaptive" for report in reports) else "All attacks"


def _headline(named: Mapping[str, RobustnessReport]) -> str:
    if len(named) > 1:
        heads = (
            "threat",
            f"{_called(named.values()).lower()}, %",
            "plain model's, %",
            "clean, %",
            "plain model's, %",
            "images",
            "flags",
        )
        rows = []
        for name, report in named.items():
            both = (report, report.control)
            worst = (
                ABSENT if r is None else f"<strong>{_percent(r.worst_case)}</strong> ({_interval(r)})" for r in both
            )
            clean = (ABSENT if r is None else _percent(r.accuracy()) for r in both)
            rows.append(
                _row(escape(name), *worst, *clean, str(report.samples), escape(", ".join(report.flags)) or "none")
            )
        told = "".join(f'<p class="verdict">{escape(report.verdict)}</p>' for report in named.values())
        return told + _table("Share that no attack broke, beside the plain model's", heads, rows)
    (report,) = named.values()
    cards = ""
    for name, each in (("This model", report), ("Plain model, same attacks", report.control)):
        if each is not None:
            flagged = f' <span class="tag">flagged: {escape(", ".join(each.flags))}</span>' if each.flags else ""
            cards += (
                f'<div class="card"><p>{name}</p><p class="big">{_percent(each.worst_case)} %</p>'
                f"<p>{_interval(each)}</p><p>clean {_percent(each.accuracy())} %{flagged}</p></div>"
            )
    under = f"{report.samples} images, {_threat(report)}, suite &ldquo;{escape(report.suite)}&rdquo;."
    said = f'<p class="verdict">{escape(report.verdict)}</p>'
    return f'{said}<p>Share of the images that no attack broke. {under}</p><div class="cards">{cards}</div>'


def _attacks(report: RobustnessReport) -> str:
    """Every attack, the clean accuracy before and the worst case after them."""
    control = report.control
    beside = (
        {} if control is None else {attack.name: _percent(control.accuracy(attack.name)) for attack in control.attacks}
    )
    clean, worst = (ABSENT, ABSENT) if control is None else (_percent(control.accuracy()), _percent(control.worst_case))
    rows = [_row("clean", "", _bar(report.accuracy()), clean, *[""] * 5)]
    for attack in report.attacks:
        counts = (f"{n:,}" for n in (attack.tried, attack.broke, attack.forwards, attack.backwards))
        accuracy = _bar(report.accuracy(attack.name), "" if tried_all(report, attack) else " pale")
        whose = _whose(attack.source)
        cells = (accuracy, beside.get(attack.name, ABSENT), *counts, f"{attack.seconds:.1f}")
        rows.append(_row(escape(attack.name), whose, *cells))
    foot = _row(
        escape(report.name),
        "image by image",
        _bar(report.worst_case),
        worst,
        f'<td colspan="5">{_interval(report)}</td>',
    )
    heads = ["attack", "whose gradient", "accuracy left, %", "plain model's, %", "images tried", "broken"]
    heads += ["forward passes", "backward passes", "seconds"]
    caption = f"{len(report.attacks)} attacks on {report.samples} images, {_threat(report)}"
    return _table(caption, heads, rows, foot)


def _bar(share: float, look: str = "") -> str:
    return f'<td class="share{look}" style="--share:{_percent(share)}%">{_percent(share)}</td>'


def _whose(source: str) -> str:
    return escape(SOURCES.get(source, (source, ""))[0].removesuffix(" gradient"))


def _curves(reports: Sequence[RobustnessReport]) -> str:
    """A curve for every model and norm of which there are reports at several eps, each once."""
    groups: dict[tuple[str, str, int], list[RobustnessReport]] = {}
    for report in reports:
        groups.setdefault((report.threat.norm, report.sha256, report.samples), []).append(report)
    shown = ""
    for (norm, *_), group in groups.items():
        if len(group) < 2 or len({report.threat.eps for report in group}) < len(group):
            continue
        group.sort(key=lambda report: report.threat.eps)
        said = _called(group).lower()
        told = ", ".join(f"{_percent(report.worst_case)} % at {report.threat.eps:.3g}" for report in group)
        alt = f"Curve of accuracy over eps under {norm}; {said} {_percent(group[0].accuracy())} % at 0, {told}."
        with tempfile.TemporaryDirectory() as folder:
            try:
                drawn = draw_curves(group, Path(folder) / "curves.svg")
                shown += _picture(drawn, alt, f"Accuracy over eps under {norm}: own gradient, other attacks, {said}.")
            except ImportError as error:
                shown += f"<p>{escape(alt)} {escape(str(error))}</p>"
    return _section("Curves", shown) if shown else ""


def _picture(path: str | Path, alt: str, caption: str) -> str:
    """As an image with its bytes in it: a picture's own scripts and links then do nothing."""
    kind = ENDINGS.get(Path(path).suffix.lower())
    if kind is None:
        raise ValueError(f"The picture {str(path)!r} must end in one of {', '.join(ENDINGS)}.")
    data = base64.b64encode(Path(path).read_bytes()).decode("ascii")
    image = f'<img alt="{escape(alt)}" src="data:image/{kind};base64,{data}">'
    return f'<figure><div class="paper">{image}</div><figcaption>{escape(caption)}</figcaption></figure>\n'


def _fates(report: RobustnessReport) -> list[str]:
    """For each image `"wrong"`, `"survived"`, or the attack that broke it first."""
    fates = []
    for i, right in enumerate(report.correct):
        broken = (attack.name for attack in report.attacks if attack.survived[i] is False)
        fates.append(next(broken, "survived") if right else "wrong")
    return fates


def _strip(report: RobustnessReport) -> str:
    """A row of cells for the model, one for the plain model, and what the letters mean."""
    models = {"This model": report} | ({} if report.control is None else {"Plain model": report.control})
    fates = {name: _fates(model) for name, model in models.items()}
    sources = {attack.name: attack.source for model in models.values() for attack in model.attacks}
    hit = [name for name in sources if any(name in each for each in fates.values())]
    cells = {"wrong": ("wrong", "&times;"), "survived": ("survived", "&nbsp;")}
    for i, name in enumerate(hit):
        source = sources[name] if sources[name] in SOURCES else "other"
        cells[name] = (f"from-{source}", LETTERS[i] if i < len(LETTERS) else "*")
    words = {"wrong": "wrong when clean", "survived": "survived every attack"}
    strips = ""
    for name, each in fates.items():
        marks = ""
        for i, fate in enumerate(each, 1):
            look, letter = cells[fate]
            said = words.get(fate, f"broken first by {fate}")
            marks += f'<i class="{look}" title="image {i}: {escape(said)}">{letter}</i>'
        told = f"{name}: of {len(each)} images {each.count('survived')} survived every attack and "
        told += f"{each.count('wrong')} were wrong when clean; the table that follows counts the others."
        strips += f'<h4>{name}</h4><div class="strip" role="img" aria-label="{told}">{marks}</div>\n'
    rows = []
    for fate, (look, letter) in cells.items():
        cell = f'<span class="strip"><i class="{look}" aria-hidden="true">{letter}</i></span>'
        counts = (str(each.count(fate)) for each in fates.values())
        rows.append(_row(f"{cell} {escape(words.get(fate, fate))}", _whose(sources.get(fate, "")), *counts))
    return strips + _table("What became of the images", ("falls first to", "whose gradient", *fates), rows)


def _settings(report: RobustnessReport) -> str:
    rows = {"threat": f"{report.threat.norm}, eps {report.threat.eps:.6g} ({_threat(report)})", "suite": report.suite}
    rows |= {"steps of an ascent": str(report.steps), "queries of a search": str(report.queries)}
    rows |= {"seed": str(report.seed), "images": str(report.samples), "seconds": f"{report.seconds:.1f}"}
    rows |= {f"version of {name}": number for name, number in report.versions.items()}
    rows["sha256 of the model"] = report.sha256 or "not recorded"
    told = "".join(f"<li>{escape(warning)}</li>" for warning in report.warnings)
    heads = ("setting", "value")
    lines = (_row(escape(name), escape(str(value))) for name, value in rows.items())
    table = _table(f"What was run, {_threat(report)}", heads, lines, look=" words")
    warned = f'<ul class="warnings">{told}</ul>' if told else "<p>None.</p>"
    return table + f"<h4>Warnings</h4>{warned}"


def _colours() -> str:
    """Of the sources of attacks, with letters in black or white, whichever is easier to read."""
    rules = ""
    for name, colour in {**{name: colour for name, (_, colour) in SOURCES.items()}, "other": "#767676"}.items():
        rules += f".from-{name} {{ background: {colour}; color: {_readable_on(colour)}; }}\n"
    return rules


def _readable_on(colour: str) -> str:
    red, green, blue = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    luminance = 0.2126 * red**2.2 + 0.7152 * green**2.2 + 0.0722 * blue**2.2
    return "#000000" if luminance > 0.18 else "#ffffff"


PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<meta name="generator" content="timm_nrpm {version}">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<header><h1>{title}</h1></header>
<main>
{content}</main>
<footer>Written by timm_nrpm {version}. The reports are in this file as JSON.</footer>
{data}</body>
</html>
"""
