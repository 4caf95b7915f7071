"""A picture of advice: the effect of the best trial of each strategy, with its interval."""

from __future__ import annotations

from pathlib import Path

from timm_nrpm.evaluation.trials import NOTHING, Advice
from timm_nrpm.figures import canvas

PARTS = {"report": canvas.STYLES[0], "selection": canvas.STYLES[1]}
"""Colour, marker and line of the images of each part."""


def draw_advice(advice: Advice, path: str | Path) -> Path:
    """Draw what each strategy gains over the model as it is.

    Args:
        advice: The advice against one threat, as :func:`timm_nrpm.advise` gives it.
        path: The file to write, which ends in .png or .svg.

    Raises:
        ValueError: `path` has another ending.
        ImportError: Matplotlib is not installed.

    Example:
        >>> draw_advice(advise(model, loader, Shift("white_noise"), effect=50, seconds=1)[0], "advice.png")
        PosixPath('advice.png')
    """
    target = canvas.target(path)
    best = [trial for trial in advice.best if trial.strategy != NOTHING]
    figure = canvas.figure(9, 1.6 + 0.55 * max(len(best), 1))
    axes = figure.subplots()
    axes.axvline(0, color="#555555", linewidth=1)
    for part, (colour, marker, _) in PARTS.items():
        shown = [(row, advice.effect(trial, part)) for row, trial in enumerate(best)]
        effects = [(row, effect) for row, effect in shown if effect is not None]
        places = [row + (0.12 if part == "selection" else -0.12) for row, _ in effects]
        points = [effect.points for _, effect in effects]
        reach = [
            [max(effect.points - effect.low, 0) for _, effect in effects],
            [max(effect.high - effect.points, 0) for _, effect in effects],
        ]
        label = "judged on" if part == "report" else "chosen on"
        axes.errorbar(points, places, xerr=reach, fmt=marker, color=colour, capsize=3, label=f"images {label}")
    for row, trial in enumerate(best):
        if trial.rejected:
            axes.annotate(f" {trial.rejected}", (0, row), va="center", fontsize=8, color="#555555")
    names = [f"{trial.strategy}\n{trial.setting}, {trial.slowdown:.1f} times the latency" for trial in best]
    axes.set_yticks(range(len(best)), names, fontsize=8)
    axes.set_ylim(len(best) - 0.4, -0.6)
    axes.set_xlabel(f"points of accuracy over the model as it is ({100 * _plain(advice):.1f} %), with 95 % intervals")
    axes.set_title(f"Against {advice.threat}", fontsize=11, loc="left")
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=2, fontsize=9)
    figure.savefig(target, dpi=120)
    return target


def _plain(advice: Advice) -> float:
    """Accuracy of the model as it is, on the images judged on."""
    return advice.nothing.report.accuracy if advice.nothing.report else 0.0
