"""Adaptation: BatchNorm statistics moved towards those of the images at hand, without labels or gradients.

Where images are not like those of the training, under noise, weather or another camera, the stored statistics are those
of other images, and much of the accuracy is lost there (covariate-shift adaptation: Schneider et al., arXiv 2006.16971,
and Nado et al., arXiv 2006.10963). It takes as long as running the images once, and some of them twice more, and the
model stays as fast as it was.

It harms where the images at hand are few or one-sided: of one class, say, whose statistics are not those of a shift but
of the class. So each layer's statistics move only as far as they differ by more than images of one kind do by chance.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from timm_nrpm.checks import check_choice, check_number
from timm_nrpm.data.images import check_images, count_of, pixels_of
from timm_nrpm.errors import AdaptationDoubt
from timm_nrpm.jobs.progress import track
from timm_nrpm.models.image_statistics import median_statistics, statistics
from timm_nrpm.models.modes import check_gradients, evaluating
from timm_nrpm.models.plain_statistics import norms_of
from timm_nrpm.models.provenance import HOW, Step
from timm_nrpm.models.reprogramming import is_reprogrammed, is_settled, record_of
from timm_nrpm.nn.wrappers import subject_of

Model = TypeVar("Model", bound=nn.Module)

ESTIMATES = HOW["adaptation"]
"""How the statistics of several images are taken, as `robust=` names them."""

CAUTION = 16.0
"""How many times the squared standard error is taken off the squared shift of a layer, by `prior="auto"`."""

LEAST = 256
"""Number of images that the stored statistics are worth at least, by `prior="auto"`."""

DOUBT = 0.05
"""Loss of mean confidence by which adaptation is doubted. It was chosen where 20 of 33 cases that lost 5 points of
accuracy or more lost more confidence, and none of 50 that gained; elsewhere 7 of 21 did, and 6 of 60
(results/adaptation-signs.md)."""

BATCH = 256  # images that are run at once where they come as one tensor


class _Site:
    """A BatchNorm whose stored statistics are moved, and what its inputs were."""

    def __init__(self, norm: _BatchNorm, prior: float | None, robust: str) -> None:
        assert norm.running_mean is not None
        assert norm.running_var is not None
        self.norm, self.prior, self.robust = norm, prior, robust
        self.stored = norm.running_mean.clone(), norm.running_var.clone()
        self.forget()

    def forget(self) -> None:
        """Start anew, as if no image had been seen."""
        self.count, self.weight = 0, 0.0
        zeros = torch.zeros_like(self.stored[0], dtype=torch.float64)
        self.sums = zeros.expand(5, -1)  # over images: mean, mean square, their squares, and their product
        self.medians = zeros.expand(2, -1)  # over images: median and variance of their batch
        self.images: list[tuple[Tensor, Tensor]] = []  # mean and mean square of each image, which l1 needs, [B, C]

    def see(self, values: Tensor, images: int) -> None:
        """Take the input of the layer for a batch of images, `[B, C, ...]`, and move the statistics."""
        rows = values.detach().double().flatten(2) if values.ndim > 2 else values.detach().double().unsqueeze(2)
        if len(rows) % images == 0:  # the tokens of an image count as its positions
            rows = rows.unflatten(0, (images, -1)).movedim(1, 2).flatten(2)  # [B, C, L]
        means, squares = rows.mean(2), rows.square().mean(2)
        self.count += len(rows)
        self.sums = self.sums + torch.stack([means, squares, means**2, squares**2, means * squares]).sum(1)
        if self.robust == "l1":
            self.images.append((means, squares))
        if self.robust == "median":
            self.medians = self.medians + len(rows) * torch.stack(median_statistics(rows))
        self._move()

    def _move(self) -> None:
        mean, var, noise = self._statistics()
        stored_mean, stored_var = (stored.double() for stored in self.stored)
        self.weight = self.count / (self.count + (LEAST if self.prior is None else self.prior))
        if self.prior is None:
            shift = self._distance(mean, var)
            self.weight *= float((1 - CAUTION * noise / shift).clamp(0, 1)) if shift > 0 else 0.0
        self.norm.running_mean.copy_(stored_mean.lerp(mean, self.weight))  # type: ignore[union-attr]
        self.norm.running_var.copy_(stored_var.lerp(var, self.weight))  # type: ignore[union-attr]

    def _distance(self, mean: Tensor, var: Tensor) -> Tensor:
        """The squared distance of means and log variances to the stored ones, over all channels."""
        stored_mean, scale = self.stored[0].double(), self.stored[1].double() + self.norm.eps
        growth = ((var + self.norm.eps) / scale).log()
        return ((mean - stored_mean).square() / scale + growth.square()).sum()

    def shift(self) -> float:
        """See :attr:`Adaptation.shifts`."""
        mean, var, noise = self._statistics()
        return float((self._distance(mean, var) - noise).clamp_min(0)) / len(mean)

    def _statistics(self) -> tuple[Tensor, Tensor, Tensor]:
        """Mean and variance of each channel over all images seen, and the squared error of both, which chance makes."""
        a, b, aa, bb, ab = self.sums / self.count
        if self.robust == "l1":
            means, squares = (torch.cat(parts) for parts in zip(*self.images, strict=True))
            mean, var = statistics(means, squares, self.robust)
        elif self.robust == "median":
            mean, var = self.medians / self.count
        else:
            mean, var = a, b - a.square()
        if self.count < 2:
            return mean, var, a.new_tensor(math.inf)
        # The variance over images of their means, and of their mean squared distances to `mean`, b - 2 mean a + mean^2.
        of_means = aa - a.square()
        of_distances = bb - b.square() + 4 * mean * (mean * of_means - (ab - a * b))
        scale, own = self.stored[1].double() + self.norm.eps, var + self.norm.eps
        noise = of_means / scale + of_distances / own.square()
        return mean, var, noise.sum().clamp_min(0) / (self.count - 1)

    def restore(self) -> None:
        for now, stored in zip((self.norm.running_mean, self.norm.running_var), self.stored, strict=True):
            now.copy_(stored)  # type: ignore[union-attr]
        self.forget()


class Adaptation:
    """A model whose statistics follow a stream of images, batch by batch, before it gives their logits.

    The model is changed in place. Its statistics are always those of all images so far, mixed with those that it had
    when the stream began; :meth:`restore` brings the latter back. Memory does not grow with the stream, but for
    `robust="l1"`, which keeps 16 bytes for each image and channel.

    Args:
        model: A model with BatchNorm, reprogrammed or not.
        prior, robust, mean, std: The same as in :func:`adapt_`.

    Raises:
        ValueError: The model has no BatchNorm, its weights were trained since it was reprogrammed, or a setting is not
            allowed.

    Example:
        >>> stream = Adaptation(model)
        >>> logits = stream(torch.rand(16, 3, 224, 224))
        >>> stream.images
        16
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        prior: float | Literal["auto"] = "auto",
        robust: Literal["mean", "l1", "median"] = "mean",
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
    ) -> None:
        estimate = check_choice("robust", robust, ESTIMATES)
        number = None if prior == "auto" else check_number("prior", prior, least=0, why=' of images, or "auto"')
        subject = subject_of(model, mean, std)
        self.model, self.net, self.images = subject.model, subject.on_pixels(), 0
        check_gradients(self.model)
        norms = norms_of(self.model)
        if not norms:
            raise ValueError(
                f"This {type(self.model).__name__} has no BatchNorm with running statistics, so adaptation has nothing "
                "to move: other normalisations take the statistics of each image by itself."
            )
        if is_reprogrammed(self.model) and not is_settled(self.model):
            # The plain model's statistics are not known, and nothing would tell them from the adapted ones.
            raise ValueError(
                "Weights were trained since the model was reprogrammed: call calibrate_(model, loader) first."
            )
        self._sites = {name: _Site(norm, number, estimate) for name, norm in norms.items()}
        self._estimate, self._prior = estimate, number
        self._before = record_of(self.model).statistics if is_reprogrammed(self.model) else ()

    @property
    def weights(self) -> dict[str, float]:
        """The weight of the images in the statistics of each BatchNorm, from 0 (none of it moved) to 1."""
        return {name: site.weight for name, site in self._sites.items()}

    @property
    def shifts(self) -> dict[str, float]:
        """The squared distance of each BatchNorm's statistics to the stored ones, on average over its channels, without
        what chance makes of it; 0 for none."""
        return {name: site.shift() for name, site in self._sites.items()}

    @torch.inference_mode(False)
    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Tensor:
        """Move the statistics towards those of `pixels`, `[B, C, H, W]` in [0, 1], too; return the logits, `[B, N]`.

        Raises:
            ValueError: `pixels` are no images in [0, 1].
        """
        return self._follow(check_images(pixels))

    def _follow(self, pixels: Tensor) -> Tensor:
        hooks = [
            site.norm.register_forward_pre_hook(lambda _, inputs, site=site: site.see(inputs[0], len(pixels)))
            for site in self._sites.values()
        ]
        try:
            with evaluating(self.model):
                logits = self.net.model(self.net.normalise(pixels.to(self.net.mean.device)))
        finally:
            for hook in hooks:
                hook.remove()
        self.images += len(pixels)
        self._record((*self._before, Step("adaptation", self._estimate, self.images, self._prior)))
        return logits

    @torch.inference_mode(False)
    @torch.no_grad()
    def run(self, loader: Iterable[Any], *, progress: bool = False) -> None:
        """Move the statistics towards those of all images of a loader.

        Args:
            loader: Batches of pixels `[B, C, H, W]` in [0, 1], or of tuples that start with such pixels.
            progress: Whether to show a progress bar.

        Raises:
            ValueError: The loader is empty or gives no pixels in [0, 1]. The statistics are as when the stream began.

        Warns:
            AdaptationDoubt: The images of the first batch are classified with much less confidence than before.
        """
        total, first, before = count_of(loader), None, 0.0
        try:
            for pixels in track(pixels_of(loader), "Adapting", total, progress):
                if first is None:
                    first, before = pixels[:BATCH], self._confidence(pixels[:BATCH])
                self._follow(pixels)
            if first is None:
                raise ValueError("The loader gave no images: adaptation needs at least one batch.")
            if (lost := before - self._confidence(first)) > DOUBT:
                warnings.warn(
                    f"After adaptation the mean confidence of the first {len(first)} images is {100 * lost:.0f} points "
                    "lower, a sign of harm that is right in half of the cases: images of one class, say, have other "
                    "statistics without a shift. Compare accuracies on images with labels.",
                    AdaptationDoubt,
                    stacklevel=3,
                )
        except BaseException:
            self.restore()
            raise

    def _confidence(self, pixels: Tensor) -> float:
        """Mean of the largest probabilities of images, with the statistics as they are; 0 for no classifier."""
        with evaluating(self.model):
            logits = self.net.model(self.net.normalise(pixels.to(self.net.mean.device)))
        if not isinstance(logits, Tensor) or logits.ndim != 2:
            return 0.0
        return float(logits.double().softmax(1).max(1).values.mean())

    def restore(self) -> None:
        """Bring back the statistics that the model had when the stream began, which begins anew."""
        for site in self._sites.values():
            site.restore()
        self.images = 0
        self._record(self._before)

    def _record(self, steps: tuple[Step, ...]) -> None:
        if is_reprogrammed(self.model):
            record_of(self.model).statistics = steps


def adapt_(
    model: Model,
    images: Iterable[Any] | Tensor,
    *,
    prior: float | Literal["auto"] = "auto",
    robust: Literal["mean", "l1", "median"] = "mean",
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    progress: bool = False,
) -> Model:
    """Move a model's BatchNorm statistics, in place, towards those of the images at hand.

    Each running mean and variance becomes `(1 - a) stored + a images` (Schneider et al., arXiv 2006.16971, section 3).
    With n images and a prior worth `prior` of them, `a = n / (n + prior)`. With `prior="auto"` each layer has its own,

        a = n / (n + LEAST) * max(0, 1 - CAUTION * noise / shift)

    where `shift` is the squared distance of the images' means and log variances to the stored ones over all channels,
    and `noise` the part of it that the spread between the images makes by chance (the shrinkage of James and Stein).
    So few images, and images like those of the training, move little. But images of one class do differ from those of
    all classes, and lose accuracy by it (results/adaptation.md).

    No label is looked at and no gradient taken. Layers are corrected while the images pass, so that later layers see
    corrected inputs; the larger the batches, the better. Calibrated statistics are moved like others. A second call
    starts from what the first one left: for a stream, use :class:`Adaptation`.

    Args:
        model: A model with BatchNorm, reprogrammed or not.
        images: Batches of pixels `[B, C, H, W]` in [0, 1], or of tuples that start with such pixels; or the pixels of
            all images in one tensor, which is taken in batches of 256.
        prior: Number of images that the stored statistics are worth; 0 forgets them.
        robust: How the statistics of several images are taken: their "mean"; "l1", the package's own robust estimate
            over images; or the "median" over all values of a batch (MedBN, arXiv 2403.19326). The latter two give
            single images less weight. Where an adaptive attacker owns 20 of 200 images of the narrow ResNet-18 under
            noise, the others keep 2.6 points more by "l1" than by "mean" (95 % interval 1.1 to 4.1), and 3.3 by
            "median" (1.9 to 4.6); without an attacker neither costs accuracy there (results/robust-adaptation.md).
        mean, std: The model's normalisation, one number per channel; by default timm's for this model, and none for a
            model that is not timm's.
        progress: Whether to show a progress bar.

    Returns:
        `model`.

    Raises:
        ValueError: The model has no BatchNorm, its weights were trained since it was reprogrammed, a setting is not
            allowed, or there are no images in [0, 1]. The model is as it was.

    Warns:
        AdaptationDoubt: The mean confidence falls by more than `DOUBT`, as harmful adaptation does more often.

    Example:
        >>> model = adapt_(model, torch.rand(64, 3, 224, 224))
    """
    adaptation = Adaptation(model, prior=prior, robust=robust, mean=mean, std=std)
    adaptation.run(images.split(BATCH) if isinstance(images, Tensor) else images, progress=progress)
    return model
