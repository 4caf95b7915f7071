"""Statistics re-estimated after reprogramming, from images alone: no labels, no gradient.

Reprogramming changes the mean and variance of every layer's output, and what follows was made for the old ones. The
paper leaves them stale; most of the clean accuracy it loses is lost there.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Sized
from typing import Any, Literal, TypeVar

import torch
from rich.progress import track
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from timm_nrpm.layers import Reprogrammed
from timm_nrpm.reprogramming import (
    Statistic,
    evaluating,
    forget_calibration_,
    plain_copy,
    record_of,
    reprogrammed_layers,
)

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
    """A module whose input calibration corrects, and the moments of that input in both models.

    The plain model sees a batch first and leaves one entry a call; the reprogrammed model takes them up in the same
    order, so that both moments always cover the same calls.
    """

    channel: int

    def __init__(self) -> None:
        self.waiting: deque[Moments] = deque()
        self.plain: Moments | None = None
        self.ours: Moments | None = None

    def see_plain(self, values: Tensor) -> None:
        self.waiting.append(Moments.of(values, self.channel))

    def see_ours(self, values: Tensor) -> None:
        ours = Moments.of(values, self.channel)
        plain = self.waiting.popleft() if self.waiting else ours  # "scratch" compares with nothing
        self.plain = self.plain + plain if self.plain else plain
        self.ours = self.ours + ours if self.ours else ours
        before, after = self.plain.var, self.ours.var
        growth = torch.where((before > 0) & (after > 0), after / before, 1.0)
        self.correct(self.plain, self.ours, growth.sqrt())

    @abstractmethod
    def correct(self, plain: Moments, ours: Moments, growth: Tensor) -> None:
        """Write the correction for what was seen so far; `growth` is that of the standard deviation, `[C]`."""

    @abstractmethod
    def watch(self, name: str, model: nn.Module, plain: nn.Module) -> list[Any]:
        """Hooks on both models, to be removed."""


class _NormSite(_Site):
    """A BatchNorm, whose stored statistics move."""

    channel = 1

    def __init__(self, norm: _BatchNorm, mode: str) -> None:
        super().__init__()
        assert norm.running_mean is not None
        assert norm.running_var is not None
        self.mean, self.var, self.mode = norm.running_mean, norm.running_var, mode
        self.stored = {"running_mean": self.mean.clone(), "running_var": self.var.clone()}

    def kept(self) -> dict[str, Statistic]:
        now = {"running_mean": self.mean, "running_var": self.var}
        return {key: Statistic(before, now[key].clone()) for key, before in self.stored.items()}

    def correct(self, plain: Moments, ours: Moments, growth: Tensor) -> None:
        if self.mode == "scratch":
            self.mean.copy_(ours.mean)
            self.var.copy_(ours.var)
        else:
            self.mean.copy_((self.stored["running_mean"] - plain.mean) * growth + ours.mean)
            self.var.copy_(self.stored["running_var"] * growth.square())

    def watch(self, name: str, model: nn.Module, plain: nn.Module) -> list[Any]:
        return [
            plain.get_submodule(name).register_forward_pre_hook(lambda _, inputs: self.see_plain(inputs[0])),
            model.get_submodule(name).register_forward_pre_hook(lambda _, inputs: self.see_ours(inputs[0])),
        ]


class _SumSite(_Site):
    """A reprogrammed layer, whose sum is brought to the plain layer's mean and variance."""

    def __init__(self, layer: Reprogrammed) -> None:
        super().__init__()
        self.channel = layer.channel
        self.correction = layer.add_correction()

    def correct(self, plain: Moments, ours: Moments, growth: Tensor) -> None:
        self.correction.gain.copy_(1 / growth)
        self.correction.offset.copy_(plain.mean - ours.mean / growth)

    def watch(self, name: str, model: nn.Module, plain: nn.Module) -> list[Any]:
        def see(layer: Any, _: Any, output: Tensor) -> None:
            bias = 0.0 if layer.bias is None else layer.bias.view(-1, *[1] * (-self.channel - 1))
            self.see_plain(output - bias)

        return [
            plain.get_submodule(name).register_forward_hook(see),
            self.correction.register_forward_pre_hook(lambda _, inputs: self.see_ours(inputs[0])),
        ]


@torch.no_grad()
def calibrate_(
    model: Model,
    loader: Iterable[Any],
    mode: Literal["relative", "scratch"] = "relative",
    *,
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
    Calling it again starts over, and :func:`restore_` brings the old statistics back. Training modes are kept. A
    calibrated model is carried by `save_pretrained`, old statistics included; a state dict holds the new ones alone.

    Args:
        model: A reprogrammed model.
        loader: Batches of images `[B, C, H, W]` as the model takes them (normalised), or tuples that start with one.
            A thousand images are enough.
        progress: Whether to show a progress bar.

    Returns:
        `model`.

    Raises:
        ValueError: The model is not reprogrammed, the loader is empty, or "scratch" finds no BatchNorm. After any
            error, also one from the loader, the model is as it was before calibration.

    Example:
        >>> calibrate_(reprogram_(model, NRPMConfig(lam=0.5)), loader)
    """
    if mode not in ("relative", "scratch"):
        raise ValueError(f'mode={mode!r} is not known: choose "relative" or "scratch".')
    layers = reprogrammed_layers(model)
    record = record_of(model)
    norms = {n: m for n, m in model.named_modules() if isinstance(m, _BatchNorm) and m.running_mean is not None}
    if mode == "scratch" and not norms:
        raise ValueError('mode="scratch" re-estimates BatchNorm statistics, and this model has none: use "relative".')
    forget_calibration_(model, record)
    plain = plain_copy(model)
    sites: dict[str, _NormSite] = {name: _NormSite(norm, mode) for name, norm in norms.items()}
    active = {} if norms else {name: layer for name, layer in layers.items() if not layer.is_plain()}
    sums: dict[str, _SumSite] = {name: _SumSite(layer) for name, layer in active.items()}
    hooks = [hook for name, site in {**sites, **sums}.items() for hook in site.watch(name, model, plain)]
    seen, device = 0, next(model.parameters()).device
    try:
        with evaluating(model), evaluating(plain):
            total = len(loader) if isinstance(loader, Sized) else None
            for batch in track(loader, "Calibrating", total=total, disable=not progress):
                images = batch[0] if isinstance(batch, (tuple, list)) else batch
                if not isinstance(images, Tensor):
                    raise ValueError(
                        f"The loader gives {type(images).__name__}: give batches of images [B, C, H, W], or tuples "
                        "that start with one."
                    )
                images = images.to(device)
                if mode == "relative":
                    plain(images)
                model(images)
                seen += len(images)
        if not seen:
            raise ValueError("The loader gave no images: calibration needs at least one batch.")
    except BaseException:
        record.statistics = {name: site.kept() for name, site in sites.items()}
        forget_calibration_(model, record)
        raise
    finally:
        for hook in hooks:
            hook.remove()
    record.statistics = {name: site.kept() for name, site in sites.items()}
    return model
