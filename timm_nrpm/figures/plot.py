"""One function that draws every result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

from timm_nrpm.evaluation.certificates import CertificationReport
from timm_nrpm.evaluation.corruption_report import CorruptionReport
from timm_nrpm.evaluation.diagnostics import EmbeddingDifferences
from timm_nrpm.evaluation.history import History
from timm_nrpm.evaluation.landscape import LossLandscape
from timm_nrpm.evaluation.pareto import ParetoFront
from timm_nrpm.evaluation.report import RobustnessReport
from timm_nrpm.evaluation.trials import Advice
from timm_nrpm.figures.advised import draw_advice
from timm_nrpm.figures.certified import draw_certified
from timm_nrpm.figures.corruptions import draw_corruptions
from timm_nrpm.figures.diagnostics import draw_differences, draw_landscape
from timm_nrpm.figures.history import draw_history
from timm_nrpm.figures.lambdas import draw_lambdas
from timm_nrpm.figures.pareto import draw_front
from timm_nrpm.figures.robustness import draw_attacks, draw_curves

Result: TypeAlias = (
    RobustnessReport
    | CertificationReport
    | CorruptionReport
    | History
    | ParetoFront
    | Advice
    | EmbeddingDifferences
    | LossLandscape
)
"""Results that :func:`plot` draws one at a time; it draws several of some kinds together as well."""

DRAWN = (
    "a RobustnessReport, CertificationReport, CorruptionReport, History, ParetoFront, Advice, EmbeddingDifferences or "
    "LossLandscape; a list of RobustnessReports or of CertificationReports; or a dict of EmbeddingDifferences, of "
    "LossLandscapes or of lambdas by their names"
)


def plot(
    result: Result
    | Sequence[RobustnessReport]
    | Sequence[CertificationReport]
    | Mapping[str, EmbeddingDifferences]
    | Mapping[str, LossLandscape]
    | Mapping[str, float],
    path: str | Path,
) -> Path:
    """Draw a result of this package.

    Args:
        result: The result of a function of this package. A report of :func:`timm_nrpm.evaluate` is drawn as the
            accuracy that each attack leaves, and a list of them as accuracy over eps; one report of
            :func:`timm_nrpm.certify`, or a list of them, as certified accuracy over radius; a report of
            :func:`timm_nrpm.evaluate_corruptions` as heat maps; the result of :func:`timm_nrpm.search_lambda` as its
            Pareto front; an advice of :func:`timm_nrpm.advise` as the effect of each strategy; the history of
            :func:`timm_nrpm.tune` as curves over the steps; and the dict of :func:`timm_nrpm.lambdas` as a bar for each
            layer. Embedding differences, or loss landscapes, of several models are given as a dict by the name of the
            model.
        path: The file to write, which ends in .png or .svg.

    Returns:
        `path`.

    Raises:
        ValueError: `result` is of another kind, or `path` has another ending.
        ImportError: Matplotlib is not installed.

    Example:
        >>> timm_nrpm.plot(timm_nrpm.lambdas(model), "lambdas.png")
        PosixPath('lambdas.png')
    """
    if isinstance(result, RobustnessReport):
        return draw_attacks(result, path)
    if isinstance(result, CertificationReport):
        return draw_certified([result], path)
    if isinstance(result, CorruptionReport):
        return draw_corruptions(result, path)
    if isinstance(result, History):
        return draw_history(result, path)
    if isinstance(result, ParetoFront):
        return draw_front(result, path)
    if isinstance(result, Advice):
        return draw_advice(result, path)
    if isinstance(result, EmbeddingDifferences):
        return draw_differences({"model": result}, path)
    if isinstance(result, LossLandscape):
        return draw_landscape({"model": result}, path)
    if isinstance(result, Mapping):
        return _plot_by_name(result, path)
    if isinstance(result, Sequence) and not isinstance(result, str):
        robustness = [report for report in result if isinstance(report, RobustnessReport)]
        certified = [report for report in result if isinstance(report, CertificationReport)]
        if robustness and len(robustness) == len(result):
            return draw_curves(robustness, path)
        if certified and len(certified) == len(result):
            return draw_certified(certified, path)
    raise _unknown(result)


def _plot_by_name(results: Mapping[str, object], path: str | Path) -> Path:
    """Draw results of one kind, given by their names."""
    differences = {name: result for name, result in results.items() if isinstance(result, EmbeddingDifferences)}
    landscapes = {name: result for name, result in results.items() if isinstance(result, LossLandscape)}
    lams = {name: float(result) for name, result in results.items() if isinstance(result, (int, float))}
    if results and len(differences) == len(results):
        return draw_differences(differences, path)
    if results and len(landscapes) == len(results):
        return draw_landscape(landscapes, path)
    if results and len(lams) == len(results):
        return draw_lambdas(lams, path)
    raise _unknown(results)


def _unknown(result: object) -> ValueError:
    """The error for a result that has no picture."""
    if isinstance(result, (Mapping, Sequence)) and not isinstance(result, str):
        items = result.values() if isinstance(result, Mapping) else result
        kinds = sorted({type(item).__name__ for item in items}) or ["nothing"]
        given = f"a {type(result).__name__} of {', '.join(kinds)}"
    else:
        given = f"a {type(result).__name__}"
    return ValueError(f"result is {given}, which has no picture: give {DRAWN}.")
