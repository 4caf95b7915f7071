"""What randomized smoothing certified (Cohen et al., arXiv 1902.02918): radii and their curve."""

from __future__ import annotations

import json
import math
from bisect import bisect_left
from dataclasses import asdict, dataclass, field
from typing import Any

from timm_nrpm.checks import check_number


@dataclass(frozen=True)
class Certificate:
    """What is certain of one image, with the probability that is the `confidence` of the report.

    Attributes:
        label: The right class.
        predicted: The smoothed model's class, or None where it abstained.
        radius: L2, in pixel units of [0, 1]: no shorter change moves `predicted`. 0 where it abstained.
        candidate: The class that most of the first n0 samples had.
        selected, votes: Number of the first n0 samples, and of the n samples after them, that had the candidate.
        not_a_number: Number of all samples whose logits were no numbers. They vote for no class.
        seconds: Time that the image took, in seconds. Two certificates that differ in this alone are equal.
    """

    label: int
    predicted: int | None
    radius: float
    candidate: int
    selected: int
    votes: int
    not_a_number: int = 0
    seconds: float = field(default=0.0, compare=False)


@dataclass(frozen=True)
class CertificationReport:
    """What is certain of a model under Gaussian noise, image by image.

    Attributes:
        name: Name of the model, for people and pictures.
        sigma: Standard deviation of the noise, in pixel units of [0, 1].
        n0, n: Samples that choose the class, and samples that bound its probability.
        confidence: Probability, for every image, that its certificate is right, from 0.5 to below 1; what Cohen et al.
            call alpha is `1 - confidence`.
        seed: Seed of the noise.
        weights: :func:`timm_nrpm.models.base.weights_sha256` of the model.
        versions: Versions of the libraries, by name.
        images: Certificates of the images, in the order of the loader.

    Example:
        >>> report = certify(model, loader, sigma=0.25, n=500)
        >>> report.certified_accuracy(0.0), report.certified_accuracy(0.25), report.abstained
        (0.861, 0.633, 0.139)
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

    def __post_init__(self) -> None:
        check_confidence(self.confidence)

    def __str__(self) -> str:
        shares = f"certified {100 * self.certified_accuracy(0.0):.1f} %, abstained {100 * self.abstained:.1f} %"
        radius = f"average certified radius {self.average_certified_radius:.3f}"
        found = f"{self.name}, {len(self.images)} images, sigma {self.sigma:g}: {shares}, {radius}"
        return f"{found}. {self.why_abstained()}" if self.abstained == 1 else found

    def why_abstained(self) -> str:
        """Why there is no certificate for an image that has none: the votes that it takes, and the most there were."""
        most = max((image.votes for image in self.images if image.predicted is None), default=0)
        reason = (
            f"At confidence {self.confidence} a certificate takes {self.votes_needed} of {self.n} votes for one class, "
            f"and no image had more than {most}: give more samples n, less noise sigma, or a model trained under noise."
        )
        lost, drawn = sum(image.not_a_number for image in self.images), len(self.images) * (self.n0 + self.n)
        return f"{reason} {lost} of {drawn} noisy samples gave logits that are no numbers." if lost else reason

    @property
    def right(self) -> list[float]:
        """Radii of the images that the smoothed model gets right, ascending."""
        return sorted(image.radius for image in self.images if image.predicted == image.label)

    def certified_accuracy(self, radius: float) -> float:
        """Share of the images that are right and stay so under every change shorter than `radius`, L2 in pixel units.

        On average, a share `1 - confidence` of the certificates may be wrong (Cohen et al., section 4).
        """
        radius = check_number("radius", radius, least=0, why=", an L2 distance in pixel units")
        return sum(one >= radius for one in self.right) / len(self.images)

    def curve(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Radii, ascending from 0, and the certified accuracy at each: all corners of Figure 6 of Cohen et al.

        Between two radii the accuracy is that of the larger, and beyond the last it is 0.
        """
        right = self.right
        radii = sorted({0.0, *right})
        return tuple(radii), tuple((len(right) - bisect_left(right, radius)) / len(self.images) for radius in radii)

    @property
    def average_certified_radius(self) -> float:
        """Mean radius, 0 for images that are wrong (Zhai et al., arXiv 2001.02378, section 5).

        Easy images move it most (arXiv 2410.06895): look at the curve too.
        """
        return sum(self.right) / len(self.images)

    @property
    def abstained(self) -> float:
        """Share of the images on which the smoothed model says nothing."""
        return sum(image.predicted is None for image in self.images) / len(self.images)

    @property
    def votes_needed(self) -> int:
        """The fewest of the n votes for one class that certify an image."""
        return bisect_left(range(self.n + 1), True, key=lambda votes: lower_bound(votes, self.n, self.confidence) > 0.5)

    @property
    def largest_radius(self) -> float:
        """The radius where all n samples agree: beyond it, more samples or more noise help, no other model does."""
        return certified_radius(lower_bound(self.n, self.n, self.confidence), self.sigma)

    @property
    def seconds(self) -> float:
        """What all images took, however often they were interrupted."""
        return sum(image.seconds for image in self.images)

    def to_json(self) -> str:
        names = ("average_certified_radius", "abstained", "largest_radius", "seconds")
        return json.dumps({**asdict(self), "summary": {name: getattr(self, name) for name in names}}, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> CertificationReport:
        data = json.loads(text)
        del data["summary"]
        return cls(**{**data, "images": tuple(Certificate(**row) for row in data["images"])})


MEANT = ", the probability that a certificate is right, such as 0.999"


def check_confidence(value: Any) -> float:
    """The confidence as a float, or a ValueError for one outside its range, such as an alpha."""
    confidence = check_number("confidence", value, why=MEANT)
    alpha = f"; an alpha, the probability that it is wrong, of {confidence} is confidence={1 - confidence}"
    why = MEANT + alpha if 0 < confidence < 0.5 else MEANT
    return check_number("confidence", value, least=0.5, below=1, why=why)


def alpha_of(confidence: float) -> float:
    """The probability `1 - confidence` that a certificate is wrong, which Cohen et al. call alpha.

    From one half to 1 the difference of two floats is exact, so that nothing is lost however near 1 confidence is.
    """
    return 1.0 - check_confidence(confidence)


def lower_bound(votes: int, n: int, confidence: float) -> float:
    """The exact lower bound of a probability, which holds with probability `confidence` at least.

    Clopper and Pearson's, one-sided (LOWERCONFBOUND in Cohen et al., section 3.2.2): the probability at which as many
    votes of `n`, or more, come up with probability `1 - confidence`.

    Example:
        >>> lower_bound(1000, 1000, confidence=0.999)
        0.9931160484209338
    """
    from scipy.stats import beta

    # Never 1, of which nobody can be certain, and whose radius is infinite.
    low = float(beta.ppf(alpha_of(confidence), votes, n - votes + 1)) if votes else 0.0
    return min(low, math.nextafter(1.0, 0.0))


def certified_radius(probability: float, sigma: float) -> float:
    """`sigma * Phi^-1(probability)`, L2 in pixel units; 0 up to one half (Cohen et al., section 3.2.2)."""
    from scipy.stats import norm

    return sigma * float(norm.ppf(probability)) if probability > 0.5 else 0.0
