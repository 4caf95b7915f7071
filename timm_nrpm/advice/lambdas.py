"""Strategies: standard units, one lambda for all layers, other settings of the estimate, a lambda for each layer."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from timm_nrpm.advice.adaptation import adapted, name_of
from timm_nrpm.advice.strategy import Candidate, Candidates, Strategy
from timm_nrpm.advice.study import Study
from timm_nrpm.attacks.threats import Threat
from timm_nrpm.config import NRPMConfig
from timm_nrpm.evaluation.search import search_lambda
from timm_nrpm.evaluation.shifts import Shift
from timm_nrpm.models.plain_statistics import norms_of
from timm_nrpm.models.reprogramming import reprogrammed_layers

LAMS = (0.9, 0.7, 0.5, 0.3)
"""Values of one lambda for all layers, from the mildest."""

ESTIMATES = {
    "eps 0.05": NRPMConfig(eps=0.05),
    "eps 0.2": NRPMConfig(eps=0.2),
    "K 1": NRPMConfig(iterations=1),
    "Huber": NRPMConfig(penalty="huber"),
    "MCP": NRPMConfig(penalty="mcp"),
}
"""Settings of the estimate that are tried at a mild and at a low lambda. Its eps is in units of one product: the
larger, the smoother the estimate, and the nearer to the mean."""

STANDARD = (("first:1", 0.0, 0.6), (None, 0.0, 2.0), ("first:1", 0.0, 0.3), ("first:1", 0.0, 1.0), (None, 0.4, 1.0))
"""Layers that standard units are tried in, with lambda and eps; what gained on other models comes first."""

LAYERS = (None, "first:1", "first:3")
"""Layers that one lambda is tried on: all, and a few, which cost less time."""

BUDGET = 30
"""Number of settings that the search of a lambda for each layer tries."""


def _standard_units(study: Study) -> Candidates:
    for layers, lam, eps in STANDARD:
        config = NRPMConfig(lam, eps=eps, layers=layers, standardize=True)
        yield _candidate(study, f"lambda {lam:g}, eps {eps:g} in {layers or 'all layers'}", config)


def _one_lambda(study: Study) -> Candidates:
    for layers in LAYERS:
        where = "" if layers is None else f" in {layers}"
        for lam in LAMS:
            trial = yield _candidate(study, f"lambda {lam:g}{where}", NRPMConfig(lam, layers=layers))
            if trial.rejected:  # smaller ones cost more
                break


def _estimate(study: Study) -> Candidates:
    for lam in (0.8, 0.4):
        for words, config in ESTIMATES.items():
            yield _candidate(study, f"lambda {lam:g}, {words}", replace(config, lam=lam))


def _by_layer(study: Study) -> Candidates:
    def make() -> nn.Module:
        assert isinstance(study.danger, Threat)
        front = search_lambda(
            study.fresh(NRPMConfig(0.8)),
            study.parts["selection"].batches(),
            study.danger,
            budget=BUDGET,
            bound=study.bounds.clean_loss,
            calibration=study.calibration,
            seed=study.seed,
            mean=study.mean,
            std=study.std,
            resume=study.folder / "search.jsonl",
        )
        return study.fresh(NRPMConfig(front.best.lams))

    seconds = BUDGET * (study.quick_seconds + study.fresh_seconds(NRPMConfig(0.8)))
    yield Candidate("searched under quick attacks", make, seconds=seconds)


def _candidate(study: Study, setting: str, config: NRPMConfig) -> Candidate:
    """A candidate with this config; against a shift it is adapted too, since stale statistics are most of the loss."""
    if not (isinstance(study.danger, Shift) and norms_of(study.model)):
        return Candidate(setting, lambda: study.fresh(config), seconds=study.fresh_seconds(config))
    shifted, clean = (lambda: study.shifted("selection")), (lambda: study.parts["selection"].pixels)
    return Candidate(
        f"{setting}, adapted",
        lambda: adapted(study, lambda: study.fresh(config), shifted(), "auto"),
        lambda: adapted(study, lambda: study.fresh(config), clean(), "auto"),
        control=name_of("auto"),
        seconds=study.fresh_seconds(config),
    )


def _no_layers_to_tell_apart(study: Study) -> str:
    if not isinstance(study.danger, Threat):
        return "its search is under attack"
    return "" if len(reprogrammed_layers(study.model)) > 1 else "the model has one layer"


STANDARD_UNITS = Strategy("standard units", _standard_units)
ONE_LAMBDA = Strategy("one lambda", _one_lambda)
ESTIMATE = Strategy("the estimate", _estimate)
BY_LAYER = Strategy("a lambda for each layer", _by_layer, _no_layers_to_tell_apart)
