"""Calibration: statistics re-estimated after reprogramming, from images alone, without labels or gradients.

Reprogramming changes the mean and variance of every layer's output, but the layers that follow were trained for the old
ones. The paper leaves the stored statistics stale, and most of the clean accuracy that it loses is lost there.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from timm_nrpm.data.images import count_of, pixels_of
from timm_nrpm.jobs.progress import track
from timm_nrpm.models.modes import check_gradients, evaluating
from timm_nrpm.models.moments import Moments
from timm_nrpm.models.plain_statistics import KEPT, complete, norms_of
from timm_nrpm.models.provenance import Step
from timm_nrpm.models.reprogramming import is_settled, plain_copy, record_of, reprogrammed_layers, settle_, uncalibrate_
from timm_nrpm.models.units import fit_units_
from timm_nrpm.nn.fitted import Correction
from timm_nrpm.nn.layers import Reprogrammed
from timm_nrpm.nn.pixel_model import PixelModel, alike
from timm_nrpm.nn.wrappers import subject_of

Model = TypeVar("Model", bound=nn.Module)


class _Site(ABC):
    """A module at which statistics are corrected, with the moments of its values in two models.

    The *moving* model is the one that is corrected, and the *reference* the one it is compared with. On every batch the
    reference runs first and leaves the moments of each call of the module. The moving model takes them in the same
    order, so that both totals always cover the same calls.
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
        reference = self.waiting.popleft() if self.waiting else moving  # "scratch" has no reference
        self.reference = self.reference + reference if self.reference else reference
        self.moving = self.moving + moving if self.moving else moving
        before, after = self.reference.var, self.moving.var
        growth = torch.where((before > 0) & (after > 0), after / before, 1.0)
        self.correct(self.reference, self.moving, growth.sqrt())

    @abstractmethod
    def correct(self, reference: Moments, moving: Moments, growth: Tensor) -> None:
        """Write the correction for all values seen so far.

        Args:
            reference, moving: Moments in the two models.
            growth: Standard deviation in the moving model over that in the reference, `[C]`.
        """

    @abstractmethod
    def watch(self, name: str, model: nn.Module, reference: nn.Module) -> list[Any]:
        """Register hooks on both models, and return their handles, by which the caller removes them.

        Args:
            name: Name of the module in both models.
            model: The moving model.
            reference: The reference.
        """


class _NormSite(_Site):
    """A BatchNorm whose stored statistics are corrected, with the moments of its input."""

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
    """A reprogrammed layer whose sum is brought to the plain layer's moments, with the moments of that sum."""

    def __init__(self, layer: Reprogrammed) -> None:
        super().__init__()
        self.channel = layer.channel
        self.correction = layer.add_part(Correction)

    def correct(self, reference: Moments, moving: Moments, growth: Tensor) -> None:
        self.correction.gain.copy_(1 / growth)
        self.correction.offset.copy_(reference.mean - moving.mean / growth)

    def watch(self, name: str, model: nn.Module, reference: nn.Module) -> list[Any]:
        def see_sum(layer: Any, _: Any, output: Tensor) -> None:
            bias = 0.0 if layer.bias is None else layer.bias.view(-1, *[1] * (-self.channel - 1))
            self.see_reference(output - bias)

        return [
            reference.get_submodule(name).register_forward_hook(see_sum),
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
    """Re-estimate, in place, the statistics that reprogramming made stale. The paper does not do this.

    `"relative"` compares the mean and variance of the same images in the plain model (m, v) and in the reprogrammed one
    (m', v'), and changes the stored statistics only by the difference, so that lambda = 1 changes nothing. With
    BatchNorm, m and v are the moments of its input, and

        var <- var * v' / v        mean <- (mean - m) * sqrt(v' / v) + m'

    In a model without any BatchNorm, the sum of each reprogrammed layer is brought to the plain layer's mean and
    variance by one factor and one summand per output channel (`layer.correction`).
    `"scratch"` replaces the stored BatchNorm statistics by those of the given images. It costs an adversarially
    trained model its robustness, since the statistics of such a model came from attacked images.

    With `standardize=True`, layers get their units first, in a pass through the plain model, and images are kept in
    memory. `tune` takes units only before weights train, which then learn in them.

    The moments are exact over the whole loader, whatever its batch size. Layers are corrected while the images pass,
    so that later layers see corrected inputs; the larger the batches, the better the corrections in the first of them.
    A second call starts again from the plain model's statistics, which stay in the model; :func:`restore_` brings them
    back. Training modes are kept. Both `save_pretrained` and the state dict preserve the calibration and the plain
    model's statistics.

    Args:
        model: A reprogrammed model.
        loader: Batches of pixels `[B, C, H, W]` in [0, 1], or of tuples that start with such pixels. A thousand images
            are enough.
        mode: `"relative"` or `"scratch"`, as described above.
        mean, std: The model's normalisation, one number per channel; by default timm's for this model, and none for a
            model that is not timm's.
        progress: Whether to show a progress bar.

    Returns:
        `model`.

    Raises:
        ValueError: The model is not reprogrammed, the loader is empty or gives no pixels in [0, 1], or "scratch" finds
            no BatchNorm. After any error, one from the loader included, the model is as it was before calibration.

    Example:
        >>> model = calibrate_(reprogram_(model, NRPMConfig(lam=0.5)), training_loader)
    """
    if mode not in ("relative", "scratch"):
        raise ValueError(f'mode={mode!r} is not known: choose "relative" or "scratch".')
    record_of(model)
    subject = subject_of(model, mean, std)
    inner, net = subject.model, subject.on_pixels()
    check_gradients(inner)  # statistics made under torch.inference_mode cannot be changed in place either
    layers, norms = reprogrammed_layers(inner), norms_of(inner)
    if mode == "scratch" and not norms:
        raise ValueError('mode="scratch" re-estimates BatchNorm statistics, and this model has none: use "relative".')
    standardize = record_of(inner).config.standardize
    images: Iterable[Tensor] = track(pixels_of(loader), "Calibrating", count_of(loader), progress)
    if (norms and not is_settled(inner)) or standardize:  # the loader may give its images only once
        images = _CachedBatches(images)
    if norms and not is_settled(inner):
        settle_(inner, plain_of(net, images).model)
    uncalibrate_(inner)
    plain = alike(plain_copy(inner), net)
    sites: dict[str, _Site] = {name: _NormSite(norm, mode) for name, norm in norms.items()}
    active = {} if norms else {name: layer for name, layer in layers.items() if not layer.is_plain()}
    sites |= {name: _SumSite(layer) for name, layer in active.items()}
    try:
        if standardize:
            fit_units_(layers, plain, images)  # also where lambda is 1, since it may be learned
        seen = _pass(net, plain if mode == "relative" else None, sites, plain.model, images)
    except BaseException:
        uncalibrate_(inner)
        raise
    record_of(inner).statistics = (Step("calibration", mode, seen),)
    return model


@torch.inference_mode(False)
@torch.no_grad()
def plain_of(net: PixelModel, loader: Iterable[Any], trained: Collection[str] | None = None) -> PixelModel:
    """The plain model of a reprogrammed one, with BatchNorm statistics that fit its weights.

    The statistics are those that the plain model had. Where weights were trained since, they are those of the
    reprogrammed model, corrected for the change back to lambda = 1 as `calibrate_` corrects for the change from it.

    Args:
        net: The reprogrammed model on pixels.
        loader: The same as in :func:`calibrate_`; it is read only if weights were trained.
        trained: Names of the BatchNorms whose statistics training changed; by default those whose statistics differ
            from the plain model's. All others keep the plain model's statistics.
    """
    known = complete(net.model)
    plain = alike(plain_copy(net.model, kept=known), net)
    if is_settled(net.model):
        return plain
    norms = norms_of(net.model)
    sites: dict[str, _Site] = {}
    for name, norm in norms_of(plain.model).items():
        now = {key: norms[name]._buffers[key] for key in KEPT[:2]}
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
    reference_module: nn.Module,
    images: Iterable[Tensor],
) -> int:
    """Run images through both models, and correct the moving one at each site as it is called.

    Args:
        moving: The model that is corrected.
        reference: The model that it is compared with; None runs the moving model alone.
        sites: Places of the corrections, by the name of the module.
        reference_module: The module of the reference, which gets hooks even if it is not run.
        images: Batches of pixels `[B, C, H, W]`.

    Returns:
        Number of images.
    """
    hooks = [hook for name, site in sites.items() for hook in site.watch(name, moving.model, reference_module)]
    seen = 0
    try:
        with evaluating(moving.model), evaluating(reference_module):
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
    return seen


class _CachedBatches:
    """Batches that are read once, and kept in memory for further passes."""

    def __init__(self, batches: Iterable[Tensor]) -> None:
        self.batches, self.cached = batches, list[Tensor]()

    def __iter__(self) -> Iterator[Tensor]:
        if not self.cached:
            self.cached += self.batches
        return iter(self.cached)
