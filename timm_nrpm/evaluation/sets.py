"""Conformal sets of classes, from the probabilities that a model gives: their scores, thresholds and guarantees.

A set holds the classes whose score, the larger the less fitting, is not above a limit that was found on calibration
images. This module counts on probabilities alone; :mod:`timm_nrpm.evaluation.conformal` asks a model for them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from timm_nrpm.checks import check_choice, check_integer, check_number
from timm_nrpm.evaluation.concentration import deviation

METHODS = ("vanilla", "rscp+", "rscp+ptt", "one-sample")
SCORES = ("hps", "aps")
ROUNDING = 1e-9
"""Part of an image by which a quantile may be off, since in floats 100 * 0.29 is less than 29."""
STEEPNESS = 400
"""Steepness of the sigmoid that follows the ranks, the inverse of the temperature 1/400 of arXiv 2404.19651."""


@dataclass(frozen=True)
class Rule:
    """How sets are made, and what is guaranteed of them.

    Args:
        method: One of `METHODS`; see :func:`timm_nrpm.evaluation.conformal.conformal`.
        alpha: Share of the sets that may miss the right class, above 0 and below 1.
        sigma: Standard deviation of the noise, in pixel units of [0, 1], above 0.
        radius: Largest L2 norm of a change of the image, in pixel units, >= 0.
        score: One of `SCORES`: 1 minus the class's probability (Sadinle et al., arXiv 1609.00451), or the sum of the
            probabilities that are larger than the class's (Romano et al., arXiv 2006.02544, without their random part).
        n: Number of noisy copies of an image under RSCP+, two at least; the other methods take one.
        beta: Probability of each of the two errors of estimating a mean from `n` samples that RSCP+ allows for.
        holdout: Share of the calibration images that PTT takes for its ranks, above 0 and below 1.

    Raises:
        ValueError: A setting is outside its range, or `beta` leaves nothing of `alpha`.

    Example:
        >>> rule = Rule("one-sample", alpha=0.1, sigma=0.25, radius=0.125)
        >>> round(rule.level, 4), rule.least
        (0.9626, 26)
    """

    method: str
    alpha: float
    sigma: float
    radius: float
    score: str = "hps"
    n: int = 256
    beta: float = 0.001
    holdout: float = 0.2

    def __post_init__(self) -> None:
        check_choice("method", self.method, METHODS)
        check_choice("score", self.score, SCORES)
        checked = {
            "alpha": check_number("alpha", self.alpha, above=0, below=1, why=", the share of sets that may miss"),
            "sigma": check_number("sigma", self.sigma, above=0, why=", in pixel units of [0, 1]"),
            "radius": check_number("radius", self.radius, least=0, why=", an L2 distance in pixel units of [0, 1]"),
            "n": check_integer("n", self.n, least=2),
            "beta": check_number("beta", self.beta, above=0, below=1),
            "holdout": check_number("holdout", self.holdout, above=0, below=1, why=", a share of the images"),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        if self.is_averaged and 2 * self.beta >= self.alpha:
            raise ValueError(
                f"beta={self.beta} is not allowed: 2 * beta of the alpha of {self.alpha} go to errors of estimation, "
                f"so give less than {self.alpha / 2:g}, such as {self.alpha / 100:g}."
            )

    @property
    def is_averaged(self) -> bool:
        """Whether a score is the mean over several noisy copies."""
        return self.method.startswith("rscp+")

    @property
    def copies(self) -> int:
        """Number of noisy copies of an image; 0 for the image without noise."""
        return {"vanilla": 0, "one-sample": 1}.get(self.method, self.n)

    @property
    def level(self) -> float:
        """Probability with which the right class of a clean image has a score within the threshold."""
        return 1 - self._missed

    @property
    def _missed(self) -> float:
        """Share of clean images whose right class may be above the threshold, precise where it is small."""
        from scipy.stats import norm

        if self.is_averaged:
            return self.alpha - 2 * self.beta
        if self.method == "one-sample":
            return float(norm.sf(norm.isf(self.alpha) + self.radius / self.sigma))
        return self.alpha

    @property
    def least(self) -> float:
        """Smallest number of calibration images, beside those for the ranks, that a threshold takes."""
        return math.ceil((1 - ROUNDING) / self._missed) - 1 if self._missed else math.inf

    def held(self, count: int) -> int:
        """Number of `count` calibration images that PTT takes for its ranks; 0 for the other methods."""
        return math.ceil(self.holdout * count) if self.method == "rscp+ptt" else 0

    def rank(self, count: int) -> int:
        """Place of the threshold among `count` scores in ascending order, from 1 (Vovk et al., 2005).

        Raises:
            ValueError: So few scores have no such place.
        """
        rank = count + 1 - math.floor((count + 1) * self._missed + ROUNDING)
        if rank > count:
            beside = f" beside the share of {self.holdout:g} for the ranks" if self.method == "rscp+ptt" else ""
            raise ValueError(
                f"{count} calibration images{beside} are too few: alpha={self.alpha:g} with {self.method} at radius "
                f"{self.radius:g} and sigma {self.sigma:g} takes {self.least:,} or more, since the threshold is a "
                f"quantile of level {self.level:.6g}. Give more images, a larger alpha or a smaller radius / sigma."
            )
        return rank

    @property
    def guarantee(self) -> str:
        """What holds of the sets, in words."""
        rate = f"with probability {1 - self.alpha:g} or more"
        over = "over the draw of the calibration images and of the image, if these are exchangeable"
        if self.method == "vanilla":
            return f"The set of a clean image holds its class {rate}, {over}; of an attacked image nothing is known."
        return (
            f"The set of an image holds its class {rate}, even if the image was changed by up to L2 {self.radius:g}, "
            f"{over}, and over all noise. The change may depend on anything but the noise of the changed image."
        )


@dataclass(frozen=True)
class Calibrated:
    """A rule with its limit, found on calibration images.

    Attributes:
        rule: The rule.
        images: Number of calibration images that the limit is a quantile of.
        limit: Largest score of a class in a set. Of an averaged score it is the lower bound that counts.
        reference: Scores of the images that were held out for PTT's ranks, ascending; empty for the other methods.
    """

    rule: Rule
    images: int
    limit: float
    reference: tuple[float, ...] = field(default=(), repr=False)

    @property
    def is_trivial(self) -> bool:
        """Whether every set holds all classes, whatever the image."""
        return self.limit >= 1

    def inside(self, probabilities: Tensor) -> Tensor:
        """Return whether each class belongs to each image's set, `[B, N]`.

        Args:
            probabilities: Probabilities `[B, S, N]` in float64 of the image's copies, as many as the rule asks for.
        """
        scores = self.scores(probabilities)
        lowest = scores.mean(1)
        if self.rule.is_averaged:
            lowest = lowest - deviation(scores.movedim(1, -1), self.rule.beta)
        return lowest <= self.limit

    def harm(self, probabilities: Tensor, labels: Tensor) -> Tensor:
        """Return what an attacker raises so that the sets miss the labels `[B]`, `[B]`: the mean score of the label,
        and above all the share of copies that are beyond the limit, if one of them decides."""
        own = _own(self.scores(probabilities), labels)
        beyond = (own > self.limit).double().mean(1)
        return own.mean(1) * (1 if self.rule.is_averaged else 0.001) + beyond * (not self.rule.is_averaged)

    def scores(self, probabilities: Tensor) -> Tensor:
        """Return the score of each class in each copy, in [0, 1], of the shape of `probabilities` `[..., N]`."""
        return _transformed(self.rule, plain_scores(self.rule.score, probabilities), self.reference)


def calibrated(rule: Rule, own: Tensor, seed: int = 0) -> Calibrated:
    """Find the limit of a rule on calibration images.

    Write S(x) for the score of the right class of an image x under noise, and t for the threshold. x' is the changed
    image, which may depend on x, its class, t and the model, but not on the noise of its own forwards.

    With one copy, t is a quantile of the scores at the level L = `rule.level`, so that P(S(x) <= t) >= L for a clean
    image, by exchangeability (Vovk et al., 2005). For each image and each t, if p is the probability over the noise
    that S(x) <= t, then S(x') <= t has the probability c(p) = Phi(Phi^-1(p) - radius / sigma) at least (Cohen et al.,
    arXiv 1902.02918, section 3.1). The function c is convex and rises, so that the mean of c(p) over images and
    thresholds is at least c(L) by Jensen's inequality. That is 1 - alpha, for L = Phi(Phi^-1(1 - alpha) + radius /
    sigma) (arXiv 2506.16553).

    With several copies, let U(x) be an upper bound on the mean of S(x) over the noise, from the copies of x, which is
    wrong with probability beta at most. t is a quantile of U at the level L = 1 - alpha + 2 * beta, so that the mean of
    S(x) is not above t, but with probability alpha - beta: U(x) is above t, or wrong. A change of the image moves
    Phi^-1 of the mean by radius / sigma at most (Gendler et al., ICLR 2022), so that the mean of S(x') is not above
    Phi(Phi^-1(t) + radius / sigma), the limit. The set compares the limit with a lower bound on the mean of S(x'),
    which is wrong with probability beta at most. This is RSCP+ (Yan et al., arXiv 2404.19651), but for one bound: there
    Hoeffding's is added to a quantile of the means, and here each calibration image has its own, the smaller of two.

    Args:
        rule: The rule.
        own: Scores of the right class in the copies of each calibration image, `[M, S]`, by :func:`own_scores`.
        seed: Seed that chooses the images that are held out for PTT's ranks.

    Raises:
        ValueError: There are too few images; the message says how many it takes.
    """
    reference: tuple[float, ...] = ()
    if rule.method == "rscp+ptt":
        order = torch.randperm(len(own), generator=torch.Generator().manual_seed(seed))
        held = rule.held(len(own))
        reference = tuple(own[order[:held], 0].sort().values.tolist())
        own = own[order[held:]]
    own = _transformed(rule, own, reference)
    rank = rule.rank(len(own))
    if not rule.is_averaged:
        return Calibrated(rule, len(own), float(own[:, 0].sort().values[rank - 1]), reference)
    threshold = float((own.mean(1) + deviation(own, rule.beta)).sort().values[rank - 1])
    return Calibrated(rule, len(own), _moved(min(threshold, 1.0), rule.radius / rule.sigma), reference)


def members(inside: Tensor) -> tuple[tuple[int, ...], ...]:
    """Return the classes of each set, ascending, from what :meth:`Calibrated.inside` says of each class, `[B, N]`."""
    return tuple(tuple(row.nonzero().flatten().tolist()) for row in inside)


def own_scores(score: str, probabilities: Tensor, labels: Tensor) -> Tensor:
    """Return the score of the right class `[B]` in each copy, `[B, S]`, from the probabilities `[B, S, N]`."""
    return _own(plain_scores(score, probabilities), labels)


def plain_scores(score: str, probabilities: Tensor) -> Tensor:
    """Return the score of each class in [0, 1], of the shape of `probabilities` `[..., N]`; 1 where that is NaN."""
    if score == "hps":
        scores = 1 - probabilities
    else:
        ordered = probabilities.sort(-1, descending=True)
        scores = torch.zeros_like(probabilities)
        scores.scatter_(-1, ordered.indices, ordered.values.cumsum(-1) - ordered.values)
    return scores.nan_to_num(1.0).clamp(0, 1)


def _own(scores: Tensor, labels: Tensor) -> Tensor:
    """Return what belongs to the labels `[B]`, `[B, S]`, of `[B, S, N]`."""
    return scores.gather(2, labels.view(-1, 1, 1).expand(-1, scores.shape[1], 1)).squeeze(2)


def _transformed(rule: Rule, scores: Tensor, reference: tuple[float, ...]) -> Tensor:
    """Return scores after the post-training transformation, if the rule has it: the share of the reference scores that
    are not larger, and a sigmoid around the rank 1 - alpha (Yan et al., arXiv 2404.19651, section 4.1)."""
    if rule.method != "rscp+ptt":
        return scores
    ordered = torch.tensor(reference, dtype=scores.dtype)
    ranks = torch.searchsorted(ordered, scores.contiguous(), right=True).to(scores) / len(reference)
    return torch.sigmoid(STEEPNESS * (ranks - (1 - rule.alpha)))


def _moved(mean: float, distance: float) -> float:
    """Return the largest mean of a score in [0, 1] at a distance, in standard deviations of the noise."""
    from scipy.stats import norm

    return float(norm.cdf(norm.ppf(mean) + distance))
