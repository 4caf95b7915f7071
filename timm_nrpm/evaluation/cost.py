"""What a reprogrammed model costs, before it is run: products, parameters, time and memory, beside the plain model."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from timm_nrpm.checks import check_integer, shown
from timm_nrpm.evaluation.cost_report import CostReport, LayerCost, MeasuredCost
from timm_nrpm.evaluation.machine import Machine
from timm_nrpm.evaluation.speed import machine_of, wait_for
from timm_nrpm.evaluation.stopwatch import peak_bytes, seconds_of
from timm_nrpm.models.modes import evaluating
from timm_nrpm.models.reprogramming import plain_copy, reprogrammed_layers
from timm_nrpm.models.selection import example_of
from timm_nrpm.models.work import LayerWork, Work, work_of
from timm_nrpm.nn.kernels import native, tiled
from timm_nrpm.nn.layers import Reprogrammed
from timm_nrpm.nn.wrappers import unwrapped

PANEL = 1 << 18
"""Bytes of a panel of inputs, of which the compiled kernels hold one for each thread (CACHE in kernels/penalty.h)."""

TILES = 8
"""Tiles of products that the estimate in ordinary operations holds at once."""

SECONDS = 1.0
"""Seconds for which each of the two models runs, at least, where it is measured."""


def cost(
    model: nn.Module,
    image_size: int | Sequence[int] | None = None,
    *,
    batch: int = 1,
    measured: bool = False,
) -> CostReport:
    """Estimate what a forward of a model costs on this machine, and how much more than the plain model.

    The plain model runs once on an image of zeros, to count its products and the memory that it holds. Times come from
    a small model of the machine (:class:`timm_nrpm.machine.Machine`): the first call in a process measures, in about a
    second, how many products a second layers of every kind compute, plain and with the estimate of this K. So the
    reprogrammed model itself does not run, unless `measured`. Times are those of a machine that has nothing else to do.
    On twelve models they were between 0.7 and 1.6 times what one thread took (`results/cost.md`): where it matters,
    measure.

    Args:
        model: A model, reprogrammed or plain, on the device and in the type in which it is to run. It is not changed.
        image_size: Height and width of the images in pixels, one number for both; or `(C, H, W)`. By default a timm
            model's own size and channels; another model's images have three channels, if none are given.
        batch: Number of images in a forward; 1 by default.
        measured: Whether to run the model and the plain one too, for some seconds, and measure time and memory.

    Returns:
        The cost of each layer, the totals, and what was assumed of the machine.

    Raises:
        ValueError: The image size is not known or not allowed, the model is on the meta device, has no layer that is
            counted, or does not run on such images.

    Example:
        >>> report = timm_nrpm.cost(model)
        >>> report.layers[0].name, report.layers[0].products
        ('conv1', 4608)
        >>> report.slowdown > 1
        True
    """
    model = unwrapped(model)
    batch = check_integer("batch", batch, least=1, why=" images")
    first = next(model.parameters(), None)
    if first is None or any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError(
            f"This {type(model).__name__} has {'no parameters' if first is None else 'parameters on the meta device'}, "
            "so it cannot run: give a model whose weights are in memory; random ones cost the same."
        )
    image = _image(model, image_size)
    example = torch.zeros(batch, *image, device=first.device, dtype=first.dtype)
    robust = _estimated(model)
    plain = plain_copy(model) if reprogrammed_layers(model) else model
    work = _work(plain, example)
    config = next(iter(robust.values())).config if robust else None
    machine = machine_of(example.device, example.dtype, None if config is None else config.estimator)
    weights = sum(each.numel() * each.element_size() for each in (*model.parameters(), *model.buffers()))
    return CostReport(
        model=str((getattr(model, "pretrained_cfg", None) or {}).get("architecture") or type(model).__name__),
        image=image,
        batch=batch,
        layers=tuple(_layer(each, model, robust.get(each.name), machine, batch) for each in work.layers),
        rest_products=work.products // batch,
        rest_seconds=machine.rest(work),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        memory=weights + work.peak + (_scratch(example) if robust else 0),
        plain_memory=weights + work.peak,
        machine=machine,
        measured=_measured(model, plain, example, weights) if measured else None,
    )


def _image(model: nn.Module, image_size: int | Sequence[int] | None) -> tuple[int, int, int]:
    """The shape `(C, H, W)` of an image.

    Raises:
        ValueError: It is not known, or not allowed.
    """
    known = example_of(model)
    if image_size is None:
        if known is None:
            raise ValueError(
                f"This {type(model).__name__} does not say what size its images have: give image_size=, such as 224, "
                "(224, 160) or, with the channels, (1, 28, 28)."
            )
        return known.shape[1], known.shape[2], known.shape[3]
    sizes: Any = image_size if isinstance(image_size, Sequence) else (image_size, image_size)
    if isinstance(sizes, str) or len(sizes) not in (2, 3):
        raise ValueError(f"image_size={shown(image_size)} is not allowed: give H, (H, W) or (C, H, W).")
    channels = (3 if known is None else known.shape[1],) if len(sizes) == 2 else ()
    found = [check_integer("image_size", size, least=1, why=" pixels") for size in (*channels, *sizes)]
    return found[0], found[1], found[2]


def _estimated(model: nn.Module) -> dict[str, Reprogrammed]:
    """The reprogrammed layers that compute an estimate in inference."""
    with torch.no_grad():
        return {name: layer for name, layer in reprogrammed_layers(model).items() if not layer.is_plain()}


def _work(plain: nn.Module, example: Tensor) -> Work:
    """What a forward of the plain model computes.

    Raises:
        ValueError: The model does not run on the example, or has no layer that is counted.
    """
    try:
        work = work_of(plain, example)
    except Exception as error:
        raise ValueError(
            f"The model does not run on images {list(example.shape)} ({error}): give the size that it takes as "
            "image_size=."
        ) from error
    if not work.layers:
        raise ValueError(
            f"This {type(plain).__name__} calls no convolutional or linear layer, and nothing else is reprogrammed: "
            "give a model that has one."
        )
    return work


def _layer(work: LayerWork, model: nn.Module, robust: Reprogrammed | None, machine: Machine, batch: int) -> LayerCost:
    """What a layer costs; `robust` is the layer if it computes an estimate."""
    plain = machine.layer(work, estimated=False)
    seconds = plain if robust is None else machine.layer(work, estimated=True)
    if robust is not None and robust.config.standardize:
        seconds += plain / batch  # standard units add the plain layer of the mean image
    return LayerCost(
        name=work.name,
        kind=work.kind,
        estimated=robust is not None,
        products=work.products // batch,
        parameters=sum(parameter.numel() for parameter in model.get_submodule(work.name).parameters()),
        seconds=seconds,
        plain_seconds=plain,
    )


def _scratch(example: Tensor) -> int:
    """Bytes that the estimate holds beside the inputs and outputs of a layer."""
    if example.is_cuda:
        return 0
    if native.serves(example):
        return torch.get_num_threads() * PANEL
    return TILES * tiled.TILE * example.element_size()


def _measured(model: nn.Module, plain: nn.Module, example: Tensor, weights: int) -> MeasuredCost:
    """Time and memory of a forward of either model."""

    def forward(net: nn.Module) -> None:
        wait_for(net(example))

    times, sizes = [], []
    for net in (model, plain):
        with evaluating(net), torch.no_grad():
            times.append(min(seconds_of(partial(forward, net), SECONDS)))  # other jobs disturb it least
            peak = peak_bytes(partial(forward, net), example.device.type)
        sizes.append(None if peak is None else weights + peak)
    return MeasuredCost(times[0], times[1], sizes[0], sizes[1])
