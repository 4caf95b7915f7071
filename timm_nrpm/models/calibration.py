"""Statistics re-estimated after reprogramming, from images alone: no labels, no gradient.

Reprogramming changes the mean and variance of every layer's output, and what follows was made for the old ones. The
paper leaves them stale; most of the clean accuracy it loses is lost there.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, Literal, TypeVar

import torch
from rich.progress import track
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from timm_nrpm.data.images import count_of, pixels_of
from timm_nrpm.jobs.progress import CONSOLE
from timm_nrpm.models.modes import check_gradients, evaluating
from timm_nrpm.models.plain_statistics import KEPT, complete, norms_of
from timm_nrpm.models.reprogramming import is_settled, plain_copy, record_of, reprogrammed_layers, settle_, uncalibrate_
from timm_nrpm.nn.layers import Reprogrammed
from timm_nrpm.nn.pixel_model import PixelModel, alike
from timm_nrpm.nn.wrappers import subject_of

Model = TypeVar("Model", bound=nn.Module)


class Moments:
    """Exact mean and variance of everything seen so far, a channel, in float64."""

    def __init__(self, count: int, mean: Tensor, squares: Tensor) -> None:
        self.count = count
        self.mean = mean  # [C]
        self.squares = squares  # [C], sum of squared distances to the mean

    @classmethod
    def of(cls, values: Tensor, channel: int) -> Moments:
        """Moments of `values`, any shape, with its channels in dimension `channel`."""
        rows = values.detach().movedim(channel, 0).flatten(1).double()  # [C, n]
        mean = rows.mean(1)
        return cls(rows.shape[1], mean, (rows - mean.unsqueeze(1)).square().sum(1))

    def __add__(self, other: Moments) -> Moments:
        total = self.count + other.count
        distance = other.mean - self.mean
        squares = self.squares + other.squares + distance.square() * (self.count * other.count / total)
        return Moments(total, self.mean + distance * (other.count / total), squares)

    @property
    def var(self) -> Tensor:
        return self.squares / max(self.count - 1, 1)


class _Site(ABC):
    """A module of a model that moves, whose input is corrected, and the moments of that input in it and in a reference.

    The reference sees a batch first and leaves one entry a call; the moving model takes them up in the same order, so
    that both moments always cover the same calls.
    """

    channel: int

    def __init__(self) -> None:
        self.waiting: deque[Moments] = deque()
        self.reference: Moments | None = None
        self.moving: Moments | None = None

    def see_reference(self, values: Tensor) -> None:
        self.waiting.append(Moments.of(values, self.channel))

    def see_moving(self, values: Tensor) -> None:
        moving = Moments.of(values, self.channel)
        reference = self.waiting.popleft() if self.waiting else moving  # "scratch" compares with nothing
        self.reference = self.reference + reference if self.reference else reference
        self.moving = self.moving + moving if self.moving else moving
        before, after = self.reference.var, self.moving.var
        growth = torch.where((before > 0) & (after > 0), after / before, 1.0)
        self.correct(self.reference, self.moving, growth.sqrt())

    @abstractmethod
    def correct(self, reference: Moments, moving: Moments, growth: Tensor) -> None:
        """Write the correction for what was seen so far; `growth` is that of the standard deviation, `[C]`."""

    @abstractmethod
    def watch(self, name: str, model: nn.Module, reference: nn.Module) -> list[Any]:
        """Hooks on the moving model and on the reference, to be removed."""


class _NormSite(_Site):
    """A BatchNorm, whose stored statistics move."""

    channel = 1

    def __init__(self, norm: _BatchNorm, mode: str) -> None:
        super().__init__()
        assert norm.running_mean is not None
        assert norm.running_var is not None
        self.mean, self.var, self.mode = norm.running_mean, norm.running_var, mode
        self.stored = self.mean.clone(), self.var.clone()

    def correct(self, reference: Moments, moving: Moments, growth: Tensor) -> None:
        if self.mode == "scratch":
            self.mean.copy_(moving.mean)
            self.var.copy_(moving.var)
        else:
            mean, var = self.stored
            self.mean.copy_((mean - reference.mean) * growth + moving.mean)
            self.var.copy_(var * growth.square())

    def watch(self, name: str, model: nn.Module, reference: nn.Module) -> list[Any]:
        return [
            reference.get_submodule(name).register_forward_pre_hook(lambda _, inputs: self.see_reference(inputs[0])),
            model.get_submodule(name).register_forward_pre_hook(lambda _, inputs: self.see_moving(inputs[0])),
        ]


class _SumSite(_Site):
    """A reprogrammed layer, whose sum is brought to the plain layer's mean and variance."""

    def __init__(self, layer: Reprogrammed) -> None:
        super().__init__()
        self.channel = layer.channel
        self.correction = layer.add_correction()

    def correct(self, reference: Moments, moving: Moments, growth: Tensor) -> None:
        self.correction.gain.copy_(1 / growth)
        self.correction.offset.copy_(reference.mean - moving.mean / growth)

    def watch(self, name: str, model: nn.Module, reference: nn.Module) -> list[Any]:
        def see(layer: Any, _: Any, output: Tensor) -> None:
            bias = 0.0 if layer.bias is None else layer.bias.view(-1, *[1] * (-self.channel - 1))
            self.see_reference(output - bias)

        return [
            reference.get_submodule(name).register_forward_hook(see),
            self.correction.register_forward_pre_hook(lambda _, inputs: self.see_moving(inputs[0])),
        ]


@torch.inference_mode(False)
@torch.no_grad()
def calibrate_(
    model: Model,
    loader: Iterable[Any],
    mode: Literal["relative", "scratch"] = "relative",
    *,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    progress: bool = False,
) -> Model:
    """Re-estimate, in place, the statistics that reprogramming made stale. Not in the paper.

    `"relative"` compares, on the same images, the moments in the plain model (m, v) and in the reprogrammed one
    (m', v'), and moves what is stored by the change alone, so that lambda = 1 changes nothing. With BatchNorm, m and v
    are those of its input, and

        var <- var * v' / v        mean <- (mean - m) * sqrt(v' / v) + m'

    A model without any BatchNorm has the sum of each reprogrammed layer brought to the plain layer's mean and variance,
    by one factor and one summand an output (`layer.correction`).
    `"scratch"` forgets the stored BatchNorm statistics and takes those of the images given. It costs an adversarially
    trained model its robustness, since the statistics of such a model came from attacked images.

    The moments are exact over the whole loader, whatever its batch size. Layers are corrected while the images pass,
    so that later ones see corrected inputs; the larger the batches, the better the correction the first of them see.
    Calling it again starts over from the plain model's statistics, which stay in the model, and :func:`restore_` brings
    them back. Training modes are kept. A calibrated model is carried by `save_pretrained` and by its state dict, the
    plain model's statistics included.

    Args:
        model: A reprogrammed model.
        loader: Batches of pixels `[B, C, H, W]` in [0, 1], or tuples that start with one. A thousand images are enough.
        mode: `"relative"` or `"scratch"`.
        mean, std: The model's normalisation, one number a channel; by default timm's for this model, and none for a
            model that is not timm's.
        progress: Whether to show a progress bar.

    Returns:
        `model`.

    Raises:
        ValueError: The model is not reprogrammed, the loader is empty or gives no pixels in [0, 1], or "scratch" finds
            no BatchNorm. After any error, also one from the loader, the model is as it was before calibration.

    Example:
        >>> calibrate_(reprogram_(model, NRPMConfig(lam=0.5)), loader)
    """
    if mode not in ("relative", "scratch"):
        raise ValueError(f'mode={mode!r} is not known: choose "relative" or "scratch".')
    record_of(model)
    subject = subject_of(model, mean, std)
    ours, net = subject.model, subject.on_pixels()
    check_gradients(ours)  # nor could its statistics be moved
    layers, norms = reprogrammed_layers(ours), norms_of(ours)
    if mode == "scratch" and not norms:
        raise ValueError('mode="scratch" re-estimates BatchNorm statistics, and this model has none: use "relative".')
    images = track(pixels_of(loader), "Calibrating", total=count_of(loader), disable=not progress, console=CONSOLE)
    if norms and not is_settled(ours):  # the loader may be one that gives its images once
        images = _Kept(images)
        settle_(ours, plain_of(net, images).model)
    uncalibrate_(ours)
    plain = alike(plain_copy(ours), net)
    sites: dict[str, _Site] = {name: _NormSite(norm, mode) for name, norm in norms.items()}
    active = {} if norms else {name: layer for name, layer in layers.items() if not layer.is_plain()}
    sites |= {name: _SumSite(layer) for name, layer in active.items()}
    try:
        _pass(net, plain if mode == "relative" else None, sites, plain.model, images)
    except BaseException:
        uncalibrate_(ours)
        raise
    return model


@torch.inference_mode(False)
@torch.no_grad()
def plain_of(net: PixelModel, loader: Iterable[Any], trained: Collection[str] | None = None) -> PixelModel:
    """The plain model of a reprogrammed one, with statistics that fit its weights.

    They are those that the plain model had. Where weights were trained since, they are the reprogrammed model's own,
    moved by the change that lambda = 1 makes, as `calibrate_` moves them the other way.

    Args:
        net: The reprogrammed model on pixels.
        loader: As for :func:`calibrate_`; looked at only where weights were trained.
        trained: Names of the BatchNorms whose statistics training moved; by default those whose statistics differ from
            the plain model's. The others keep these.
    """
    known = complete(net.model)
    plain = alike(plain_copy(net.model, kept=known), net)
    if is_settled(net.model):
        return plain
    theirs = norms_of(net.model)
    sites: dict[str, _Site] = {}
    for name, norm in norms_of(plain.model).items():
        now = {key: theirs[name]._buffers[key] for key in KEPT[:2]}
        differs = any(not torch.equal(norm._buffers[key], now[key]) for key in now)  # type: ignore[arg-type]
        moved = name in trained if trained is not None else differs or not known
        if moved:
            for key, value in now.items():
                norm._buffers[key].copy_(value)  # type: ignore[union-attr, arg-type]
            sites[name] = _NormSite(norm, "relative")
    if sites:
        _pass(plain, net, sites, net.model, pixels_of(loader))
    return plain


def _pass(
    moving: PixelModel,
    reference: PixelModel | None,
    sites: Mapping[str, _Site],
    beside: nn.Module,
    images: Iterable[Tensor],
) -> None:
    """Let images pass through both models, while the sites of the first follow the change from the second."""
    hooks = [hook for name, site in sites.items() for hook in site.watch(name, moving.model, beside)]
    seen = 0
    try:
        with evaluating(moving.model), evaluating(beside):
            for pixels in images:
                pixels = pixels.to(moving.mean.device)
                if reference is not None:
                    reference.model(reference.normalise(pixels))
                moving.model(moving.normalise(pixels))
                seen += len(pixels)
    finally:
        for hook in hooks:
            hook.remove()
    if not seen:
        raise ValueError("The loader gave no images: calibration needs at least one batch.")


class _Kept:
    """Batches that are given once, and again from memory."""

    def __init__(self, batches: Iterable[Tensor]) -> None:
        self.batches, self.kept = batches, list[Tensor]()

    def __iter__(self) -> Iterator[Tensor]:
        if not self.kept:
            self.kept += self.batches
        return iter(self.kept)
