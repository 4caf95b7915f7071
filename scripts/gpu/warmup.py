"""Compile the kernels that the other parts need, in several processes at once: Triton keeps them on disk.

Also how long Triton tries the tiles of each layer, which by its own habit would take half the time there is.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from gpu.layers import LAYERS, SMALL, TINY, Layer, with_gradients, without_gradients
from gpu.session import Session, Work

Job = tuple[str, Callable[[], Any]]


def time_tiles_by(bench: Callable[[Work, tuple[float, ...]], list[float]]) -> None:
    """Let the kernels of this process time tiles by another function than Triton's, in ms."""
    from timm_nrpm.nn.kernels import cuda_kernels

    for kernel in (cuda_kernels.forward, cuda_kernels.backward_x, cuda_kernels.backward_weight):
        kernel.do_bench = bench
        kernel.cache_results = False  # no timing of this kind is kept on disk


def once(call: Work, quantiles: tuple[float, ...]) -> list[float]:
    """Run a tile without timing it."""
    call()
    return [0.0] * len(quantiles)


def briefly(call: Work, quantiles: tuple[float, ...]) -> list[float]:
    """Time a tile for a few ms, where Triton takes 125: one that takes longer than 1 ms is called three times."""
    from triton.testing import do_bench

    call()
    torch.cuda.synchronize()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
    for event in events:
        event.record()
        if event is not events[-1]:
            call()
    torch.cuda.synchronize()
    shortest = min(events[0].elapsed_time(events[1]), events[1].elapsed_time(events[2]))
    return [shortest] * len(quantiles) if shortest > 1 else do_bench(call, warmup=1, rep=4, quantiles=quantiles)


def warmup(session: Session) -> None:
    """Run this process's share of the jobs, those of the parts that come first before the others."""
    index, processes = session.share
    time_tiles_by(once)
    for name, job in jobs(session)[index::processes]:
        with session.attempt(f"compiling ahead, {name}"):
            session.need(5)
            job()
            session.wait()


def jobs(session: Session) -> list[Job]:
    """Everything to compile, as far as sizes of layers tell."""
    layers = list(TINY)
    if not session.quick:
        layers = [*SMALL, *LAYERS, *layers_of("resnet50", 224, 32), *layers_of("resnet18_cifar_narrow", 32, 64)]
    made: list[Job] = []
    for layer in _unlike(layers):
        for both in (False, True):
            made.append((f"{layer}, {'both' if both else 'forward'}", partial(_run, layer, session.device, both)))
    return made if session.quick else made + _of_tiles(session.device)


def _run(layer: Layer, device: str, both: bool) -> None:
    x, weight = layer.tensors(device)
    forward = layer.forwards(x, weight)["ours"]
    (with_gradients(forward, x, weight) if both else without_gradients(forward))()


def _of_tiles(device: str) -> list[Job]:
    from gpu import tiles

    def job(layer: Layer, kernel: str, share: int, shares: int) -> None:
        work = tiles.launches(layer, device)[kernel]
        for tile in tiles.candidates(kernel)[share::shares]:
            with tiles.only_tiles(tiles.TRIED_BY, **{kernel: tile}):
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
            sizes = (batch, module.in_channels, module.out_channels, inputs[0].shape[-1])
            settings = (module.kernel_size[0], module.stride[0], int(module.padding[0]), module.groups)
            found.append(Layer(*sizes, *settings))

    for module in model.modules():
        module.register_forward_pre_hook(note)
    model(torch.empty(1, 3, size, size, device="meta"))
    return list(dict.fromkeys(found))
