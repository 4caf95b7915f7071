"""Which lambdas a search tries: one for all layers first, on a grid and then near the best, and then one for each."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count, pairwise
from typing import Any

from timm_nrpm.evaluation.pareto import Candidate, best_of, lost

STEP = 0.01
"""Difference between two neighbouring lambdas that are tried. A finer grid makes no measurable difference, and with a
continuous lambda no layer would ever be exactly plain, which it is only at lambda = 1."""


def optuna_module() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise ImportError(
            "A lambda for each layer is searched by Optuna: pip install 'timm_nrpm[search]', or give layerwise=False."
        ) from error
    return optuna


def settings(
    names: list[str], trials: list[Candidate], share: int, bound: float, seed: int, optuna: Any
) -> Iterator[tuple[str, dict[str, float]]]:
    """Yield the settings to try, each as its kind and its lambdas by layer.

    Args:
        names: Names of the reprogrammed layers.
        trials: Settings that were tried. The caller appends each setting before it asks for the next one.
        share: Largest number of settings with one lambda for all layers.
        bound: Largest loss of clean accuracy, in points.
        seed: Seed of Optuna's sampler.
        optuna: The module optuna; None to search no lambda for each layer.
    """
    yield "plain", dict.fromkeys(names, 1.0)
    for _ in range(share):
        value = _next_global(trials, names[0], (share + 1) // 2, bound)
        if value is None:
            break
        yield "global", dict.fromkeys(names, value)
    if optuna is not None:
        with _quiet(optuna):
            sampler = _Sampler(optuna, names, trials[0], bound, seed)
        for lams in _layerwise(sampler, names, trials):
            yield "layerwise", lams


def _next_global(trials: list[Candidate], name: str, points: int, bound: float) -> float | None:
    """Return the next lambda for all layers, of which `name` is one: first a lambda on a grid of `points`, then the
    middle of the wider gap beside the best so far; None if no gap is left."""
    tried = {c.lams[name]: c for c in trials}
    for i in range(1, points + 1):
        value = round(1 - i / max(points, 2), 2)  # a single point lies at 0.5
        if value not in tried:
            return value
    best = best_of(trials, trials[0], bound)
    values = sorted(tried)
    gaps = [(round(high - low, 2), low, high) for low, high in pairwise(values)]
    gaps = [gap for gap in gaps if gap[0] > STEP]
    beside = [gap for gap in gaps if tried[gap[1]] is best or tried[gap[2]] is best]
    if not gaps:
        return None
    _, low, high = max(beside or gaps)
    return round((low + high) / 2, 2)


def _layerwise(sampler: _Sampler, names: list[str], trials: list[Candidate]) -> Iterator[dict[str, float]]:
    """Yield settings with a lambda for each layer."""
    for candidate in trials:
        sampler.tell(candidate)
    start = best_of([c for c in trials if c.kind == "global"], trials[0], sampler.bound).lams
    half = (len(names) + 1) // 2
    for part in (names[:half], names[half:]):
        yield {name: start[name] if name in part else 1.0 for name in names}
        sampler.tell(trials[-1])
    repeats = count()
    while next(repeats) < 1000:  # stop where no new setting is left to find
        trial, lams = sampler.ask()
        known = next((c for c in trials if c.lams == lams), None)
        if known is None:
            yield lams
            known, repeats = trials[-1], count()
        sampler.finish(trial, known)


class _Sampler:
    """Optuna's sampler, which proposes settings and is told their results."""

    def __init__(self, optuna: Any, names: list[str], plain: Candidate, bound: float, seed: int) -> None:
        self.optuna, self.plain, self.bound = optuna, plain, bound
        self.space = {name: optuna.distributions.FloatDistribution(0.0, 1.0, step=STEP) for name in names}
        self.named = hasattr(optuna.trial.Trial, "set_constraint")  # since Optuna 5
        older = {} if self.named else {"constraints_func": lambda trial: (trial.user_attrs["excess"],)}
        with _quiet(optuna):
            sampler = optuna.samplers.TPESampler(multivariate=True, n_startup_trials=1, seed=seed, **older)
            self.study = optuna.create_study(directions=["maximize", "maximize"], sampler=sampler)

    def ask(self) -> tuple[Any, dict[str, float]]:
        """Return a new trial of Optuna, and the lambdas that it proposes."""
        with _quiet(self.optuna):
            trial = self.study.ask(self.space)
        return trial, {name: round(trial.params[name], 2) for name in self.space}

    def tell(self, candidate: Candidate) -> None:
        """Report a setting that the sampler did not propose."""
        with _quiet(self.optuna):
            self.study.enqueue_trial(candidate.lams)
        self.finish(self.ask()[0], candidate)

    def finish(self, trial: Any, candidate: Candidate) -> None:
        """Report the result of a setting that the sampler proposed as `trial`."""
        excess = lost(candidate, self.plain) - self.bound
        if self.named:
            trial.set_constraint("clean_accuracy", excess)
        else:
            trial.set_user_attr("excess", excess)
        with _quiet(self.optuna):
            self.study.tell(trial, (candidate.quick, candidate.clean_accuracy))


@contextmanager
def _quiet(optuna: Any) -> Iterator[None]:
    """Silence Optuna, which logs every study and trial, and warns that its settings are experimental."""
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        optuna.logging.set_verbosity(level)
