"""Sets of classes that hold the right one with a probability of choice, also under attack (conformal prediction).

Such a set makes no model better. It says how much a model knows of an image: the fewer classes, the more.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor, nn

from timm_nrpm.checks import check_integer
from timm_nrpm.data.images import check_images
from timm_nrpm.data.ordering import seed_of
from timm_nrpm.evaluation.sets import Calibrated, Rule, calibrated, members, own_scores
from timm_nrpm.evaluation.smoothed import Smoothed
from timm_nrpm.models.base import weights_sha256
from timm_nrpm.models.modes import evaluating

CALIBRATION, PREDICTION = 0, 1
"""Parts of the seeds of the noise, so that no image's noise is that of a calibration image."""


def prediction_seeds(seed: int, start: int, count: int) -> list[int]:
    """Return the seeds of the noise of images `start`, `start + 1`, ..."""
    return [seed_of(seed, PREDICTION, number) for number in range(start, start + count)]


@dataclass(frozen=True)
class SetPredictor:
    """A model that gives sets of classes.

    Attributes:
        calibration: The rule of the sets and its limit, in numbers alone.
        smoothed: The model under noise.

    Example:
        >>> predictor = conformal(model, loader, alpha=0.2, sigma=0.25, radius=0.125, method="one-sample")
        >>> predictor.sets(pixels[:2], seed=0)
        ((...), (...))
        >>> SetPredictor.from_json(predictor.to_json(), model) == predictor
        True
    """

    calibration: Calibrated
    smoothed: Smoothed = field(repr=False, compare=False)

    def __str__(self) -> str:
        trivial = " Each set holds all classes, whatever the image." if self.calibration.is_trivial else ""
        rule = self.calibration.rule
        head = f"{rule.method}, score {rule.score}, {self.calibration.images} calibration images"
        return f"{head}: {self.guarantee}{trivial}"

    @property
    def guarantee(self) -> str:
        """What holds of the sets, in words."""
        return self.calibration.rule.guarantee

    def sets(self, pixels: Tensor, seed: int | None = None) -> tuple[tuple[int, ...], ...]:
        """Return the set of classes of each image, ascending.

        Args:
            pixels: Images `[B, C, H, W]` in [0, 1].
            seed: Seed of the noise, >= 0, with which the same images have the same sets; the guarantee holds for who
                does not know it. By default it is drawn anew.

        Raises:
            ValueError: `pixels` are not images in [0, 1], or `seed` is negative.
        """
        seed = secrets.randbits(63) if seed is None else check_integer("seed", seed, least=0)
        probabilities = self.probabilities(pixels, prediction_seeds(seed, 0, len(pixels)))
        return members(self.calibration.inside(probabilities))

    def probabilities(self, pixels: Tensor, seeds: Sequence[int]) -> Tensor:
        """Return the probabilities of the classes, `[B, S, N]`, in as many noisy copies as the rule asks for.

        Args:
            pixels: Images `[B, C, H, W]` in [0, 1].
            seeds: Seed of the noise of each image.
        """
        pixels = self.smoothed.place(check_images(pixels))
        with evaluating(self.smoothed.net.model):
            return self.smoothed.probabilities(pixels, self.calibration.rule.copies, seeds)

    def to_json(self) -> str:
        """The calibration as JSON, without the model, whose weights it names by their hash."""
        model = {"weights": weights_sha256(self.smoothed.net.model.state_dict()), **self.smoothed.net.normalisation()}
        return json.dumps({**asdict(self.calibration), "guarantee": self.guarantee, "model": model}, allow_nan=False)

    @classmethod
    def from_json(cls, text: str, model: nn.Module, batch_size: int = 100) -> SetPredictor:
        """Return the predictor of a calibration.

        Args:
            text: What :meth:`to_json` returned.
            model: The model of the calibration, or a wrapper of it.
            batch_size: Number of images in a forward.

        Raises:
            ValueError: The weights of `model` are others, so that the guarantee would not hold.
        """
        data = json.loads(text)
        mean, std = (tuple(data["model"][name]) for name in ("mean", "std"))
        rule = Rule(**data["rule"])
        smoothed = Smoothed(model, mean, std, rule.sigma, 0, batch_size)
        if weights_sha256(smoothed.net.model.state_dict()) != data["model"]["weights"]:
            raise ValueError("The model has other weights than the one that was calibrated: calibrate it anew.")
        return cls(Calibrated(rule, data["images"], data["limit"], tuple(data["reference"])), smoothed)


def conformal(
    model: nn.Module,
    calibration: Iterable[tuple[Tensor, Tensor]],
    alpha: float = 0.1,
    sigma: float = 0.25,
    radius: float = 0.125,
    method: str = "one-sample",
    *,
    score: str = "hps",
    n: int = 256,
    beta: float = 0.001,
    holdout: float = 0.2,
    seed: int = 0,
    batch_size: int = 100,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
) -> SetPredictor:
    """Calibrate sets of classes on images that the model was not trained on.

    Each guarantee is marginal: it holds on average over the calibration images, the image and the noise, not for each
    class or each image. :func:`timm_nrpm.evaluation.sets.calibrated` derives them.

    Args:
        model: Classifier of normalised images, or a wrapper of one. It is left unchanged.
        calibration: Batches of pixels `[B, C, H, W]` in [0, 1] and labels `[B]`, of images like those to come. All
            images are held in memory at once.
        alpha: Share of the sets that may miss the right class, above 0 and below 1.
        sigma: Standard deviation of the noise, in pixel units of [0, 1], above 0; `"vanilla"` adds none.
        radius: Largest L2 norm of a change of the image, in pixel units, >= 0.
        method: `"vanilla"`, split conformal prediction (Vovk et al., 2005), with no guarantee under attack;
            `"one-sample"` (arXiv 2506.16553), which calibrates at a higher level and takes one noisy forward for each
            image; `"rscp+"` (arXiv 2404.19651), which bounds the mean score of `n` noisy copies; or `"rscp+ptt"`, the
            same after a transformation of the scores.
        score: Score of a class: `"hps"`, 1 minus its probability, or `"aps"`, the sum of the larger probabilities.
        n: Number of noisy copies of an image under RSCP+.
        beta: Probability of each of its two errors of estimation, which are taken from `alpha`.
        holdout: Share of the calibration images that PTT takes for its transformation.
        seed: Seed of the calibration's noise, and of the choice of the images held out, >= 0.
        batch_size: Number of noisy copies in a forward.
        mean, std: The model's normalisation, as in :func:`timm_nrpm.evaluate`.

    Raises:
        ValueError: A setting is outside its range; there are too few images for it, with the number that it takes;
            pixels are outside [0, 1]; or labels are not classes of the model.

    Example:
        >>> predictor = conformal(model, loader, alpha=0.2, sigma=0.25, radius=0.125)
        >>> print(predictor)
        one-sample, score hps, 32 calibration images: The set of an image holds its class with probability 0.8 or ...
    """
    rule = Rule(method, alpha, sigma, radius, score, n, beta, holdout)
    smoothed = Smoothed(model, mean, std, rule.sigma, seed, batch_size)
    with evaluating(smoothed.net.model), torch.random.fork_rng(devices=[]):
        images, labels = [], []
        for image, label, _ in smoothed.images(calibration):
            images.append(image)
            labels.append(label)
        if not images:
            raise ValueError("The loader gave no images: there is nothing to calibrate on.")
        rule.rank(len(images) - rule.held(len(images)))  # too few images are refused before any forward under noise
        own = []  # all probabilities of all copies would take much memory
        for start in range(0, len(images), smoothed.batch_size):
            chunk = torch.stack(images[start : start + smoothed.batch_size])
            seeds = [seed_of(smoothed.seed, CALIBRATION, start + i) for i in range(len(chunk))]
            right = torch.tensor(labels[start : start + len(chunk)])
            own.append(own_scores(rule.score, smoothed.probabilities(chunk, rule.copies, seeds), right))
    return SetPredictor(calibrated(rule, torch.cat(own), smoothed.seed), smoothed)
