"""A model under Gaussian noise, which every guarantee by randomized smoothing rests on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice

import torch
from torch import Tensor, nn

from timm_nrpm.checks import check_integer, check_number
from timm_nrpm.data.images import check_batch, check_labels, count_of
from timm_nrpm.data.ordering import seed_of
from timm_nrpm.nn.wrappers import subject_of

View = Callable[[Tensor], Tensor]
"""Function from noisy pixels `[B, C, H, W]` to the images that the model sees instead, of the same shape."""


def noise_of(image: Tensor, seed: int) -> Iterator[Tensor]:
    """Yield standard normal noise `[C, H, W]` for samples 0, 1, ... of an image; it depends on the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        # One call for each sample, since the values of a larger call depend on its size; on the CPU, so that the
        # noise is the same for all devices.
        yield torch.randn(image.shape, generator=generator, dtype=torch.float32, device="cpu")


class Smoothed:
    """A model under noise.

    Args:
        model: Classifier of normalised images, or a wrapper of one.
        mean, std: The model's normalisation, one number per channel; None for that in timm's config of the model.
        sigma: Standard deviation of the noise, in pixel units of [0, 1], above 0.
        seed: Seed of the noise of :meth:`noise`, >= 0.
        batch_size: Number of samples in a forward.

    Attributes:
        net: The model without its wrappers, as a PixelModel.

    Raises:
        ValueError: A setting is outside its range, or `model` is no classifier.
    """

    def __init__(
        self,
        model: nn.Module,
        mean: tuple[float, ...] | None,
        std: tuple[float, ...] | None,
        sigma: float,
        seed: int,
        batch_size: int,
    ) -> None:
        self.sigma = check_number("sigma", sigma, above=0, why=", in pixel units of [0, 1]")
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
        return noise_of(image, seed_of(self.seed, number))

    @torch.no_grad()
    def logits(self, pixels: Tensor) -> Tensor:
        return self.net(pixels)

    def votes(
        self,
        image: Tensor,
        noise: Iterator[Tensor],
        samples: int,
        done: Callable[[int], None] | None = None,
        view: View | None = None,
    ) -> Tensor:
        """Count the next samples of each class and, in the last entry, those whose logits contain NaN, `[N + 1]`.

        Args:
            image: Pixels `[C, H, W]`.
            noise: Noise `[C, H, W]` of one sample after another.
            samples: Number of samples.
            done: Function that is called after every batch with its number of samples.
            view: What the model sees of the noisy pixels; by default all of them.
        """
        counted = torch.zeros((), dtype=torch.int64)
        for start in range(0, samples, self.batch_size):
            drawn = torch.stack(list(islice(noise, min(self.batch_size, samples - start))))
            noisy = image + self.sigma * drawn.to(image.device)
            logits = self.logits(noisy if view is None else view(noisy))
            classes = logits.shape[1]
            chosen = torch.where(logits.isnan().any(1), classes, logits.argmax(1)).cpu()
            counted = counted + chosen.bincount(minlength=classes + 1)
            if done is not None:
                done(len(drawn))
        return counted

    def probabilities(self, pixels: Tensor, samples: int, seeds: Sequence[int]) -> Tensor:
        """Return the probabilities of the classes under noise, `[B, samples, N]`, in float64 on the CPU.

        Args:
            pixels: Images `[B, C, H, W]`, placed by :meth:`place`.
            samples: Number of noisy copies of each image; 0 for the images without noise, as one copy.
            seeds: Seed of each image's noise.
        """
        copies = self._copies(pixels, samples, seeds)
        found = []
        while chunk := list(islice(copies, self.batch_size)):
            found.append(self.logits(torch.stack(chunk)).double().softmax(1).cpu())
        return torch.cat(found).view(len(pixels), max(samples, 1), -1)

    def _copies(self, pixels: Tensor, samples: int, seeds: Sequence[int]) -> Iterator[Tensor]:
        """Yield the noisy copies of each image in turn."""
        for image, seed in zip(pixels, seeds, strict=True):
            if not samples:
                yield image
            for drawn in islice(noise_of(image, seed), samples):
                yield image + self.sigma * drawn.to(image.device)
