"""Certified robustness: a radius around every image within which no change at all changes the smoothed prediction.

This is randomized smoothing (Cohen et al., arXiv 1902.02918). It follows no gradient, so no gradient can mislead it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

from timm_nrpm.checks import check_integer
from timm_nrpm.data.images import check_pixels
from timm_nrpm.evaluation.certificates import (
    WHOLE,
    Certificate,
    CertificationReport,
    alpha_of,
    certified_radius,
    check_confidence,
    lower_bound,
)
from timm_nrpm.evaluation.smoothed import Smoothed
from timm_nrpm.jobs.journal import Journal, digest_of
from timm_nrpm.jobs.progress import progress_bar
from timm_nrpm.models.base import weights_sha256
from timm_nrpm.models.modes import evaluating
from timm_nrpm.models.reprogramming import identity_of, lambdas
from timm_nrpm.version import __version__

FORMAT = 2


@dataclass(frozen=True)
class Samples:
    """How many samples a certificate takes.

    Args:
        n0, n: Number of samples that choose the class, and number of samples that bound its probability, of all parts
            of the image together.
        confidence: Probability that the certificate is right, from 0.5 to below 1.
        parts: Number of parts of the image that share the samples, and the probability of being wrong, equally.
        least: Probability that the class must exceed, below 1.

    Raises:
        ValueError: A number is outside its range, or `n` is so small that nothing could be certified.
    """

    n0: int
    n: int
    confidence: float
    parts: int = 1
    least: float = 0.5

    def __post_init__(self) -> None:
        for name, value in (("n0", self.n0), ("n", self.n)):
            object.__setattr__(self, name, check_integer(name, value, least=1))
            if getattr(self, name) % self.parts:
                raise ValueError(
                    f"{name}={value} is not allowed: {self.parts} parts of an image share the samples equally, so give "
                    f"a multiple of {self.parts}."
                )
        object.__setattr__(self, "confidence", check_confidence(self.confidence))
        # If all samples of a part agree, its bound is alpha ** (1 / n), which must exceed `least`.
        fewest = math.floor(math.log2(alpha_of(self.confidence) / self.parts) / math.log2(self.least)) + 1
        check_enough(self.n, self.confidence, self.parts * fewest)


Certifier = Callable[[Smoothed, Tensor, int, int, Samples, Callable[[int], None]], Certificate]
"""Function that certifies an image: from a model under noise, the pixels `[C, H, W]`, the right class, the image's
number in the loader, on which the noise depends, the samples, and a function that is called after every batch with its
number of samples. Its caller takes the time."""


def certify(
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
    """Certify the smoothed model, which predicts the class that `model` gives most often under noise (Cohen et al.,
    arXiv 1902.02918, section 3.2.2, CERTIFY).

    The noise N(0, sigma^2) is added to pixels in [0, 1], before normalisation, and the sum is not clamped. The noise
    depends only on the seed, the number of the image and the number of the sample. The certificates hold for the
    predictions of :func:`smoothed_predict`, not for those of `model` itself, and in exact arithmetic (arXiv 2207.07209
    shows what rounding can do).

    Args:
        model: Classifier of normalised images, or a wrapper of one. It is left unchanged.
        loader: Batches of pixels `[B, C, H, W]` in [0, 1] and labels `[B]`.
        sigma: Standard deviation of the noise, in pixel units. A larger one certifies larger radii of fewer images.
        n0, n: Number of samples that choose the class, and number of samples that bound its probability. No radius
            exceeds :attr:`CertificationReport.largest_radius`, which grows with `n`; the paper has n = 100,000.
        confidence: Probability that the certificate of an image is right, from 0.5 to below 1. The default corresponds
            to the paper's alpha of 0.001, the probability that it is wrong.
        seed: Seed of the noise, >= 0.
        batch_size: Number of samples in a forward. Another batch size may round logits, and so votes, differently.
        mean, std: The model's normalisation, as in :func:`timm_nrpm.evaluate`.
        name: Name of the model in the report; by default its architecture and lambda.
        resume: File to which every finished image is added; it is created if it does not exist. A run that was stopped,
            even by SIGKILL, continues from there and gives the same report as an uninterrupted run.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: A setting is outside its range, `n` is so small that nothing could be certified, pixels are outside
            [0, 1], labels are not classes of the model, the loader is empty, or `resume` belongs to another run.

    Example:
        >>> report = certify(model, loader, sigma=0.25, n=500, resume="certified.jsonl", progress=True)
        >>> print(report)
        resnet8_digits, lambda 0.5, 32 images, sigma 0.25: certified ... %, abstained ... %, average ...
    """
    smoothed, samples = Smoothed(model, mean, std, sigma, seed, batch_size), Samples(n0, n, confidence)
    return certified(smoothed, loader, samples, WHOLE, certificate_of, name, resume, progress)


def certified(
    smoothed: Smoothed,
    loader: Iterable[tuple[Tensor, Tensor]],
    samples: Samples,
    smoothing: str,
    certifier: Certifier,
    name: str | None,
    resume: str | Path | None,
    progress: bool,
) -> CertificationReport:
    """Certify all images of a loader, one by one, and keep them in a journal.

    Args:
        smoothed: Model under noise.
        loader: Batches of pixels `[B, C, H, W]` in [0, 1] and labels `[B]`.
        samples: Number of samples.
        smoothing: Way of smoothing, as in :class:`CertificationReport`.
        certifier: Function that certifies an image in this way.
        name, resume, progress: The same as in :func:`certify`.
    """
    model = smoothed.net.model
    versions = {"timm_nrpm": __version__, "torch": str(torch.__version__), "timm": timm.__version__}
    weights = weights_sha256(model.state_dict())
    # The format alone tells the ways apart, so that journals from before there were two of them are still read.
    settings = {"format": FORMAT if smoothing == WHOLE else f"{FORMAT}, {smoothing}", "sigma": smoothed.sigma}
    settings |= {"n0": samples.n0, "n": samples.n, "confidence": samples.confidence, "seed": smoothed.seed}
    settings |= {"least": samples.least} if samples.least != 0.5 else {}
    journal = Journal(resume, {**settings, "versions": versions, "weights": weights, **identity_of(smoothed.net)})
    images = _certified(journal)
    before, seen, drawn = len(images), 0, samples.n0 + samples.n
    # A DataLoader draws a seed from the global generator, whose state is restored afterwards.
    with evaluating(model), torch.random.fork_rng(devices=[]), progress_bar(progress, counted=True) as bar:
        task = bar.add_task(f"Certifying, sigma {smoothed.sigma:g}", total=None)
        for number, (pixels, label, total) in enumerate(smoothed.images(loader)):
            seen = number + 1
            digest = digest_of(pixels, torch.tensor(label))
            if journal.has(number, digest):
                continue
            if number == before:
                bar.reset(task, completed=number)  # the estimate of the time left ignores skipped images
            bar.update(task, total=total, completed=number)
            begin = time.perf_counter()
            found = certifier(smoothed, pixels, label, number, samples, lambda done: bar.advance(task, done / drawn))
            certificate = replace(found, seconds=time.perf_counter() - begin)
            journal.add(number, {"images": digest, "certificate": asdict(certificate)})
            images.append(certificate)
            bar.update(task, completed=seen)
    _check_given(seen, len(images), resume)
    return CertificationReport(
        name=_name(model) if name is None else name,
        sigma=smoothed.sigma,
        n0=samples.n0,
        n=samples.n,
        confidence=samples.confidence,
        seed=smoothed.seed,
        weights=weights,
        versions=versions,
        images=tuple(images),
        smoothing=smoothing,
        least=samples.least,
    )


def _certified(journal: Journal) -> list[Certificate]:
    """Return the certificates that a journal holds, in the order of their images.

    Raises:
        ValueError: The journal does not hold each image once, from the first on.
    """
    if list(journal.rows) != list(range(len(journal.rows))):
        raise ValueError(f"{journal.path} does not hold each image once: give another file.")
    return [Certificate(**row["certificate"]) for row in journal.rows.values()]


def _check_given(given: int, certified: int, resume: str | Path | None) -> None:
    """Raise a ValueError if the loader gave no images, or fewer than the journal holds."""
    if not certified:
        raise ValueError("The loader gave no images: there is nothing to certify.")
    if given < certified:
        raise ValueError(
            f"{resume} holds {certified} images, and the loader gave {given}: give the loader it was written with, or "
            "another file."
        )


def smoothed_predict(
    model: nn.Module,
    pixels: Tensor,
    sigma: float = 0.25,
    *,
    n: int = 1000,
    confidence: float = 0.999,
    seed: int = 0,
    batch_size: int = 100,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
) -> tuple[int | None, ...]:
    """Return the smoothed model's class of every image, or None where it abstains (Cohen et al., section 3.2.1,
    PREDICT).

    It abstains unless the numbers of votes of the two most frequent classes differ significantly at level
    `1 - confidence` by the two-sided binomial test.

    Args:
        model: Classifier of normalised images, or a wrapper of one. It is left unchanged.
        pixels: Images `[B, C, H, W]` in [0, 1].
        n: Number of samples that vote on the class of each image.
        sigma, confidence, seed, batch_size, mean, std: The same as in :func:`certify`.

    Raises:
        ValueError: A setting is outside its range, `n` is so small that the model could only abstain, or pixels are
            outside [0, 1].

    Example:
        >>> smoothed_predict(model, pixels[:3], sigma=0.25)
        (2, 3, 4)
    """
    from scipy.stats import binomtest

    smoothed = Smoothed(model, mean, std, sigma, seed, batch_size)
    confidence, n = check_confidence(confidence), check_integer("n", n, least=1)
    alpha = alpha_of(confidence)
    # If all n samples agree, the test gives p = 2 * 2 ** -n, which must not exceed alpha.
    check_enough(n, confidence, math.ceil(1 - math.log2(alpha)))
    pixels = check_pixels(pixels)
    predicted: list[int | None] = []
    with evaluating(smoothed.net.model):
        for number, image in enumerate(smoothed.place(pixels)):
            votes = smoothed.votes(image, smoothed.noise(image, number), n)
            (first, second), (winner, _) = (t.tolist() for t in votes.topk(2))
            sure = binomtest(first, first + second, 0.5).pvalue <= alpha
            predicted.append(winner if sure and winner < len(votes) - 1 else None)
    return tuple(predicted)


def certificate_of(
    smoothed: Smoothed, image: Tensor, label: int, number: int, samples: Samples, done: Callable[[int], None]
) -> Certificate:
    """Certify one image (Cohen et al., section 3.2.2, CERTIFY); see :data:`Certifier`."""
    noise = smoothed.noise(image, number)
    selection, votes = (smoothed.votes(image, noise, count, done) for count in (samples.n0, samples.n))
    candidate = int(selection[:-1].argmax())
    low = lower_bound(int(votes[candidate]), samples.n, samples.confidence)
    return Certificate(
        label=label,
        predicted=candidate if low > samples.least else None,
        radius=certified_radius(low, smoothed.sigma, samples.least),
        candidate=candidate,
        selected=int(selection[candidate]),
        votes=int(votes[candidate]),
        not_a_number=int(selection[-1] + votes[-1]),
    )


def check_enough(n: int, confidence: float, least: int) -> None:
    """Raise a ValueError if `n` is below `least`, the number of samples that is needed if all of them agree."""
    if n < least:
        raise ValueError(
            f"n={n} is not allowed: at confidence {confidence} the smoothed model would abstain on every image, even "
            f"if all samples agreed; give n={least} or more, such as 1000."
        )


def _name(model: nn.Module) -> str:
    """Return the architecture of a model, and its lambda if it is reprogrammed."""
    name = (getattr(model, "pretrained_cfg", None) or {}).get("architecture") or type(model).__name__
    lams = [f"{lam:g}" for lam in sorted(lambdas(model).values())]
    return name if not lams else f"{name}, lambda " + " to ".join(dict.fromkeys((lams[0], lams[-1])))
