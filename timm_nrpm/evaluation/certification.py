"""Certified robustness: a radius around every image within which no change at all changes the smoothed prediction.

This is randomized smoothing (Cohen et al., arXiv 1902.02918). It follows no gradient, so no gradient can mislead it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

from timm_nrpm.checks import check_integer, check_number
from timm_nrpm.data.images import check_batch, check_labels, check_pixels, count_of
from timm_nrpm.data.ordering import seed_of
from timm_nrpm.evaluation.certificates import (
    Certificate,
    CertificationReport,
    alpha_of,
    certified_radius,
    check_confidence,
    lower_bound,
)
from timm_nrpm.jobs.journal import Journal, digest_of
from timm_nrpm.jobs.progress import progress_bar
from timm_nrpm.models.base import weights_sha256
from timm_nrpm.models.modes import evaluating
from timm_nrpm.models.reprogramming import identity_of, lambdas
from timm_nrpm.nn.wrappers import subject_of
from timm_nrpm.version import __version__

FORMAT = 2


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
    smoothed = _Smoothed(model, mean, std, sigma, confidence, seed, batch_size)
    model = smoothed.net.model
    n0, n = check_integer("n0", n0, least=1), check_integer("n", n, least=1)
    # If all n samples agree, the bound is alpha ** (1 / n), which must exceed one half.
    _check_enough(n, smoothed.confidence, math.floor(-math.log2(alpha_of(smoothed.confidence))) + 1)
    versions = {"timm_nrpm": __version__, "torch": str(torch.__version__), "timm": timm.__version__}
    weights = weights_sha256(model.state_dict())
    settings = {"sigma": smoothed.sigma, "n0": n0, "n": n, "confidence": smoothed.confidence, "seed": smoothed.seed}
    identity = {"format": FORMAT, **settings, "versions": versions, "weights": weights}
    journal = Journal(resume, {**identity, **identity_of(smoothed.net)})
    images = _certified(journal)
    before, seen = len(images), 0
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
            certificate = smoothed.certificate(
                pixels, label, number, n0, n, lambda done: bar.advance(task, done / (n0 + n))
            )
            journal.add(number, {"images": digest, "certificate": asdict(certificate)})
            images.append(certificate)
            bar.update(task, completed=seen)
    _check_given(seen, len(images), resume)
    return CertificationReport(
        name=_name(model) if name is None else name,
        sigma=smoothed.sigma,
        n0=n0,
        n=n,
        confidence=smoothed.confidence,
        seed=smoothed.seed,
        weights=weights,
        versions=versions,
        images=tuple(images),
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

    smoothed = _Smoothed(model, mean, std, sigma, confidence, seed, batch_size)
    n, alpha = check_integer("n", n, least=1), alpha_of(smoothed.confidence)
    # If all n samples agree, the test gives p = 2 * 2 ** -n, which must not exceed alpha.
    _check_enough(n, smoothed.confidence, math.ceil(1 - math.log2(alpha)))
    pixels = check_pixels(pixels)
    predicted: list[int | None] = []
    with evaluating(smoothed.net.model):
        for number, image in enumerate(smoothed.place(pixels)):
            votes = smoothed.votes(image, smoothed.noise(image, number), n)
            (first, second), (winner, _) = (t.tolist() for t in votes.topk(2))
            sure = binomtest(first, first + second, 0.5).pvalue <= alpha
            predicted.append(winner if sure and winner < len(votes) - 1 else None)
    return tuple(predicted)


class _Smoothed:
    """A model under noise. Its constructor raises a ValueError for a setting outside its range."""

    def __init__(
        self,
        model: nn.Module,
        mean: tuple[float, ...] | None,
        std: tuple[float, ...] | None,
        sigma: float,
        confidence: float,
        seed: int,
        batch_size: int,
    ) -> None:
        self.sigma = check_number("sigma", sigma, above=0, why=", in pixel units of [0, 1]")
        self.confidence = check_confidence(confidence)
        self.seed = check_integer("seed", seed, least=0)
        self.batch_size = check_integer("batch_size", batch_size, least=1)
        self.net = subject_of(model, mean, std).on_pixels()

    def place(self, pixels: Tensor) -> Tensor:
        """Return pixels on the model's device, in float32, the dtype of the noise for a model of any dtype."""
        return pixels.to(self.net.mean.device).float()

    def images(self, loader: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, int, int | None]]:
        """Yield every image `[C, H, W]`, its label, and an estimate of the number of images, None without a length."""
        batches, before, classes = count_of(loader), 0, 0
        for i, batch in enumerate(loader):
            pixels, labels = check_batch(batch)
            placed = self.place(pixels)
            classes = classes or self.logits(placed[:1]).shape[1]
            labels = check_labels(labels, classes, count=len(pixels))
            total = before + len(pixels) * (batches - i) if batches else None
            for image, label in zip(placed, labels.tolist(), strict=True):
                yield image, label, total
            before += len(pixels)

    def noise(self, image: Tensor, number: int) -> Iterator[Tensor]:
        """Yield standard normal noise `[C, H, W]` for samples 0, 1, ... of an image with this number."""
        generator = torch.Generator().manual_seed(seed_of(self.seed, number))
        while True:
            # One call for each sample, since the values of a larger call depend on its size; on the CPU, so that the
            # noise is the same for all devices.
            yield torch.randn(image.shape, generator=generator, dtype=torch.float32, device="cpu")

    def certificate(
        self, image: Tensor, label: int, number: int, n0: int, n: int, done: Callable[[int], None]
    ) -> Certificate:
        """Certify one image (Cohen et al., section 3.2.2, CERTIFY).

        Args:
            image: Pixels `[C, H, W]`.
            label: The right class.
            number: Place of the image in the loader, on which the noise depends.
            n0, n: Number of samples that choose the class, and number of samples that bound its probability.
            done: Function that is called after every batch with its number of samples.
        """
        begin, noise = time.perf_counter(), self.noise(image, number)
        selection, votes = (self.votes(image, noise, samples, done) for samples in (n0, n))
        candidate = int(selection[:-1].argmax())
        low = lower_bound(int(votes[candidate]), n, self.confidence)
        return Certificate(
            label=label,
            predicted=candidate if low > 0.5 else None,
            radius=certified_radius(low, self.sigma),
            candidate=candidate,
            selected=int(selection[candidate]),
            votes=int(votes[candidate]),
            not_a_number=int(selection[-1] + votes[-1]),
            seconds=time.perf_counter() - begin,
        )

    @torch.no_grad()
    def logits(self, pixels: Tensor) -> Tensor:
        return self.net(pixels)

    def votes(
        self, image: Tensor, noise: Iterator[Tensor], samples: int, done: Callable[[int], None] | None = None
    ) -> Tensor:
        """Count the next samples of each class and, in the last entry, those whose logits contain NaN, `[N + 1]`."""
        counted = torch.zeros((), dtype=torch.int64)
        for start in range(0, samples, self.batch_size):
            drawn = torch.stack(list(islice(noise, min(self.batch_size, samples - start))))
            logits = self.logits(image + self.sigma * drawn.to(image.device))
            classes = logits.shape[1]
            chosen = torch.where(logits.isnan().any(1), classes, logits.argmax(1)).cpu()
            counted = counted + chosen.bincount(minlength=classes + 1)
            if done is not None:
                done(len(drawn))
        return counted


def _check_enough(n: int, confidence: float, least: int) -> None:
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
