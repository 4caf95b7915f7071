"""Strategy: the model as it is and a tuned one, their probabilities mixed, to keep clean accuracy that tuning loses."""

from __future__ import annotations

from functools import partial

from torch import nn

from timm_nrpm.advice.strategy import Candidate, Candidates, Strategy
from timm_nrpm.advice.study import Study
from timm_nrpm.advice.tuning import TUNED_ALL, tuned_whole
from timm_nrpm.attacks.threats import Threat
from timm_nrpm.ensembles.adaptive_smoothing import AdaptiveSmoothing

SHARES = (0.9, 0.7, 0.5)
"""Shares of the tuned model, from the most robust mixture. Below one half the model as it is decides alone."""


def _candidates(study: Study) -> Candidates:
    tuned = tuned_whole(study)
    for share in SHARES:
        yield Candidate(f"tuned model's share {share:g}", partial(_mixed, study, tuned, share), is_trained=True,
                        seconds=tuned.seconds)  # fmt: skip


def _mixed(study: Study, tuned: Candidate, share: float) -> nn.Module:
    models = (study.on_pixels(model) for model in (study.fresh(), tuned.make()))
    return AdaptiveSmoothing(*models, share=share).eval()


def _obstacle(study: Study) -> str:
    if not isinstance(study.danger, Threat):
        return "it guards against an attacker"
    return TUNED_ALL.obstacle(study)


MIXING = Strategy("mixing with a tuned model", _candidates, _obstacle)
