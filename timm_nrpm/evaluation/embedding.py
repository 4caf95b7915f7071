"""Adversarial features without labels: how far a threat can move a model's embedding of an image, and its prediction.

The attack climbs the distance between the embedding of the image and that of the attacked one, so it needs neither
labels nor the last layer (Lapid and Sipper, "I See Dead People: Gray-Box Adversarial Attack on Image-To-Text Models",
attack an image encoder alone). The last layer is linear in the embedding, so its logits move by no more than the norm
of its weights times the distance.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from statistics import fmean, median
from typing import Any

import torch
from torch import Tensor, nn

from timm_nrpm.attacks.apgd import climb
from timm_nrpm.attacks.gradients import generators
from timm_nrpm.attacks.sources import Source, sources_of
from timm_nrpm.attacks.threats import COUNTED, Threat, check_threat
from timm_nrpm.checks import check_integer
from timm_nrpm.data.images import count_of, pixels_of
from timm_nrpm.data.ordering import seed_of
from timm_nrpm.evaluation.intervals import exact, of_mean
from timm_nrpm.evaluation.trials import digits_of
from timm_nrpm.jobs.progress import progress_bar
from timm_nrpm.models.modes import attackable
from timm_nrpm.nn.pixel_model import PixelModel
from timm_nrpm.nn.wrappers import subject_of


@dataclass(frozen=True)
class EmbeddingReport:
    """How far a threat moves the embedding of each image; what was found is a lower bound of what is possible.

    Attributes:
        threat: What may change.
        steps: Number of steps of each ascent.
        seed: Seed of the random starts.
        change: For each image, the largest distance that was found between its embedding and that of a changed image,
            in L2 and as a share of the norm of its embedding.
        random: The same for one random change within the threat, which no gradient chose.
        agrees: A digit for each image, 1 where the model predicts for the changed image what it predicts for the image.
        sources: Names of the gradients that were followed, see :func:`timm_nrpm.sources.sources_of`.

    Example:
        >>> report = embedding_change(model, loader, Threat("Linf", 0.05), steps=5)
        >>> report.mean_change > report.mean_random, report.agreement
        (True, 1.0)
        >>> EmbeddingReport.from_json(report.to_json()) == report
        True
    """

    threat: Threat
    steps: int
    seed: int
    change: tuple[float, ...] = field(repr=False)
    random: tuple[float, ...] = field(repr=False)
    agrees: str = field(repr=False)
    sources: tuple[str, ...] = ("own",)

    @property
    def samples(self) -> int:
        return len(self.change)

    @property
    def mean_change(self) -> float:
        """Mean of :attr:`change`."""
        return fmean(self.change)

    @property
    def mean_random(self) -> float:
        """Mean of :attr:`random`."""
        return fmean(self.random)

    @property
    def agreement(self) -> float:
        """Share of the images whose prediction stays, from 0 to 1."""
        return self.agrees.count("1") / self.samples

    def __str__(self) -> str:
        rows = (("largest found", self.change), ("random", self.random))
        lines = [f"{self.samples} images, {self.threat}, {self.steps} steps along {', '.join(self.sources)}"]
        for name, values in rows:
            low, high = of_mean(values)
            middle = f"mean {100 * fmean(values):.1f} % ({100 * low:.1f} to {100 * high:.1f})"
            lines.append(f"change of the embedding, {name}: {middle}, median {100 * median(values):.1f} %")
        low, high = exact(self.agrees.count("1"), self.samples)
        agreement = f"{100 * self.agreement:.1f} % ({100 * low:.1f} to {100 * high:.1f})"
        return "\n".join([*lines, f"same prediction at the largest change: {agreement}"])

    def to_json(self) -> str:
        """Return the report as JSON, with its means."""
        means = {"change": self.mean_change, "random": self.mean_random, "agreement": self.agreement}
        return json.dumps({**asdict(self), "means": means})

    @classmethod
    def from_json(cls, text: str) -> EmbeddingReport:
        data = json.loads(text)
        del data["means"]
        values = {name: tuple(data[name]) for name in ("change", "random", "sources")}
        return cls(**{**data, **values, "threat": Threat(**data["threat"])})


def embedding_of(net: PixelModel, pixels: Tensor) -> Tensor:
    """Return the input `[B, N]` of the last layer of a timm model.

    Args:
        net: A timm model that takes pixels.
        pixels: Images `[B, C, H, W]` in [0, 1].

    Raises:
        ValueError: The model does not say what its embedding is.

    Example:
        >>> net = timm_nrpm.pixel_model.PixelModel(model)
        >>> embedding_of(net, pixels).shape
        torch.Size([32, ...])
    """
    model: Any = net.model
    if not all(callable(getattr(model, name, None)) for name in ("forward_features", "forward_head")):
        raise ValueError(
            f"This {type(model).__name__} has no forward_features and forward_head, so its embedding is unknown: give "
            "a timm model, or a module with these two methods."
        )
    features: Tensor = model.forward_head(model.forward_features(net.normalise(pixels)), pre_logits=True)
    return features.flatten(1)


def embedding_change(
    model: nn.Module,
    loader: Iterable[Any],
    threat: Threat | None = None,
    *,
    steps: int = 20,
    seed: int = 0,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    progress: bool = False,
) -> EmbeddingReport:
    """Search, without labels, for the largest change of a model's embedding within a threat.

    The ascent is Auto-PGD (arXiv 2003.01690) on the distance of the embedding from that of the clean image, from a
    random start. The gradient of a reprogrammed model misleads. So with such a model the ascent also follows its linear
    maps and the plain model, whose embeddings are measured from their own clean ones, and of the points that are found
    each image keeps the one that moves the embedding of the model itself most. The modes, gradient flags and statistics
    of the model are left unchanged.

    Args:
        model: Timm model of normalised images, or a wrapper of one.
        loader: Batches of pixels `[B, C, H, W]` in [0, 1], or of tuples that start with such pixels; labels are not
            used.
        threat: What may change, under Linf, L2 or L1; the default is Linf with eps 8/255.
        steps: Number of steps of each ascent, >= 1.
        seed: Seed of the random starts, >= 0. They depend only on it and on the place of an image in the loader.
        mean, std: The model's normalisation, one number for each channel; by default timm's for this model, and none
            for a model that is not timm's.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: The model has no embedding, the norm is another one, pixels are outside [0, 1], an argument is
            outside its range, or the loader is empty.

    Example:
        >>> print(embedding_change(model, loader, Threat("Linf", 0.05), steps=5))
        32 images, Linf 0.05, 5 steps along own, bpda, plain
        change of the embedding, largest found: mean ... % (... to ...), median ... %
        change of the embedding, random: mean ... % (... to ...), median ... %
        same prediction at the largest change: ... % (... to ...)
    """
    threat = check_threat(threat)
    if threat.norm in COUNTED:
        raise ValueError(f"The threat {threat} has no gradient to climb: give one under Linf, L2 or L1.")
    steps, seed = check_integer("steps", steps, least=1), check_integer("seed", seed, least=0)
    subject = subject_of(model, mean, std)
    with attackable(subject.model):
        sources = sources_of(subject.on_pixels())
        net = sources["own"].net
        change: list[float] = []
        random: list[float] = []
        agrees: list[bool] = []
        with progress_bar(progress) as bar:
            task = bar.add_task("Moving the embedding", total=count_of(loader))
            for batch in pixels_of(loader):
                pixels = batch.float().to(net.mean.device)
                seeds = [seed_of(seed, place) for place in range(len(change), len(change) + len(pixels))]
                farthest, moved = _farthest(sources, pixels, threat, seeds, steps)
                change += moved.tolist()
                random += _distances(net, pixels, threat.around(pixels, generators(seeds))).tolist()
                with torch.no_grad():
                    agrees += (net(pixels).argmax(1) == net(farthest).argmax(1)).tolist()
                bar.advance(task)
    if not change:
        raise ValueError("The loader gave no images: there is nothing to measure.")
    return EmbeddingReport(threat, steps, seed, tuple(change), tuple(random), digits_of(agrees), tuple(sources))


def _farthest(
    sources: dict[str, Source], pixels: Tensor, threat: Threat, seeds: list[int], steps: int
) -> tuple[Tensor, Tensor]:
    """The changed images `[B, C, H, W]` whose embeddings moved most, and how far, `[B]`."""
    net = sources["own"].net
    farthest = threat.around(pixels, generators(seeds))
    most = _distances(net, pixels, farthest)
    for source in sources.values():
        with source.followed() as follow:
            moved = _ascended(follow, pixels, threat, seeds, steps)
        far = _distances(net, pixels, moved)
        better = far > most
        most = torch.where(better, far, most)
        farthest = torch.where(better.view(-1, 1, 1, 1), moved, farthest)
    return farthest, most


def _ascended(net: PixelModel, pixels: Tensor, threat: Threat, seeds: list[int], steps: int) -> Tensor:
    """Images `[B, C, H, W]` at which an ascent found the embedding of `net` farthest from that of `pixels`."""
    with torch.no_grad():
        clean = embedding_of(net, pixels)
    labels = torch.zeros(len(pixels), dtype=torch.long, device=pixels.device)

    def away(x: Tensor) -> Tensor:
        # Of two scores, 0 and the distance, the margin of the second is the distance, which is what the ascent climbs.
        distance = _relative(clean, embedding_of(net, x))
        return torch.stack([torch.zeros_like(distance), distance], 1)

    moved, _ = climb(away, pixels, labels, threat, seeds, steps=steps, loss="margin", target=labels + 1, fooled=False)
    return moved


def _relative(clean: Tensor, moved: Tensor) -> Tensor:
    """Distance of embeddings `[B, N]` as a share of the norm of the clean one, `[B]`."""
    return (moved - clean).norm(dim=1) / clean.norm(dim=1).clamp(min=1e-12)


@torch.no_grad()
def _distances(net: PixelModel, pixels: Tensor, moved: Tensor) -> Tensor:
    return _relative(embedding_of(net, pixels).double(), embedding_of(net, moved).double())
