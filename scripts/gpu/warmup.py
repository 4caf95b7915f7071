"""Compile the kernels that the other parts need, in several processes at once: Triton keeps them on disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from gpu.layers import LAYERS, SMALL, Layer, with_gradients, without_gradients
from gpu.session import Session, Work

Job = tuple[str, Callable[[], Any]]


@contextmanager
def without_timing() -> Iterator[None]:
    """Run every tile once instead of timing it."""
    from timm_nrpm.nn.kernels import cuda_kernels

    def once(call: Work, quantiles: tuple[float, ...]) -> tuple[float, ...]:
        call()
        return tuple(0.0 for _ in quantiles)

    kernels = (cuda_kernels.forward, cuda_kernels.backward_x, cuda_kernels.backward_weight)
    for kernel in kernels:
        kernel.do_bench = once
    try:
        yield
    finally:
        for kernel in kernels:
            del kernel.do_bench  # the property of the class comes back


def warmup(session: Session) -> None:
    """Run this process's share of the jobs, those of the parts that come first before the others."""
    if session.device != "cuda":
        session.leave_out("compiling ahead", "there is no GPU")
        return
    index, processes = session.share
    with without_timing():
        for name, job in jobs()[index::processes]:
            with session.attempt(f"compiling ahead, {name}"):
                session.need(5)
                job()
                session.wait()


def jobs() -> list[Job]:
    """Everything to compile, as far as names of kernels and sizes tell."""
    made: list[Job] = []
    for layer in _unlike([*SMALL, *LAYERS, *layers_of("resnet50", 224, 32), *layers_of("resnet18_cifar_narrow", 32, 64)]):
        made += [(f"{layer}, {both and 'both' or 'forward'}", partial(_run, layer, both)) for both in (False, True)]
    return made + _of_tiles()


def _run(layer: Layer, both: bool) -> None:
    x, weight = layer.tensors("cuda")
    forward = layer.forwards(x, weight)["ours"]
    (with_gradients(forward, x, weight) if both else without_gradients(forward))()


def _of_tiles() -> list[Job]:
    from gpu import tiles

    def job(layer: Layer, kernel: str, share: int, shares: int) -> None:
        work = tiles.launches(layer)[kernel]
        for tile in tiles.candidates(kernel)[share::shares]:
            with tiles.only_tiles("divide", **{kernel: tile}):
                work()

    return [
        (f"tiles of {kernel}, {layer}", partial(job, layer, kernel, share, 3))
        for layer in tiles.CHOSEN
        for kernel in tiles.TABLES
        for share in range(3)
    ]


def _unlike(layers: list[Layer]) -> list[Layer]:
    """One layer of those whose kernels are compiled alike: Triton tells sizes apart that are 1 or multiples of 16."""
    first: dict[tuple[Any, ...], Layer] = {}
    for layer in layers:
        sizes = (layer.channels // layer.groups, layer.outputs // layer.groups, layer.size, layer.size**2)
        kind = tuple((n == 1, n % 16 == 0) for n in sizes)
        first.setdefault((layer.kernel, layer.stride, layer.padding, layer.groups == 1, kind), layer)
    return list(first.values())


def layers_of(name: str, size: int, batch: int) -> list[Layer]:
    """The layers of a timm model, found by a pass of shapes alone."""
    import timm

    import timm_nrpm  # noqa: F401  # which registers the narrow models

    with torch.device("meta"):
        model = timm.create_model(name).eval()
    found: list[Layer] = []

    def note(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if isinstance(module, torch.nn.Linear):
            found.append(Layer(batch, module.in_features, module.out_features, 0, 0))
        elif isinstance(module, torch.nn.Conv2d):
            (kernel, _), (stride, _), (padding, *_) = module.kernel_size, module.stride, module.padding  # type: ignore[misc]
            sizes = (batch, module.in_channels, module.out_channels, inputs[0].shape[-1])
            found.append(Layer(*sizes, kernel, stride, int(padding), module.groups))

    for module in model.modules():
        module.register_forward_pre_hook(note)
    model(torch.empty(1, 3, size, size, device="meta"))
    return list(dict.fromkeys(found))
