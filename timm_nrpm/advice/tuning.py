"""Strategies: tuning under attack, of lambda, of a few layers and of all weights, each beside the plain model's."""

from __future__ import annotations

import math
from dataclasses import replace

from torch import nn

from timm_nrpm.advice.strategy import Candidate, Candidates, Strategy
from timm_nrpm.advice.study import Study
from timm_nrpm.attacks.threats import Threat
from timm_nrpm.config import NRPMConfig, TuneConfig
from timm_nrpm.models.reprogramming import reprogrammed_layers
from timm_nrpm.tuning.tune import tune

EPOCHS, STEPS = 10, 3
"""Number of epochs, and of steps of the attack in training."""

LAM = 0.8
"""Lambda that tuning starts from, beside 1."""


def _lambda(study: Study) -> Candidates:
    yield _candidate(study, "lambda tuned", LAM, TuneConfig(calibrate=1000, lam_lr=0.1))


def _few(study: Study) -> Candidates:
    names, layers = _weights(study), list(reprogrammed_layers(study.model))
    later = f"{layers[(len(layers) + 1) // 2]}." if len(layers) > 1 else ""
    until = next((place for place, name in enumerate(names) if later and name.startswith(later)), len(names))
    yield from _pair(study, "the first half of the layers", names[:until])


def _all(study: Study) -> Candidates:
    yield from _pair(study, "all layers", _weights(study))


def _weights(study: Study) -> tuple[str, ...]:
    """Names of all parameters but lambdas, which would leave 1 as soon as they trained."""
    return tuple(name for name, _ in study.model.named_parameters() if name.rpartition(".")[2] != "lam")


def _pair(study: Study, words: str, trainable: tuple[str, ...]) -> Candidates:
    """The plain model with these parameters tuned, and the reprogrammed one, whose control it is."""
    plain = f"{words}, plain"
    config = TuneConfig(paradigm="all", trainable=trainable, gradient="own")
    yield _candidate(study, plain, 1.0, config)
    yield replace(
        _candidate(study, f"{words}, lambda {LAM:g}", LAM, replace(config, gradient="mixture")), control=plain
    )


def _candidate(study: Study, setting: str, lam: float, config: TuneConfig) -> Candidate:
    assert study.training is not None
    assert isinstance(study.danger, Threat)
    name = setting.replace(" ", "-").replace(",", "")
    config = replace(
        config,
        objective="pgd",
        eps=study.danger.eps,
        steps=STEPS,
        epochs=EPOCHS,
        seed=study.seed,
        output=str(study.folder / name),
        optimizer="momentum",
        lr=0.01,
    )

    def make() -> nn.Module:
        model = study.fresh(NRPMConfig(lam) if lam < 1 else None)
        assert study.training is not None
        tune(model, study.training, config, mean=study.mean, std=study.std, resume=True)
        return model.eval().to("cpu")

    started = study.fresh(NRPMConfig(lam) if lam < 1 else None)
    steps = EPOCHS * len(study.training) * (STEPS + 1)
    return Candidate(setting, make, is_trained=True, seconds=steps * study.step_seconds(started))


def _obstacle(study: Study) -> str:
    if study.training is None:
        return "there are no training images"
    if not isinstance(study.danger, Threat) or study.danger.norm != "Linf":
        return "tuning is under Linf attacks"
    return "" if math.isfinite(study.danger.eps) else "the bound is infinite"


TUNED_LAMBDA = Strategy("tuning lambda", _lambda, _obstacle)
TUNED_LAYERS = Strategy("tuning a few layers", _few, _obstacle)
TUNED_ALL = Strategy("tuning all", _all, _obstacle)
