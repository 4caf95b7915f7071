"""Strategy: a vote of the model under noise, of the whole image or of two halves of its pixels, whose guarantee no
attack can break."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product

import torch
from torch import Tensor, nn

from timm_nrpm.advice.adaptation import adapted
from timm_nrpm.advice.strategy import Candidate, Candidates, Strategy
from timm_nrpm.advice.study import Study, file_name
from timm_nrpm.attacks.threats import Threat
from timm_nrpm.evaluation.certificates import CertificationReport
from timm_nrpm.evaluation.certification import certify
from timm_nrpm.evaluation.halves import certify_halves
from timm_nrpm.evaluation.trials import Kept, digits_of
from timm_nrpm.models.plain_statistics import norms_of

VOTES = 500
"""Number of votes for a prediction. If all agree, the guarantee reaches 2.2 standard deviations of the noise."""

CHOOSING = 100
"""Number of forwards that choose the class whose votes are counted."""

SIGMAS = (0.5, 1.0)
"""Standard deviations of the noise that are tried, in units of the attack's bound."""


WAYS: dict[str, Callable[..., CertificationReport]] = {"": certify, ", in halves": certify_halves}
"""Ways of smoothing, by what a setting says of them."""


def _candidates(study: Study) -> Candidates:
    assert isinstance(study.danger, Threat)
    seconds = study.forward_seconds(study.model) * (CHOOSING + VOTES) * len(study.parts["selection"].labels)
    for share, (words, certified) in product(SIGMAS, WAYS.items()):
        sigma = share * study.danger.eps
        setting = f"noise {sigma:.3g}, {VOTES} votes{words}"
        judged = partial(_guaranteed, study, certified, sigma, setting)
        yield Candidate(setting, partial(_quieted, study, sigma), judged=judged, forwards=VOTES, seconds=seconds)


def _quieted(study: Study, sigma: float) -> nn.Module:
    """The model, whose statistics are moved to those of noisy images, where it has such."""
    if not norms_of(study.model):
        return study.fresh()
    return adapted(study, study.fresh, _noisy(study, sigma), "auto")


def _noisy(study: Study, sigma: float) -> Tensor:
    """The images of the selection under noise, `[N, C, H, W]` in [0, 1]."""
    pixels = study.parts["selection"].pixels
    noise = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(study.seed))
    return (pixels + sigma * noise.to(pixels)).clamp(0, 1)


def _guaranteed(
    study: Study, certified: Callable[..., CertificationReport], sigma: float, setting: str, model: nn.Module, part: str
) -> Kept:
    """The images that the vote is right on, and those on which no change within the bound changes it."""
    report = certified(
        model,
        study.parts[part].batches(),
        sigma,
        n0=CHOOSING,
        n=VOTES,
        seed=study.seed,
        mean=study.mean,
        std=study.std,
        resume=study.folder / f"{file_name(setting)}-{part}.jsonl",
    )
    assert isinstance(study.danger, Threat)
    eps = study.danger.eps
    right = [image.predicted == image.label for image in report.images]
    kept = [now and image.radius >= eps for now, image in zip(right, report.images, strict=True)]
    return Kept(digits_of(right), digits_of(kept))


def _obstacle(study: Study) -> str:
    if not isinstance(study.danger, Threat):
        return "it guards against an attacker"
    if study.danger.norm != "L2":
        return "its guarantee is under L2"
    most = study.bounds.slowdown
    return f"a prediction takes {VOTES} forwards, and {most:g} times the latency is the bound" if most < VOTES else ""


SMOOTHING = Strategy("smoothing", _candidates, _obstacle)
