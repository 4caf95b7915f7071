"""Certified robustness by two halves of the pixels, each smoothed by itself.

This is dual randomized smoothing (Xia et al., arXiv 2404.09586), without the networks that it trains.

The pixels are split like the squares of a chessboard. Of each half the model sees an image whose holes are the mean of
their neighbours, which are all of that half. Neighbouring pixels resemble each other, so that either half tells nearly
as much as the whole, with noise of half as many pixels: the guarantees of both together may reach further than that of
the whole image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from timm_nrpm.data.images import check_images
from timm_nrpm.evaluation.certificates import HALVES, Certificate, CertificationReport, halves_radius
from timm_nrpm.evaluation.certification import Samples, certified
from timm_nrpm.evaluation.smoothed import Smoothed
from timm_nrpm.models.modes import evaluating


def certify_halves(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    sigma: float = 0.25,
    *,
    n0: int = 100,
    n: int = 1000,
    confidence: float = 0.999,
    seed: int = 0,
    batch_size: int = 100,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    name: str | None = None,
    resume: str | Path | None = None,
    progress: bool = False,
) -> CertificationReport:
    """Certify the model smoothed in halves, which predicts the class with the largest sum of its probabilities in both
    halves of the pixels under noise; see :func:`timm_nrpm.evaluation.certificates.halves_radius` for the guarantee.

    The certificates hold for the predictions of :func:`predict_halves`, and in exact arithmetic. The paper trains a
    network for each half; here one network, trained on whole images, sees both, so that nothing is retrained.

    Args:
        model: Classifier of normalised images, or a wrapper of one. It is left unchanged.
        loader: Batches of pixels `[B, C, H, W]` in [0, 1] and labels `[B]`. An image has two pixels at least.
        sigma: Standard deviation of the noise, in pixel units.
        n0, n: Number of samples that choose the class, and number of samples that bound its probability, of both halves
            together, which share them equally: as many forwards as :func:`timm_nrpm.certify` takes. Both are even.
        confidence, seed, batch_size, mean, std, name, resume, progress: The same as in :func:`timm_nrpm.certify`.

    Raises:
        ValueError: A setting is outside its range, `n` is so small that nothing could be certified, an image has one
            pixel, pixels are outside [0, 1], labels are not classes of the model, the loader is empty, or `resume`
            belongs to another run.

    Example:
        >>> report = certify_halves(model, loader, sigma=0.25, n=500)
        >>> print(report)
        resnet8_digits, lambda 0.5, in halves, 32 images, sigma 0.25: certified ... %, abstained ... %, average ...
    """
    smoothed = Smoothed(model, mean, std, sigma, seed, batch_size)
    samples = Samples(n0, n, confidence, parts=2)
    return certified(smoothed, loader, samples, HALVES, _certificate, name, resume, progress)


def predict_halves(
    model: nn.Module,
    pixels: Tensor,
    sigma: float = 0.25,
    *,
    n0: int = 100,
    n: int = 1000,
    confidence: float = 0.999,
    seed: int = 0,
    batch_size: int = 100,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
) -> tuple[int | None, ...]:
    """Return the class of every image by the model smoothed in halves, or None where it abstains.

    With probability `confidence` or more it is what infinitely many samples would give, unless it is None, as it is
    where :func:`certify_halves` certifies no radius.

    Args:
        model: Classifier of normalised images, or a wrapper of one. It is left unchanged.
        pixels: Images `[B, C, H, W]` in [0, 1].
        sigma, n0, n, confidence, seed, batch_size, mean, std: The same as in :func:`certify_halves`.

    Raises:
        ValueError: A setting is outside its range, or pixels are outside [0, 1].

    Example:
        >>> predict_halves(model, pixels[:3], sigma=0.12)
        (2, 3, 4)
    """
    smoothed = Smoothed(model, mean, std, sigma, seed, batch_size)
    samples = Samples(n0, n, confidence, parts=2)
    images = smoothed.place(check_images(pixels))
    with evaluating(smoothed.net.model):
        found = [_certificate(smoothed, image, 0, i, samples, lambda done: None) for i, image in enumerate(images)]
    return tuple(certificate.predicted for certificate in found)


def filled(pixels: Tensor, half: int) -> Tensor:
    """Return images that depend on one half of the pixels alone, `[B, C, H, W]`.

    Args:
        pixels: Images `[B, C, H, W]`, noisy ones among them.
        half: 0 for the pixels whose row and column add up to an even number, 1 for the others. Each of the rest becomes
            the mean of its two to four neighbours above, below, left and right (one in an image of two pixels).

    Example:
        >>> filled(torch.tensor([[[[1.0, 9.0], [9.0, 3.0]]]]), 0)
        tensor([[[[1., 2.],
                  [2., 3.]]]])
    """
    height, width = pixels.shape[2:]
    places = torch.arange(height, device=pixels.device).view(-1, 1) + torch.arange(width, device=pixels.device)
    own = (places % 2 == half).to(pixels)
    return torch.where(own > 0, pixels, _neighbours(pixels.where(own > 0, 0.0)) / _neighbours(own.expand(1, 1, -1, -1)))


def _neighbours(values: Tensor) -> Tensor:
    """Return the sum of the neighbours above, below, left and right of each place, `[B, C, H, W]`."""
    summed = torch.zeros_like(values)
    summed[:, :, 1:] += values[:, :, :-1]
    summed[:, :, :-1] += values[:, :, 1:]
    summed[:, :, :, 1:] += values[:, :, :, :-1]
    summed[:, :, :, :-1] += values[:, :, :, 1:]
    return summed


def _certificate(
    smoothed: Smoothed, image: Tensor, label: int, number: int, samples: Samples, done: Callable[[int], None]
) -> Certificate:
    """Certify one image; see :data:`timm_nrpm.evaluation.certification.Certifier`."""
    if image[0].numel() < 2:
        raise ValueError(f"An image of {list(image.shape)} has one pixel, and no halves: give larger images.")
    noise = smoothed.noise(image, number)
    counted = [  # noise on the other half's pixels is drawn too, and not seen
        [smoothed.votes(image, noise, count // 2, done, partial(filled, half=half)) for half in (0, 1)]
        for count in (samples.n0, samples.n)
    ]
    selection, votes = (torch.stack(halves) for halves in counted)
    candidate = int(selection.sum(0)[:-1].argmax())
    first, second = votes[:, candidate].tolist()
    radius = halves_radius((first, second), samples.n // 2, samples.confidence, smoothed.sigma)
    return Certificate(
        label=label,
        predicted=candidate if radius > 0 else None,
        radius=radius,
        candidate=candidate,
        selected=int(selection[:, candidate].sum()),
        votes=first + second,
        not_a_number=int(selection[:, -1].sum() + votes[:, -1].sum()),
        first_votes=first,
    )
