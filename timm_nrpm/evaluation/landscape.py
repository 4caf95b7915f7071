"""The loss over a square around images, to and from JSON."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_nrpm.attacks.library import gradient_source
from timm_nrpm.checks import check_integer, check_number
from timm_nrpm.data.images import check_images, check_labels
from timm_nrpm.evaluation.history import finite
from timm_nrpm.models.modes import attackable
from timm_nrpm.nn.pixel_model import PixelModel
from timm_nrpm.nn.wrappers import subject_of

DIRECTIONS = ("own", "bpda", "plain", "random")

AT_ONCE = 16
"""Number of images of which a row of points goes through the model at the same time."""


@dataclass(frozen=True)
class LossLandscape:
    """The loss over a square around images; each image has two directions of its own.

    Attributes:
        eps: Half the side of the square, in pixel units.
        directions: Kinds of the first and the second direction, from `DIRECTIONS`.
        losses: Mean cross-entropy in nats, `[R][R]`. The first index steps along the first direction, from -eps to eps;
            the middle is that of the clean images. Infinite where the mean was not finite.
        accuracies: Share of the images that are right, from 0 to 1, at the same points.
        cosine: Cosine of the angle between the two directions, mean over the images: 0 at right angles, 1 if they are
            the same.
        samples: Number of images.
        seed, clip: The same as in :func:`loss_landscape`.

    Example:
        >>> landscape = loss_landscape(model, pixels, labels, eps=8 / 255, directions=("own", "plain"))
        >>> landscape.clean, landscape.losses[-1][10], landscape.losses[10][-1]
        (0.34, 0.37, 0.40)
    """

    eps: float
    directions: tuple[str, str]
    losses: tuple[tuple[float, ...], ...] = field(repr=False)
    accuracies: tuple[tuple[float, ...], ...] = field(repr=False)
    cosine: float
    samples: int
    seed: int
    clip: bool

    @property
    def steps(self) -> tuple[float, ...]:
        """Distances of the points along a direction, from -eps to eps, in pixel units."""
        half = len(self.losses) // 2
        return tuple(self.eps * i / half for i in range(-half, half + 1))

    @property
    def clean(self) -> float:
        """The loss of the clean images."""
        return self.losses[len(self.losses) // 2][len(self.losses) // 2]

    def to_json(self) -> str:
        return json.dumps({**asdict(self), "losses": [[finite(value) for value in row] for row in self.losses]})

    @classmethod
    def from_json(cls, text: str) -> LossLandscape:
        data = json.loads(text)
        losses = tuple(tuple(math.inf if v is None else v for v in row) for row in data.pop("losses"))
        shares = tuple(map(tuple, data.pop("accuracies")))
        return cls(**{**data, "directions": tuple(data["directions"])}, losses=losses, accuracies=shares)


def loss_landscape(
    model: nn.Module,
    pixels: Tensor,
    labels: Tensor,
    *,
    eps: float,
    resolution: int = 21,
    directions: tuple[str, str] = ("own", "random"),
    seed: int = 0,
    clip: bool = True,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
) -> LossLandscape:
    """Measure the mean cross-entropy over a square around images, spanned by two directions of signs, as in
    arXiv 1705.07204.

    A surface that is jagged, or that rises more steeply along a random direction or the plain model's than along the
    model's own gradient, misleads attacks that follow this gradient: it is a sign of gradient masking. At a corner of
    the square both directions add up, so that a pixel may change by 2 eps.

    Args:
        model: Classifier of normalised images, or a wrapper of one.
        pixels: One or more images `[B, C, H, W]` in [0, 1].
        labels: Classes of the images, `[B]`.
        eps: Half the side of the square, in pixel units.
        resolution: Number of points along a side, odd.
        directions: Kinds of the two directions. `"own"`, `"bpda"` and `"plain"` are the sign of the gradient of the
            loss through the model itself, through the model with its linear maps backward, and through the plain model
            (lambda = 1, not calibrated). `"random"` is 1 or -1 for every pixel (Rademacher), at right angles to the
            other direction.
        seed: Seed of the random direction; the global generator is not used.
        clip: Whether points are clamped to [0, 1], as an attacker's images are.
        mean, std: The model's normalisation, one number for each channel; by default timm's for this model, and none
            for a model that is not timm's.

    Raises:
        ValueError: Images, labels or settings are outside their range.

    Example:
        >>> landscape = loss_landscape(model, pixels[:1], labels[:1], eps=8 / 255)
    """
    eps = check_number("eps", eps, above=0, most=1, why=", a change of a pixel in [0, 1], like 8 / 255")
    _check_landscape(resolution, directions)
    pixels = check_images(pixels)
    labels = check_labels(labels, count=len(pixels), what="labels are")
    net = subject_of(model, mean, std).on_pixels()
    pixels, labels = pixels.detach().to(net.mean.device), labels.to(net.mean.device)
    steps = eps * torch.arange(-(resolution // 2), resolution // 2 + 1).to(pixels) / (resolution // 2)  # 0 is exact
    losses, right = torch.zeros(2, resolution, resolution, dtype=torch.float64)
    generator, cosines = torch.Generator().manual_seed(seed), []
    with attackable(net):
        with torch.no_grad():
            check_labels(labels, net(pixels[:1]).shape[1], what="labels are")
        for images, classes in zip(pixels.split(AT_ONCE), labels.split(AT_ONCE), strict=True):
            first, second = _directions(net, images, classes, directions, generator)
            cosines.append(F.cosine_similarity(first.flatten(1), second.flatten(1)))
            for i, step in enumerate(steps):
                points = images + step * first + steps.view(-1, 1, 1, 1, 1) * second  # [R, b, C, H, W]
                with torch.no_grad():
                    logits = net(points.flatten(0, 1).clamp(0, 1) if clip else points.flatten(0, 1))
                targets = classes.repeat(resolution)
                loss = F.cross_entropy(logits, targets, reduction="none").double()
                losses[i] += loss.view(resolution, -1).sum(1).cpu()
                hits = (logits.argmax(1) == targets) & logits.isfinite().all(1)  # wrong if not finite
                right[i] += hits.view(resolution, -1).sum(1).cpu()
    return LossLandscape(
        eps=eps,
        directions=(directions[0], directions[1]),
        losses=tuple(map(tuple, (losses / len(pixels)).nan_to_num(math.inf, math.inf).tolist())),
        accuracies=tuple(map(tuple, (right / len(pixels)).tolist())),
        cosine=float(torch.cat(cosines).mean()),
        samples=len(pixels),
        seed=seed,
        clip=bool(clip),
    )


def _directions(
    net: PixelModel, pixels: Tensor, labels: Tensor, kinds: tuple[str, str], generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return two tensors of signs `[B, C, H, W]`; the sign is 0 for a pixel whose gradient is zero."""
    signs: dict[int, Tensor] = {}
    for i, kind in enumerate(kinds):
        if kind != "random":
            with gradient_source(net, kind) as source:
                moving = pixels.clone().requires_grad_()
                (slope,) = torch.autograd.grad(F.cross_entropy(source(moving), labels, reduction="sum"), moving)
            signs[i] = slope.nan_to_num(0.0).sign()
    for i in (0, 1):
        if i not in signs:
            signs[i] = _random_signs(signs.get(1 - i, torch.zeros_like(pixels)), generator)
    return signs[0], signs[1]


def _random_signs(against: Tensor, generator: torch.Generator) -> Tensor:
    """Return random signs, half of which agree with those of `against`, so that their inner product is 0, or 1 if the
    number of signs is odd."""
    signs = against.flatten(1)
    draws = torch.rand(signs.shape, generator=generator, dtype=torch.float64).to(signs.device)
    # Pixels without a sign get the last ranks; among the others, those with an even rank agree.
    ranks = (draws + (signs == 0)).argsort(1).argsort(1)
    return torch.where(ranks % 2 == 0, 1.0, -1.0).to(signs).mul(torch.where(signs == 0, 1, signs)).view_as(against)


def _check_landscape(resolution: int, directions: tuple[str, str]) -> None:
    if check_integer("resolution", resolution, least=3) % 2 == 0:
        raise ValueError(
            f"resolution={resolution!r} is not allowed: give an odd integer >= 3, so that the images are in the middle."
        )
    known = isinstance(directions, (tuple, list)) and len(directions) == 2 and set(directions) <= set(DIRECTIONS)
    if not known or (directions[0] == directions[1] != "random"):
        raise ValueError(
            f"directions={directions!r} are not two different ones: choose two of {', '.join(DIRECTIONS)}, for example "
            '("own", "plain").'
        )
