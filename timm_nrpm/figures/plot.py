"""One function that draws every result."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from timm_nrpm.evaluation.certificates import CertificationReport
from timm_nrpm.evaluation.corruption_report import CorruptionReport
from timm_nrpm.evaluation.diagnostics import EmbeddingDifferences
from timm_nrpm.evaluation.history import History
from timm_nrpm.evaluation.landscape import LossLandscape
from timm_nrpm.evaluation.layer_worth import LayerRecommendation
from timm_nrpm.evaluation.pareto import ParetoFront
from timm_nrpm.evaluation.report import RobustnessReport
from timm_nrpm.evaluation.resolutions import ResolutionReport
from timm_nrpm.evaluation.subnetwork_report import SubnetworkReport
from timm_nrpm.evaluation.trials import Advice
from timm_nrpm.figures.advised import draw_advice
from timm_nrpm.figures.certified import draw_certified
from timm_nrpm.figures.corruptions import draw_corruptions
from timm_nrpm.figures.diagnostics import draw_differences, draw_landscape
from timm_nrpm.figures.history import draw_history
from timm_nrpm.figures.lambdas import draw_lambdas
from timm_nrpm.figures.layers import draw_layers
from timm_nrpm.figures.pareto import draw_front
from timm_nrpm.figures.resolutions import draw_resolutions
from timm_nrpm.figures.robustness import draw_attacks, draw_curves
from timm_nrpm.figures.subnetworks import draw_subnetworks

Result: TypeAlias = (
    RobustnessReport
    | CertificationReport
    | CorruptionReport
    | ResolutionReport
    | History
    | ParetoFront
    | Advice
    | SubnetworkReport
    | LayerRecommendation
    | EmbeddingDifferences
    | LossLandscape
)
"""Results that :func:`plot` draws one at a time; it draws several of some kinds together as well."""

DRAWERS: Mapping[type, Callable[[Any, str | Path], Path]] = {
    RobustnessReport: draw_attacks,
    CertificationReport: lambda report, path: draw_certified([report], path),
    CorruptionReport: draw_corruptions,
    ResolutionReport: draw_resolutions,
    History: draw_history,
    ParetoFront: draw_front,
    Advice: draw_advice,
    SubnetworkReport: lambda report, path: draw_subnetworks([report], path),
    LayerRecommendation: draw_layers,
    EmbeddingDifferences: lambda result, path: draw_differences({"model": result}, path),
    LossLandscape: lambda result, path: draw_landscape({"model": result}, path),
}
"""The function that draws a result of each kind."""

SEVERAL: Mapping[type, Callable[[Any, str | Path], Path]] = {
    RobustnessReport: draw_curves,
    CertificationReport: draw_certified,
    SubnetworkReport: draw_subnetworks,
}
"""The function that draws a list of results of each kind."""

DRAWN = (
    f"a {', '.join(kind.__name__ for kind in DRAWERS)}; a list of RobustnessReports, of CertificationReports or of "
    "SubnetworkReports; or a dict of EmbeddingDifferences, of "
    "LossLandscapes or of lambdas by their names"
)


def plot(
    result: Result
    | Sequence[RobustnessReport]
    | Sequence[CertificationReport]
    | Sequence[SubnetworkReport]
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
            :func:`timm_nrpm.evaluate_corruptions` as heat maps, and one of
            :func:`timm_nrpm.resolutions.evaluate_resolutions` as accuracy over size; the result of
            :func:`timm_nrpm.search_lambda` as its Pareto front; an advice of :func:`timm_nrpm.advise` as the effect of
            each strategy; a report of :func:`timm_nrpm.semirobust.semirobust`, or a list of them, as the dependence
            between layers; what :func:`timm_nrpm.recommend.recommend_layers` found as bars and a front; the history of
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
    if drawer := DRAWERS.get(type(result)):
        return drawer(result, path)
    if isinstance(result, Mapping):
        return _plot_by_name(result, path)
    if isinstance(result, Sequence) and not isinstance(result, str):
        kinds = {type(report) for report in result}
        for kind, drawer in SEVERAL.items():
            if kinds == {kind}:
                return drawer(result, path)
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
