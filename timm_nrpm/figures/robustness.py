"""Pictures of evaluations: accuracy over eps, over lambda, and under each attack, beside the plain model's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from timm_nrpm.evaluation.report import NAMES, AttackResult, RobustnessReport
from timm_nrpm.figures import canvas

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SOURCES = {
    "own": ("own gradient", "#0072B2"),
    "bpda": ("linear maps' gradient", "#CC79A7"),
    "plain": ("plain model's gradient", "#009E73"),
    "base": ("another model's gradient", "#000000"),
    "soft": ("surrogate, ten times the eps", "#56B4E9"),
    "soft_short": ("surrogate, ten times the eps, one iteration", "#56B4E9"),
    "halfway": ("surrogate, lambda halfway", "#56B4E9"),
    "best": ("search from the worst points", "#F0E442"),
    "scores": ("scores alone", "#E69F00"),
}
"""The source of the gradient that an attack follows, in words, and its colour."""

CLEAN, WORST, CONTROL = "#767676", "#D55E00", "#000000"

MARKERS = "so^Dv*"
"""Markers of the thin lines; at most as many lines are drawn as there are markers."""

UNITS = {
    "Linf": "largest change of a pixel", "L2": "pixel units", "L1": "pixel units", "L0": "pixels",
    "patch": "side in pixels",
}  # fmt: skip


def draw_curves(reports: Sequence[RobustnessReport], path: str | Path) -> Path:
    """Draw accuracy over eps: the worst case in bold with its 95 % interval, that of the plain model dashed, and a thin
    line for each attack that tried every image in all reports.

    The other attacks try only the images that earlier attacks left, so they have no line of their own: together all
    attacks are the worst case.

    Args:
        reports: Reports on one model under one norm, one for each eps, in any order. The curves start from the clean
            accuracy at eps = 0.
        path: The file to write, which ends in .png or .svg.

    Returns:
        `path`.

    Raises:
        ValueError: `path` has another ending, there are no reports, or they do not belong on one curve.
        ImportError: Matplotlib is not installed.

    Example:
        >>> reports = [evaluate(model, loader, Threat("Linf", k / 255), effort="fast") for k in (8, 32)]
        >>> draw_curves(reports, "curves.svg")
        PosixPath('curves.svg')
    """
    target = canvas.target(path)
    at = _by_eps(reports)
    first = next(iter(at.values()))
    figure = canvas.figure(7.6, 4.6)
    panel = figure.subplots()
    _lines(panel, at, compared(list(at.values()), len(at)), zero=True)
    norm, bounds = first.threat.norm, [0.0, *at]
    fractions = norm == "Linf" and all(abs(255 * eps - round(255 * eps)) < 1e-6 for eps in bounds)
    if len(bounds) < 12:
        panel.set_xticks(bounds, [f"{round(255 * eps)}/255" if fractions and eps else f"{eps:.3g}" for eps in bounds])
    panel.set(xlabel=f"eps under {norm} ({UNITS[norm]})", ylabel="accuracy, %", ylim=(0, 102))
    panel.set_xlim(0, max(bounds) * 1.02)
    suites = " and ".join(dict.fromkeys(report.suite for report in at.values()))
    panel.set_title(f'Accuracy under attack, {first.samples} images, suite "{canvas.as_written(suites)}"', fontsize=11)
    _legend(figure, panel)
    return _save(figure, target)


def draw_lambda(reports: Mapping[str, Mapping[float, RobustnessReport]], path: str | Path, title: str) -> Path:
    """Draw accuracy over lambda, one panel for each key of `reports`: clean, under each attack that tried every image,
    and the worst case in bold with its 95 % interval. The plain model, lambda = 1, is on the left.

    Args:
        reports: Reports by heading and lambda, all under one threat.
        path: The file to write, which ends in .png or .svg.
        title: Title above all panels.

    Returns:
        `path`.

    Raises:
        ValueError: `path` has another ending, there are no reports, or they are under several threats.
        ImportError: Matplotlib is not installed.

    Example:
        >>> reports = {1.0: evaluate(plain, loader, suite="quick"), 0.5: evaluate(model, loader, suite="quick")}
        >>> draw_lambda({"calibrated": reports}, "lambda.png", "resnet8_digits, Linf 8/255")
        PosixPath('lambda.png')
    """
    target = canvas.target(path)
    every = [report for by_lam in reports.values() for report in by_lam.values()]
    if not every or not all(reports.values()):
        raise ValueError('There are no reports to draw: give {"heading": {1.0: report, 0.8: report}}.')
    threats = list(dict.fromkeys(str(report.threat) for report in every))
    if len(threats) > 1:
        raise ValueError(f"The reports are under {' and '.join(threats)}: give reports under one threat.")
    figure = canvas.figure(4.9 * len(reports) + 0.4, 4.9)
    panels = figure.subplots(1, len(reports), sharey=True, squeeze=False)[0]
    names = compared(every, min(2, len(every)))
    for panel, (heading, by_lam) in zip(panels, reports.items(), strict=True):
        at = {lam: by_lam[lam] for lam in sorted(by_lam, reverse=True)}
        clean = [100 * report.accuracy() for report in at.values()]
        panel.plot(list(at), clean, color=CLEAN, linestyle=":", marker="x", linewidth=1.5, label="clean")
        _lines(panel, at, names)
        panel.set(xlabel="lambda (1 = the plain model)", ylim=(0, 102))
        panel.set_title(heading, fontsize=11)
        panel.invert_xaxis()
        if len(at) < 8:
            panel.set_xticks(list(at), [f"{lam:g}" for lam in at])
    panels[0].set_ylabel("accuracy, %")
    figure.suptitle(title, fontsize=12)
    _legend(figure, *panels)
    return _save(figure, target)


def draw_attacks(report: RobustnessReport, path: str | Path) -> Path:
    """Draw the accuracy that each attack left as a bar, in the order in which they were tried, with a diamond for the
    plain model under the same attack, and the worst case at the end with its 95 % interval.

    A pale bar stands for an attack that tried only the images that were still right: it shows the accuracy that all
    attacks so far left together.

    Args:
        report: A report of any suite.
        path: The file to write, which ends in .png or .svg.

    Returns:
        `path`.

    Raises:
        ValueError: `path` has another ending.
        ImportError: Matplotlib is not installed.

    Example:
        >>> draw_attacks(evaluate(model, loader, Threat("Linf", 0.2), effort="fast"), "attacks.svg")
        PosixPath('attacks.svg')
    """
    target = canvas.target(path)
    control = report.control
    known = {} if control is None else {attack.name: control.accuracy(attack.name) for attack in control.attacks}
    rows = [("clean", report.accuracy(), None if control is None else control.accuracy())]
    rows += [(canvas.as_written(a.name), report.accuracy(a.name), known.get(a.name)) for a in report.attacks]
    rows.append((report.name, report.worst_case, None if control is None else control.worst_case))
    colours, alphas, last = (
        [CLEAN, *(_words(a.source)[1] for a in report.attacks), WORST],
        [1.0] * len(rows),
        len(rows) - 1,
    )
    for i, attack in enumerate(report.attacks, 1):
        alphas[i] = 1.0 if tried_all(report, attack) else 0.45
    figure = canvas.figure(8.0, 1.9 + 0.25 * len(rows))
    panel = figure.subplots()
    note: dict[str, Any] = {"transform": panel.get_yaxis_transform(), "ha": "right", "va": "center", "fontsize": 9}
    columns = [(1.09, "%")] if control is None else [(1.09, "%"), (1.18, "plain")]
    for i, (_, *shares) in enumerate(rows):
        panel.barh(i, 100 * (shares[0] or 0), height=0.72, color=colours[i], alpha=alphas[i])
        for (x, _), share in zip(columns, shares, strict=False):
            number = "-" if share is None else f"{100 * share:.1f}"
            panel.text(x, i, number, fontweight="bold" if i == last else "normal", **note)
    for x, heading in columns:
        panel.text(x, -1.1, heading, **note)
    low, high = (100 * share for share in report.interval())
    panel.plot([low, high], [last, last], color=CONTROL, linewidth=2, marker="|", markersize=9, label="95 % interval")
    if control is not None:
        beside = [(100 * share, i) for i, (*_, share) in enumerate(rows) if share is not None]
        look: dict[str, Any] = {"marker": "D", "s": 26, "facecolor": "white", "edgecolor": CONTROL, "zorder": 4}
        panel.scatter(*zip(*beside, strict=True), clip_on=False, label=f"{control_of(report)}, same attack", **look)
    for words, colour in dict.fromkeys(_words(attack.source, brief=True) for attack in report.attacks):
        panel.bar(0, 0, color=colour, label=words)  # only for the legend, and not pale
    panel.axhline(last - 0.5, color="black", linewidth=0.8)
    panel.set_yticks(range(len(rows)), [name for name, *_ in rows], fontsize=9)
    panel.get_yticklabels()[-1].set_fontweight("bold")
    panel.set(xlim=(0, 100), ylim=(last + 0.6, -0.6))
    panel.set_xlabel("accuracy left, % (pale: by this attack and all above together)")
    panel.grid(axis="x", alpha=0.3)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
    title = f'{report.samples} images, {report.threat}, suite "{canvas.as_written(report.suite)}"'
    panel.set_title(title + "".join(f"\nFLAG: {canvas.as_written(flag)}" for flag in report.flags), fontsize=11, pad=18)
    _legend(figure, panel)
    return _save(figure, target)


def _by_eps(reports: Sequence[RobustnessReport]) -> dict[float, RobustnessReport]:
    """Reports by eps, the smallest first, once they are found to belong on one curve."""
    if not reports:
        raise ValueError("There are no reports to draw: give one for each eps.")
    norms = list(dict.fromkeys(report.threat.norm for report in reports))
    if len(norms) > 1:
        raise ValueError(f"The reports are under {' and '.join(norms)}: draw one curve for each norm.")
    at = {report.threat.eps: report for report in sorted(reports, key=lambda report: report.threat.eps)}
    if len(at) < len(reports):
        raise ValueError(f"{len(reports)} reports have {len(at)} different eps: give one report for each.")
    for name, values in (("models", {r.sha256 for r in reports}), ("numbers of images", {r.samples for r in reports})):
        if len(values) > 1:
            raise ValueError(f"The reports are of {len(values)} {name}: evaluate one model on the same images.")
    return at


def control_of(report: RobustnessReport) -> str:
    """Name of the model that stands beside the one of a report, without an article, such as `"plain model"`."""
    return NAMES[report.plain].removeprefix("the ")


def tried_all(report: RobustnessReport, attack: AttackResult) -> bool:
    """Whether an attack tried every image that was right, so that its accuracy does not depend on earlier attacks."""
    return all(tried is not None for tried, right in zip(attack.survived, report.correct, strict=True) if right)


def compared(reports: Sequence[RobustnessReport], least: int) -> dict[str, str]:
    """Attacks that at least `least` reports have and that tried every image in them, and their sources: no more than
    there are markers, FGSM and PGD along each gradient before the others, and stronger attacks before weaker ones."""
    sources = {attack.name: attack.source for report in reports for attack in report.attacks}
    shares: dict[str, list[float]] = {name: [] for name in sources}
    for report in reports:
        for attack in report.attacks:
            shares[attack.name].append(report.accuracy(attack.name) if tried_all(report, attack) else float("nan"))
    kept = [name for name, each in shares.items() if len(each) >= least and sum(each) >= 0]  # NaN >= 0 is false
    kept.sort(key=lambda name: (name != "fgsm" and name.split("_")[0] != "pgd", sum(shares[name]) / len(shares[name])))
    return {name: source for name, source in sources.items() if name in kept[: len(MARKERS)]}


def _lines(panel: Axes, at: Mapping[float, RobustnessReport], names: Mapping[str, str], zero: bool = False) -> None:
    """Draw the worst case, the plain model's and the attacks `names` over the keys of `at`; if `zero`, the lines start
    from the clean accuracy at 0."""
    reports = list(at.values())
    start = {0.0: reports[0].accuracy()} if zero else {}

    def line(shares: Mapping[float, float], **look: Any) -> None:
        panel.plot(list(shares), [100 * share for share in shares.values()], **look)

    worst = start | {x: report.worst_case for x, report in at.items()}
    spans = [reports[0].interval(share) for share in start.values()] + [report.interval() for report in reports]
    low, high = ([100 * span[i] for span in spans] for i in (0, 1))
    name = next(iter(at.values())).name
    line(worst, color=WORST, linewidth=3.6, label=f"{name}, image by image")
    panel.fill_between(list(worst), low, high, color=WORST, alpha=0.18, linewidth=0, label="its 95 % interval")
    controls = {x: report.control for x, report in at.items() if report.control is not None}
    if controls:
        begin = {0.0: next(iter(controls.values())).accuracy()} if zero else {}
        shares = begin | {x: report.worst_case for x, report in controls.items()}
        line(shares, color=CONTROL, linewidth=2.4, linestyle="--", label=f"{name} of the {control_of(reports[0])}")
    for marker, (name, source) in zip(MARKERS, names.items(), strict=False):
        words, colour = _words(source)
        shares = {x: report.accuracy(name) for x, report in at.items() if any(a.name == name for a in report.attacks)}
        look = {"color": colour, "marker": marker, "linewidth": 1.3, "markersize": 5, "zorder": 3}
        line(
            start | shares,
            label=f"{canvas.as_written(name)}: {words}",
            linestyle=":" if name == "fgsm" else "-",
            **look,
        )
    panel.grid(alpha=0.3)
    panel.spines[["top", "right"]].set_visible(False)


def _words(source: str, brief: bool = False) -> tuple[str, str]:
    """A source in words, and its colour; if `brief`, all sources of one colour have the same words."""
    words, colour = SOURCES.get(source, (canvas.as_written(source), CLEAN))
    return ("smoother surrogate's gradient" if brief and colour == SOURCES["soft"][1] else words), colour


def _legend(figure: Figure, *panels: Axes) -> None:
    """Draw one legend for all panels, below them, where it hides nothing."""
    handles = {
        label: handle for panel in panels for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=3, fontsize=9, frameon=False)


def _save(figure: Figure, target: Path) -> Path:
    import matplotlib

    # Text in SVG stays text, which can be searched and read aloud; the same report gives the same file.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "timm_nrpm"}):
        metadata = {"Date": None} if target.suffix.lower() == ".svg" else None
        figure.savefig(target, dpi=150, bbox_inches="tight", metadata=metadata)
    return target
