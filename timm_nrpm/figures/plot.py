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
    | EmbeddingDifferences
    | LossLandscape
)
"""What :func:`plot` draws by itself."""

DRAWN = (
    "a RobustnessReport, CertificationReport, CorruptionReport, History, ParetoFront, EmbeddingDifferences or "
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
        result: What a function of this package returned: of :func:`timm_nrpm.evaluate` the accuracy that each attack
            leaves, or, of a list of reports, accuracy over eps; of :func:`timm_nrpm.certify`, one report or several,
            certified accuracy over radius; of :func:`timm_nrpm.evaluate_corruptions` maps; of
            :func:`timm_nrpm.search_lambda` the front; of :func:`timm_nrpm.tune` the run; of
            :func:`timm_nrpm.lambdas` every layer's lambda. Several models' embedding differences, or landscapes, come
            as a dict by the name of the model.
        path: The file to write, which ends in .png or .svg.

    Returns:
        `path`.

    Raises:
        ValueError: A result of no such kind, or another ending.
        ImportError: Matplotlib is not installed.

    Example:
        >>> timm_nrpm.plot(timm_nrpm.lambdas(model), "lambdas.png")
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
    if isinstance(result, EmbeddingDifferences):
        return draw_differences({"model": result}, path)
    if isinstance(result, LossLandscape):
        return draw_landscape({"model": result}, path)
    if isinstance(result, Mapping):
        return _plot_by_name(result, path)
    if isinstance(result, Sequence) and not isinstance(result, str):
        robustness = [one for one in result if isinstance(one, RobustnessReport)]
        certified = [one for one in result if isinstance(one, CertificationReport)]
        if robustness and len(robustness) == len(result):
            return draw_curves(robustness, path)
        if certified and len(certified) == len(result):
            return draw_certified(certified, path)
    raise _unknown(result)


def _plot_by_name(results: Mapping[str, object], path: str | Path) -> Path:
    differences = {name: one for name, one in results.items() if isinstance(one, EmbeddingDifferences)}
    landscapes = {name: one for name, one in results.items() if isinstance(one, LossLandscape)}
    lams = {name: float(one) for name, one in results.items() if isinstance(one, (int, float))}
    if results and len(differences) == len(results):
        return draw_differences(differences, path)
    if results and len(landscapes) == len(results):
        return draw_landscape(landscapes, path)
    if results and len(lams) == len(results):
        return draw_lambdas(lams, path)
    raise _unknown(results)


def _unknown(result: object) -> ValueError:
    if isinstance(result, (Mapping, Sequence)) and not isinstance(result, str):
        inside = result.values() if isinstance(result, Mapping) else result
        kinds = sorted({type(one).__name__ for one in inside}) or ["nothing"]
        given = f"a {type(result).__name__} of {', '.join(kinds)}"
    else:
        given = f"a {type(result).__name__}"
    return ValueError(f"result is {given}, which has no picture: give {DRAWN}.")
