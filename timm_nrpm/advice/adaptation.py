"""Strategy: statistics of the images at hand in place of those of the training."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Literal

from torch import Tensor, nn

from timm_nrpm.advice.strategy import Candidate, Candidates, Strategy
from timm_nrpm.advice.study import Study
from timm_nrpm.errors import AdaptationDoubt
from timm_nrpm.evaluation.shifts import Shift
from timm_nrpm.models.adaptation import adapt_
from timm_nrpm.models.plain_statistics import norms_of

PRIORS: tuple[float | Literal["auto"], ...] = ("auto", 256, 16, 0)
"""Numbers of images that the model's own statistics are worth, from those that move least."""


def adapted(study: Study, model: Callable[[], nn.Module], pixels: Tensor, prior: float | Literal["auto"]) -> nn.Module:
    """A model adapted to images, without their labels."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AdaptationDoubt)  # what it is worth is measured
        return adapt_(model(), pixels, prior=prior, mean=study.mean, std=study.std)


def name_of(prior: float | str) -> str:
    """The setting of an adaptation, in words."""
    return f"prior {prior}" if prior == "auto" else f"prior {prior:g}"


def _candidates(study: Study) -> Candidates:
    for prior in PRIORS:
        yield Candidate(
            name_of(prior),
            lambda prior=prior: adapted(study, study.fresh, study.shifted("selection"), prior),  # type: ignore[misc]
            # On clean images, one would adapt to those.
            lambda prior=prior: adapted(study, study.fresh, study.parts["selection"].pixels, prior),  # type: ignore[misc]
        )


def _obstacle(study: Study) -> str:
    if not isinstance(study.danger, Shift):
        return "it moves statistics to those of shifted images, and an attacked image is like the others"
    if not norms_of(study.model):
        return "the model has no BatchNorm with running statistics"
    return ""


ADAPTATION = Strategy("adaptation", _candidates, _obstacle)
