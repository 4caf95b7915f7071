"""Certificates of an adaptive smoothing whose robust model votes under noise (Bai et al., arXiv 2301.12554, section 4).

Let v(x) be the shares of the robust model's votes under Gaussian noise, and a its share in the mixture
`(1 - a) softmax(s_g g(x)) + a v(x)`. Whatever the accurate model g says, it cannot lead a class by more than 1. So the
mixture gives class c wherever `a (v_c - v_i) > 1 - a` for all others i, and since all shares add up to 1, wherever
`v_c > 1 / (2a)`. A change of the image of length r leaves `v_c >= Phi(Phi^-1(p) - r / sigma)` of what was p (Cohen et
al., arXiv 1902.02918). Hence the radius `sigma (Phi^-1(p) - Phi^-1(1 / (2a)))`, which needs a above one half. A
prediction counts votes, and does not know v: by Hoeffding's bound its count is less than v_c by more than
`sqrt(log(1 / beta) / (2 votes))` with probability beta at most, so the certificate asks for that much more than
`1 / (2a)`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from timm_nrpm.checks import check_integer
from timm_nrpm.data.images import check_images
from timm_nrpm.ensembles.adaptive_smoothing import ACCURATE, ROBUST, AdaptiveSmoothing
from timm_nrpm.evaluation.certificates import WHOLE, CertificationReport, alpha_of
from timm_nrpm.evaluation.certification import Samples, certificate_of, certified
from timm_nrpm.evaluation.smoothed import Smoothed
from timm_nrpm.models.modes import evaluating
from timm_nrpm.nn.pixel_model import PixelModel


def certify_mixture(
    mixture: AdaptiveSmoothing,
    loader: Iterable[tuple[Tensor, Tensor]],
    sigma: float = 0.25,
    *,
    votes: int = 1000,
    n0: int = 100,
    n: int = 1000,
    confidence: float = 0.999,
    seed: int = 0,
    batch_size: int = 100,
    resume: str | Path | None = None,
    progress: bool = False,
) -> CertificationReport:
    """Certify the predictions of :func:`predict_mixture`: a radius within which no change takes the class away.

    Half of the probability `1 - confidence` goes to the bound of the votes here, and half to the votes of each
    prediction. The report is that of the robust model, with the probability that its class has to keep.

    Args:
        mixture: An adaptive smoothing; of one with a gate, the smallest share counts. The robust model's scale does not
            matter, since it votes.
        loader: Batches of pixels `[B, C, H, W]` in [0, 1] and labels `[B]`.
        sigma: Standard deviation of the noise, in pixel units.
        votes: Number of votes for a prediction.
        n0, n, confidence, seed, batch_size, resume, progress: The same as in :func:`timm_nrpm.certify`.

    Raises:
        ValueError: The share is one half or less, `votes` is so small that no share of votes is enough, or a setting is
            refused by :func:`timm_nrpm.certify`.

    Example:
        >>> mixture = AdaptiveSmoothing(plain, model, share=0.8)
        >>> certify_mixture(mixture, loader, sigma=0.25, n=200, votes=200).least
        0.763
    """
    robust = _robust_of(mixture, sigma, seed, batch_size)
    samples = Samples(n0, n, 1 - alpha_of(confidence) / 2, least=least_share(mixture, votes, confidence))
    name = str(mixture)
    return certified(robust, loader, samples, WHOLE, certificate_of, name, resume, progress)


def predict_mixture(
    mixture: AdaptiveSmoothing, pixels: Tensor, sigma: float = 0.25, *, votes: int = 1000, seed: int = 0,
    batch_size: int = 100,
) -> tuple[int, ...]:  # fmt: skip
    """Return the class of every image by the mixture whose robust model votes under noise.

    Args:
        mixture: An adaptive smoothing; of one with a gate, the smallest share counts.
        pixels: Images `[B, C, H, W]` in [0, 1].
        sigma, votes, seed, batch_size: The same as in :func:`certify_mixture`.

    Raises:
        ValueError: A setting is outside its range, or pixels are outside [0, 1].

    Example:
        >>> predict_mixture(AdaptiveSmoothing(plain, model, share=0.8), pixels[:3], sigma=0.12, votes=100)
        (2, 3, 4)
    """
    votes = check_integer("votes", votes, least=1)
    robust = _robust_of(mixture, sigma, seed, batch_size)
    images = robust.place(check_images(pixels))
    share, found = _share_of(mixture), []
    with evaluating(mixture), torch.no_grad():
        sure = torch.softmax(mixture.accurate_scale * mixture.member(ACCURATE)(images), 1)
        for number, image in enumerate(images):
            counted = robust.votes(image, robust.noise(image, number), votes)[:-1].to(sure) / votes
            found.append(int(((1 - share) * sure[number] + share * counted).argmax()))
    return tuple(found)


def least_share(mixture: AdaptiveSmoothing, votes: int, confidence: float) -> float:
    """Return the probability that the robust model has to give a class under noise, so that a mixture of `votes` votes
    predicts it with probability `confidence`.

    Raises:
        ValueError: The share is one half or less, or `votes` is so small that no probability below 1 is enough.
    """
    votes = check_integer("votes", votes, least=1)
    share = _share_of(mixture)
    if share <= 0.5:
        raise ValueError(
            f"share={share:g} has no certificate: at one half or less the accurate model can outvote any vote; give a "
            "share above 0.5."
        )
    doubt = math.log(2 / alpha_of(confidence)) / 2
    least = 1 / (2 * share) + math.sqrt(doubt / votes)
    if least >= 1:
        needed = math.floor(doubt / (1 - 1 / (2 * share)) ** 2) + 1
        raise ValueError(
            f"votes={votes} certify nothing at share {share:g} and confidence {confidence}: give {needed} votes or "
            "more."
        )
    return least


def _share_of(mixture: AdaptiveSmoothing) -> float:
    """The smallest share of the robust model."""
    return mixture.share if mixture.gate is None else min(mixture.gate.low, mixture.gate.high)


def _robust_of(mixture: AdaptiveSmoothing, sigma: float, seed: int, batch_size: int) -> Smoothed:
    return Smoothed(PixelModel(mixture.member(ROBUST)), None, None, sigma, seed, batch_size)
