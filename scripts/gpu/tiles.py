"""The time of candidate tiles and of each way to divide: what could be a default.

The package's tables in `cuda_kernels.py` are data: a tile that is faster here belongs into them, and one that is never
the fastest out of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch

from gpu.layers import EPS, LAYERS, TINY, K, Layer
from gpu.session import Session, Work
from timm_nrpm.nn.estimator import Penalty
from timm_nrpm.nn.kernels import cuda, cuda_kernels
from timm_nrpm.nn.kernels.cuda_kernels import DEEP_TILES, RECIPROCALS, TILES, Tile

# Tiles that are not in the package's tables.
MORE: list[Tile] = [
    (8, 128, 4, 1), (16, 128, 4, 1), (32, 32, 4, 1), (32, 128, 4, 1), (64, 64, 4, 1), (64, 128, 8, 1),
    (16, 64, 4, 4), (32, 64, 4, 4), (32, 128, 8, 4), (64, 64, 4, 4), (64, 64, 8, 4), (1, 256, 4, 4), (4, 64, 2, 4),
]  # fmt: skip
MORE_DEEP: list[Tile] = [(8, 32, 8, 4, 1), (16, 32, 4, 4, 1), (32, 32, 2, 4, 1), (16, 64, 2, 8, 1), (4, 64, 8, 4, 1)]
TABLES = {"forward": (TILES, MORE), "backward_x": (TILES, MORE), "backward_weight": (DEEP_TILES, MORE_DEEP)}
TRIED_BY = "approximate"
"""How the tiles to try divide; the other ways are timed with the best tile."""

CHOSEN = (LAYERS[0], LAYERS[1], LAYERS[4])
"""Layers on which tiles are tried: 3x3, 1x1 and depthwise."""


@contextmanager
def only_tiles(reciprocal: str, **tiles: Tile) -> Iterator[None]:
    """Let each named kernel have one tile, which needs no timing, and divide in one way."""
    cuda.RECIPROCAL, before = reciprocal, cuda.RECIPROCAL
    kernels = {name: getattr(cuda_kernels, name) for name in tiles}
    configs = {name: kernel.configs for name, kernel in kernels.items()}
    for name, tile in tiles.items():
        cuda_kernels.use_tiles(kernels[name], [tile])
    try:
        yield
    finally:
        cuda.RECIPROCAL = before
        for name, kernel in kernels.items():
            kernel.configs = configs[name]
            kernel.cache.clear()


def candidates(kernel: str) -> list[Tile]:
    return [tile for table in TABLES[kernel] for tile in table]


def launches(layer: Layer, device: str) -> dict[str, Work]:
    """A call of each kernel on a layer."""
    x, weight = layer.operands(*layer.tensors(device))
    conv, penalty, lam = layer.convolution, Penalty.named("l1", EPS), torch.tensor(0.5, device=device)
    plain = conv.plain(x, weight)
    grad, grad_x, grad_weight = torch.randn_like(plain), torch.empty_like(x), torch.empty_like(weight)
    out, state = cuda.compute(x, weight, lam, True, *layer.settings(penalty, K), not layer.kernel, True)
    nothing = x.new_empty(0)
    backward = (grad, x, weight, lam, True, state)
    return {
        "forward": partial(cuda.forward, x, weight, plain, lam, True, out, nothing, conv, K, penalty),
        "backward_x": partial(cuda.backward_x, *backward, grad_x, conv, K, penalty),
        "backward_weight": partial(cuda.backward_weight, *backward, grad_weight, conv, K, penalty),
    }


def tiles(session: Session) -> None:
    layers = TINY[:1] if session.quick else CHOSEN
    for layer in layers:
        with session.attempt(f"tiles of {layer}"):
            session.need(10)
            works = launches(layer, session.device)
            for kernel, work in works.items():
                with session.attempt(f"tiles of {kernel}, {layer}"):
                    _try_tiles(session, layer, kernel, work)


def _try_tiles(session: Session, layer: Layer, kernel: str, work: Work) -> None:
    """Add a row: the best tile, the best of the package's table, and the ways to divide with the best tile."""
    times: dict[Tile, float] = {}
    for tile in candidates(kernel)[:: 7 if session.quick else 1]:
        with session.attempt(f"tile {tile} of {kernel}, {layer}"), only_tiles(TRIED_BY, **{kernel: tile}):
            session.need(2)
            times[tile] = session.medians({"": work}, 0.05)[""]
    if not times:
        return
    best = min(times, key=times.__getitem__)
    known = min((tile for tile in times if tile in TABLES[kernel][0]), key=times.__getitem__, default=best)
    ways: dict[str, float] = {}
    for reciprocal in RECIPROCALS:
        with session.attempt(f"1 / u by {reciprocal}, {kernel}, {layer}"), only_tiles(reciprocal, **{kernel: best}):
            ways[reciprocal] = session.medians({"": work}, 0.2)[""]
    session.add("tiles", **{
        "kernel": kernel, "layer": str(layer), "best tile": str(best), "ms": 1e3 * times[best],
        "best of the table": str(known), "ms of that": 1e3 * times[known],
        **{f"ms by {name}": 1e3 * ways[name] if name in ways else None for name in RECIPROCALS},
    })  # fmt: skip
    for tile, seconds in sorted(times.items(), key=lambda pair: pair[1]):
        session.add("every tile", kernel=kernel, layer=str(layer), tile=str(tile), ms=1e3 * seconds)
