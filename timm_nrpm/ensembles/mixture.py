"""Choosing an adaptive smoothing: share and scales under a bound on clean accuracy, and a gate that sees attacks."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import product

import torch
from torch import Tensor, nn

from timm_nrpm.attacks.library import pgd
from timm_nrpm.attacks.threats import Threat, check_threat
from timm_nrpm.checks import check_integer, check_number
from timm_nrpm.data.images import check_batch, check_labels
from timm_nrpm.data.ordering import seed_of
from timm_nrpm.ensembles.adaptive_smoothing import ACCURATE, ROBUST, AdaptiveSmoothing, Gate, features
from timm_nrpm.ensembles.probes import fitted
from timm_nrpm.evaluation.evaluate import evaluate
from timm_nrpm.jobs.progress import progress_bar
from timm_nrpm.models.modes import attackable
from timm_nrpm.nn.pixel_model import PixelModel
from timm_nrpm.nn.wrappers import unwrapped

SHARES = (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
SCALES = (0.5, 1.0, 2.0, 4.0)
"""Shares of the robust model, and scales of either model's logits, that are compared."""

PROBED = 0.75
"""The robust model's share in the mixture that PGD attacks for all of them."""


@dataclass(frozen=True)
class Candidate:
    """An adaptive smoothing that was compared.

    Attributes:
        share, accurate_scale, robust_scale: Its settings.
        clean: Share of the images that are right without an attack, from 0 to 1.
        transferred: Share that is right on all that PGD made for either model and for one mixture, which attacks on the
            mixture itself mostly lower.
        quick: Share that is right under the quick suite; None if it was not attacked.
    """

    share: float
    accurate_scale: float
    robust_scale: float
    clean: float
    transferred: float
    quick: float | None = None

    def model(self, accurate: nn.Module, robust: nn.Module) -> AdaptiveSmoothing:
        """The adaptive smoothing of the two models."""
        return AdaptiveSmoothing(
            accurate, robust, share=self.share, accurate_scale=self.accurate_scale, robust_scale=self.robust_scale
        )


@dataclass(frozen=True)
class MixtureSearch:
    """Result of a search for an adaptive smoothing.

    Attributes:
        threat: What an attacker may change.
        samples: Number of images.
        bound: Largest loss of clean accuracy, in points of the accurate model's.
        accurate, robust: Shares of the images on which either model alone is right, clean.
        candidates: All that were compared, those that were attacked first, the best one foremost.
    """

    threat: Threat
    samples: int
    bound: float
    accurate: float
    robust: float
    candidates: tuple[Candidate, ...]

    @property
    def best(self) -> Candidate | None:
        """The candidate that the quick suite leaves most of, within the bound; None if none is within it."""
        attacked = [each for each in self.candidates if each.quick is not None]
        return max(attacked, key=lambda each: (each.quick, each.clean), default=None)

    def __str__(self) -> str:
        head = (
            f"{self.samples} images, {self.threat}: the accurate model is right on {100 * self.accurate:.1f} % when "
            f"clean, the robust one on {100 * self.robust:.1f} %."
        )
        if self.best is None:
            return f"{head} No mixture loses at most {self.bound:g} points of that."
        best = self.best
        return (
            f"{head} The best of {sum(c.quick is not None for c in self.candidates)} attacked mixtures has the robust "
            f"model's share {best.share:g} and scales {best.accurate_scale:g} and {best.robust_scale:g}: "
            f"{100 * best.clean:.1f} % clean, {100 * (best.quick or 0):.1f} % under quick attacks (no worst case)."
        )

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> MixtureSearch:
        data = json.loads(text)
        candidates = tuple(Candidate(**each) for each in data.pop("candidates"))
        return cls(**{**data, "threat": Threat(**data["threat"]), "candidates": candidates})


def search_mixture(
    accurate: nn.Module,
    robust: nn.Module,
    loader: Sequence[tuple[Tensor, Tensor]],
    threat: Threat | None = None,
    *,
    bound: float = 2.0,
    attacked: int = 6,
    steps: int = 20,
    seed: int = 0,
    progress: bool = False,
) -> MixtureSearch:
    """Search the share and the scales that leave most images right under quick attacks, with a bounded clean loss.

    All combinations are compared on clean images and on what PGD made of them for either model and for one mixture,
    which costs a few forwards an image. Those within the bound that are right on most of the latter are attacked
    themselves. To measure what the best is worth, `evaluate` it on other images.

    Args:
        accurate, robust: The two models, as for :class:`timm_nrpm.ensembles.adaptive_smoothing.AdaptiveSmoothing`.
        loader: Batches of pixels `[B, C, H, W]` in [0, 1] and labels `[B]`, the same in each pass.
        threat: What an attacker may change; the default is Linf with eps 8/255. PGD needs Linf or L2.
        bound: Largest loss of clean accuracy, in points of the accurate model's.
        attacked: Number of mixtures that are attacked.
        steps: Number of steps of PGD.
        seed: Seed of PGD's random start.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: A setting is outside its range, the loader is empty, or labels are not classes of the models.

    Example:
        >>> found = search_mixture(plain, model, loader, Threat("Linf", 0.1), bound=5, attacked=1)
        >>> mixture = found.best.model(plain, model)
    """
    threat = _by_pgd(threat)
    bound = check_number("bound", bound, least=0, most=100, why=" of points")
    attacked, steps = check_integer("attacked", attacked, least=1), check_integer("steps", steps, least=1)
    images = [check_batch(batch) for batch in loader]
    if not images:
        raise ValueError("The loader is empty: give images to search on.")
    probe = AdaptiveSmoothing(accurate, robust, share=PROBED)
    seen = _seen(probe, images, threat, steps, seed)
    alone, other = (float((logits.argmax(1) == seen.labels).float().mean()) for logits in seen.clean)
    candidates = []
    for share, first, second in product(SHARES, SCALES, SCALES):
        mixture = AdaptiveSmoothing(
            probe.member("accurate").net, probe.member("robust").net, share=share, accurate_scale=first,
            robust_scale=second,
        )  # fmt: skip
        candidates.append(Candidate(share, first, second, *seen.shares(mixture)))
    allowed = [each for each in candidates if each.clean >= alone - bound / 100 - 1e-9]
    allowed.sort(key=lambda each: (-each.transferred, -each.clean))
    tried = []
    with progress_bar(progress, counted=True) as bar:
        for each in bar.track(allowed[:attacked], description="Attacking mixtures"):
            mixture = each.model(probe.member("accurate").net, probe.member("robust").net)
            report = evaluate(mixture, images, threat, "quick", steps=steps, seed=seed, control=False)
            tried.append(Candidate(**{**asdict(each), "quick": report.worst_case}))
    tried.sort(key=lambda each: (-(each.quick or 0), -each.clean))
    rest = [each for each in candidates if each not in allowed[:attacked]]
    return MixtureSearch(threat, len(seen.labels), bound, alone, other, (*tried, *rest))


def fit_gate(
    mixture: AdaptiveSmoothing,
    loader: Iterable[tuple[Tensor, Tensor]],
    threat: Threat | None = None,
    *,
    low: float = 0.0,
    high: float = 1.0,
    steps: int = 20,
    seed: int = 0,
) -> Gate:
    """Fit a gate that tells attacked images from clean ones, so that the robust model has its say on the former.

    PGD attacks the mixture as it is, and a logistic regression on what both models say of an image, clean and
    attacked, is the gate. The attacks of an evaluation follow its gradient too.

    Args:
        mixture: An adaptive smoothing with a fixed share.
        loader: Batches of pixels `[B, C, H, W]` in [0, 1] and labels `[B]`, of images that nothing is judged on.
        threat: What an attacker may change; the default is Linf with eps 8/255. PGD needs Linf or L2.
        low, high: Share of the robust model for an image that looks clean, and for one that looks attacked.
        steps: Number of steps of PGD.
        seed: Seed of PGD's random start.

    Raises:
        ValueError: A setting is outside its range, labels are not classes of the models, or the loader is empty.

    Example:
        >>> gate = fit_gate(AdaptiveSmoothing(plain, model), loader, Threat("Linf", 0.1))
        >>> mixture = AdaptiveSmoothing(plain, model, gate=gate)
    """
    threat, steps = _by_pgd(threat), check_integer("steps", steps, least=1)
    Gate(low, high, 0.0, 0.0, 0.0, 0.0)  # raises an error before anything is attacked
    inner = unwrapped(mixture)
    if not isinstance(inner, AdaptiveSmoothing):
        raise ValueError(f"A gate is for an adaptive smoothing, and this is a {type(inner).__name__}.")
    mixture, seen, kinds = inner, list[Tensor](), list[Tensor]()
    net = PixelModel(mixture)
    with attackable(net):
        for number, batch in enumerate(loader):
            pixels, labels = check_batch(batch)
            pixels = pixels.to(net.mean.device)
            labels = _checked(net, pixels, labels)
            moved = pgd(threat, steps)(net, pixels, labels, [seed_of(seed, number, i) for i in range(len(labels))])
            for kind, images in enumerate((pixels, moved)):
                with torch.no_grad():
                    seen.append(features(*mixture.parts(images)).cpu())
                kinds.append(torch.full((len(images),), kind))
    if not seen:
        raise ValueError("The loader is empty: give images to fit the gate on.")
    probe = fitted(torch.cat(seen), torch.cat(kinds), 2, 1e-3)
    accurate, robust, agreement = (probe.weight[1] - probe.weight[0]).tolist()
    return Gate(low, high, accurate, robust, agreement, float(probe.bias[1] - probe.bias[0]))


def _by_pgd(threat: Threat | None) -> Threat:
    """The threat, or a ValueError where PGD has no steps under its norm."""
    threat = check_threat(threat)
    if threat.norm not in ("Linf", "L2"):
        raise ValueError(f"Images are attacked by PGD here, which has no steps under {threat.norm}: use Linf or L2.")
    return threat


@torch.no_grad()
def _checked(net: PixelModel, pixels: Tensor, labels: Tensor) -> Tensor:
    """The labels `[B]` on the model's device, which are its classes."""
    return check_labels(labels.to(pixels.device), net(pixels[:1]).shape[1], count=len(pixels))


@dataclass(frozen=True)
class _Seen:
    """Logits `[N, classes]` of the accurate and of the robust model, on the same images in several versions.

    Attributes:
        clean: On the images as they are.
        moved: On what PGD made of them, for each model that it followed.
        labels: Classes `[N]`.
    """

    clean: tuple[Tensor, Tensor]
    moved: tuple[tuple[Tensor, Tensor], ...]
    labels: Tensor

    def right(self, mixture: AdaptiveSmoothing, logits: tuple[Tensor, Tensor]) -> Tensor:
        """Whether a mixture is right on each image, `[N]`."""
        scales = (mixture.accurate_scale, mixture.robust_scale)
        parts = [torch.log_softmax(scale * each, 1) for scale, each in zip(scales, logits, strict=True)]
        return mixture.mixed(parts[0], parts[1]).argmax(1) == self.labels

    def shares(self, mixture: AdaptiveSmoothing) -> tuple[float, float]:
        """Shares of the images that a mixture is right on, clean and in every version that PGD made."""
        moved = torch.stack([self.right(mixture, logits) for logits in self.moved]).all(0)
        return float(self.right(mixture, self.clean).float().mean()), float(moved.float().mean())


def _seen(
    probe: AdaptiveSmoothing, images: Sequence[tuple[Tensor, Tensor]], threat: Threat, steps: int, seed: int
) -> _Seen:
    """What both models see of the images, and of what PGD makes of them along each model and along a mixture."""
    nets = [PixelModel(probe.member(name)) for name in (ACCURATE, ROBUST)]
    device, rows = nets[0].mean.device, []
    with attackable(probe):
        for number, (pixels, labels) in enumerate(images):
            pixels = pixels.to(device)
            labels = _checked(nets[0], pixels, labels)
            seeds = [seed_of(seed, number, place) for place in range(len(labels))]
            followed = (*nets, PixelModel(probe))
            versions = [pixels, *(pgd(threat, steps)(net, pixels, labels, seeds) for net in followed)]
            with torch.no_grad():
                found = [net(version) for version in versions for net in nets]
            rows.append([*found, labels])
    *logits, labels = [torch.cat(column) for column in zip(*rows, strict=True)]
    pairs = list(zip(logits[::2], logits[1::2], strict=True))
    return _Seen(pairs[0], tuple(pairs[1:]), labels)
