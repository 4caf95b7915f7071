"""Results of randomized smoothing (Cohen et al., arXiv 1902.02918): certified radii and their curve."""

from __future__ import annotations

import json
import math
from bisect import bisect_left
from dataclasses import asdict, dataclass, field
from typing import Any

from timm_nrpm.checks import check_choice, check_number

WHOLE, HALVES = "whole", "halves"
"""Ways of smoothing: noise on all pixels at once, or on each of two halves of the pixels by itself."""


@dataclass(frozen=True)
class Certificate:
    """What is certified for one image, with the probability given by the `confidence` of the report.

    Attributes:
        label: The right class.
        predicted: The smoothed model's class, or None where it abstained.
        radius: Certified L2 radius, in pixel units of [0, 1]: no shorter change of the image changes `predicted`. It is
            0 where the model abstained.
        candidate: The most frequent class among the first n0 samples.
        selected, votes: Number of the first n0 samples, and of the n samples after them, that got the candidate class.
        not_a_number: Number of the n0 + n samples whose logits contained NaN. They vote for no class.
        seconds: Time spent on the image, in seconds. Certificates that differ only in this are equal.
        first_votes: Number of the `votes` that the first half of the pixels gave; None where all pixels had noise at
            once.
    """

    label: int
    predicted: int | None
    radius: float
    candidate: int
    selected: int
    votes: int
    not_a_number: int = 0
    seconds: float = field(default=0.0, compare=False)
    first_votes: int | None = None


@dataclass(frozen=True)
class CertificationReport:
    """Certificates of a model under Gaussian noise, image by image.

    Attributes:
        name: Name of the model, for texts and pictures.
        sigma: Standard deviation of the noise, in pixel units of [0, 1].
        n0, n: Number of samples that choose the class, and number of samples that bound its probability.
        confidence: Probability that the certificate of an image is right, from 0.5 to below 1. Cohen et al. call
            `1 - confidence` alpha.
        seed: Seed of the noise.
        weights: Hash of the model's weights, by :func:`timm_nrpm.models.base.weights_sha256`.
        versions: Versions of the libraries, by name.
        images: Certificates of the images, in the order of the loader.
        smoothing: `"whole"` for noise on all pixels at once (:func:`timm_nrpm.certify`), or `"halves"` for two halves
            of the pixels, each with half of the n0 and of the n samples (:func:`timm_nrpm.halves.certify_halves`).
        least: Probability under noise that a class must keep. It is one half but for mixtures with another model
            (:func:`timm_nrpm.ensembles.certified.certify_mixture`).

    Example:
        >>> report = certify(model, loader, sigma=0.25, n=500)
        >>> report.certified_accuracy(0.0), report.certified_accuracy(0.25), report.abstained
        (0.9, 0.7, 0.1)
    """

    name: str
    sigma: float
    n0: int
    n: int
    confidence: float
    seed: int
    weights: str
    versions: dict[str, str]
    images: tuple[Certificate, ...] = field(repr=False)
    smoothing: str = WHOLE
    least: float = 0.5

    def __post_init__(self) -> None:
        check_confidence(self.confidence)
        check_choice("smoothing", self.smoothing, (WHOLE, HALVES))

    def __str__(self) -> str:
        shares = f"certified {100 * self.certified_accuracy(0.0):.1f} %, abstained {100 * self.abstained:.1f} %"
        radius = f"average certified radius {self.average_certified_radius:.3f}"
        summary = f"{self.title}, {len(self.images)} images, sigma {self.sigma:g}: {shares}, {radius}"
        return f"{summary}. {self.why_abstained()}" if self.abstained == 1 else summary

    @property
    def title(self) -> str:
        """Name of the model, and how it was smoothed unless that was as a whole."""
        return self.name if self.smoothing == WHOLE else f"{self.name}, in halves"

    def why_abstained(self) -> str:
        """Return why images have no certificate: how many votes one takes, and the most that such an image had."""
        most = max((image.votes for image in self.images if image.predicted is None), default=0)
        even = "" if self.smoothing == WHOLE else ", if both halves give as many"
        reason = (
            f"At confidence {self.confidence} a certificate takes {self.votes_needed} of {self.n} votes for one class"
            f"{even}, and no image had more than {most}: give more samples n, less noise sigma, or a model trained "
            "under noise."
        )
        lost, drawn = sum(image.not_a_number for image in self.images), len(self.images) * (self.n0 + self.n)
        return f"{reason} {lost} of {drawn} noisy samples gave logits that are no numbers." if lost else reason

    @property
    def right(self) -> list[float]:
        """Radii of the images that the smoothed model gets right, in ascending order."""
        return sorted(image.radius for image in self.images if image.predicted == image.label)

    def certified_accuracy(self, radius: float) -> float:
        """Return the share of the images that are right and stay right under every change shorter than `radius`, an L2
        distance in pixel units.

        On average, a share `1 - confidence` of the certificates may be wrong (Cohen et al., section 4).
        """
        radius = check_number("radius", radius, least=0, why=", an L2 distance in pixel units")
        return sum(certified >= radius for certified in self.right) / len(self.images)

    def curve(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Return radii, ascending from 0, and the certified accuracy at each: all corners of a curve like those in
        Figure 6 of Cohen et al.

        Between two radii the accuracy is that of the larger radius, and beyond the last radius it is 0.
        """
        right = self.right
        radii = sorted({0.0, *right})
        return tuple(radii), tuple((len(right) - bisect_left(right, radius)) / len(self.images) for radius in radii)

    @property
    def average_certified_radius(self) -> float:
        """Mean radius, where images that are wrong count as 0 (Zhai et al., arXiv 2001.02378, section 5).

        Easy images dominate it (arXiv 2410.06895), so look at the curve too.
        """
        return sum(self.right) / len(self.images)

    @property
    def abstained(self) -> float:
        """Share of the images on which the smoothed model abstains."""
        return sum(image.predicted is None for image in self.images) / len(self.images)

    @property
    def votes_needed(self) -> int:
        """Smallest number of the n votes that one class needs for a certificate; in halves, if both give as many."""
        if self.smoothing == WHOLE:
            return bisect_left(range(self.n + 1), True, key=lambda votes: self._radius(votes) > 0)
        return 2 * bisect_left(range(self.n // 2 + 1), True, key=lambda votes: self._radius(2 * votes) > 0)

    @property
    def largest_radius(self) -> float:
        """Radius where all n samples agree. Only more samples or more noise allow a larger one, whatever the model."""
        return self._radius(self.n)

    def _radius(self, votes: int) -> float:
        """Radius that `votes` of the n votes certify, as many of them of either half."""
        if self.smoothing == WHOLE:
            return certified_radius(lower_bound(votes, self.n, self.confidence), self.sigma, self.least)
        return halves_radius((votes // 2, votes // 2), self.n // 2, self.confidence, self.sigma)

    @property
    def seconds(self) -> float:
        """Time spent on all images, in seconds, over all runs if the certification was interrupted."""
        return sum(image.seconds for image in self.images)

    def to_json(self) -> str:
        names = ("average_certified_radius", "abstained", "largest_radius", "seconds")
        return json.dumps({**asdict(self), "summary": {name: getattr(self, name) for name in names}}, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> CertificationReport:
        data = json.loads(text)
        del data["summary"]
        return cls(**{**data, "images": tuple(Certificate(**row) for row in data["images"])})


_MEANING = ", the probability that a certificate is right, such as 0.999"


def check_confidence(value: Any) -> float:
    """Return the confidence as a float, or raise a ValueError if it is outside its range, as an alpha is."""
    confidence = check_number("confidence", value, why=_MEANING)
    alpha = f"; an alpha (the probability that it is wrong) of {confidence} is confidence={1 - confidence}"
    why = _MEANING + alpha if 0 < confidence < 0.5 else _MEANING
    return check_number("confidence", value, least=0.5, below=1, why=why)


def alpha_of(confidence: float) -> float:
    """Return the probability `1 - confidence` that a certificate is wrong, which Cohen et al. call alpha.

    For a confidence of one half or more this difference is exact in floating point, however near to 1 it is.
    """
    return 1.0 - check_confidence(confidence)


def lower_bound(votes: int, n: int, confidence: float) -> float:
    """Return an exact lower bound of a probability, which holds with probability `confidence` or more.

    It is the one-sided bound of Clopper and Pearson (LOWERCONFBOUND in Cohen et al., section 3.2.2): the probability at
    which `votes` or more of `n` samples come up with probability `1 - confidence`.

    Args:
        votes: Number of samples that got the class.
        n: Number of all samples.
        confidence: Probability that the bound holds, from 0.5 to below 1.

    Example:
        >>> lower_bound(1000, 1000, confidence=0.999)
        0.9931160484209338
    """
    return _bound(votes, n, alpha_of(confidence))


def _bound(votes: int, n: int, alpha: float) -> float:
    """Return the lower bound that is too high with probability `alpha` at most."""
    from scipy.stats import beta

    # The bound stays below 1, which no number of samples can prove, and whose radius is infinite.
    low = float(beta.ppf(alpha, votes, n - votes + 1)) if votes else 0.0
    return min(low, math.nextafter(1.0, 0.0))


def certified_radius(probability: float, sigma: float, least: float = 0.5) -> float:
    """Return the L2 radius in pixel units within which a class keeps more than `least` of the probability under noise,
    `sigma * (Phi^-1(probability) - Phi^-1(least))`, or 0 if it has no more than that (Cohen et al., section 3.2.2, for
    one half, which is enough to be the most probable class)."""
    from scipy.stats import norm

    return sigma * float(norm.ppf(probability) - norm.ppf(least)) if probability > least else 0.0


def halves_radius(votes: tuple[int, int], n: int, confidence: float, sigma: float) -> float:
    """Return the L2 radius, in pixel units, that two halves of the pixels certify together (Xia et al., arXiv
    2404.09586), or 0 if they certify none.

    Let p and q be the probabilities of the class in the two halves, each under noise of its own pixels alone. A change
    of the image that has length u in the first half and v in the second leaves the class at least
    `Phi(Phi^-1(p) - u / sigma)` in the first half, and `Phi(Phi^-1(q) - v / sigma)` in the second (Cohen et al.,
    section 3.1). The class has the largest sum of both probabilities as long as its own exceeds 1, since the sums of
    all classes add up to 2. Because `Phi(a) + Phi(b) > 1` means `a + b > 0`, that is as long as
    `u + v < sigma * (Phi^-1(p) + Phi^-1(q))`. A change of length r, whose square is `u^2 + v^2`, has
    `u + v <= sqrt(2) * r`, so every r below `sigma * (Phi^-1(p) + Phi^-1(q)) / sqrt(2)` is safe. A half in which the
    class has less than one half of the probability takes away from the other: to count it as 0 would claim too much.

    Both probabilities are bounded from below, each with half of the probability `1 - confidence` of being wrong, so
    that both bounds hold together with probability `confidence` (the union bound).

    Args:
        votes: Number of samples of each half that got the class.
        n: Number of samples of each half.
        confidence: Probability that the radius is right, from 0.5 to below 1.
        sigma: Standard deviation of the noise, in pixel units.

    Example:
        >>> halves_radius((500, 500), 500, confidence=0.999, sigma=0.25)
        0.7664
        >>> halves_radius((500, 100), 500, confidence=0.999, sigma=0.25)
        0.1962
    """
    from scipy.stats import norm

    alpha = alpha_of(confidence) / 2
    together = sum(float(norm.ppf(_bound(each, n, alpha))) for each in votes)
    return max(0.0, sigma * together / math.sqrt(2))
