"""The operator: products a second, the share of the limit, and what it replaces beside it."""

from __future__ import annotations

from typing import Any

import torch

from gpu import limits
from gpu.layers import LAYERS, TINY, K, Layer, with_gradients, without_gradients
from gpu.session import Session, Work
from timm_nrpm.nn.kernels.cuda import RECIPROCAL

COMPILED = 4  # number of layers beside which the compiled reference is measured, since compiling takes a while


def at_the_limit(rates: dict[str, float], both: bool) -> float | None:
    """Products a second at the limit: K steps forward and, in both passes, 2 K backward, for input and weight."""
    if not both:
        return rates["forward"] / K if "forward" in rates else None
    needed = ("forward that keeps a state", "backward")
    if any(name not in rates for name in needed):
        return None
    forward, backward = (rates[name] for name in needed)
    return 1 / (K / forward + 2 * K / backward)


def operator(session: Session, tables: dict[str, Any]) -> None:
    """Add a row for each layer and direction; `tables` has the limits."""
    rates = limits.rates(tables, RECIPROCAL)
    layers = TINY if session.quick else LAYERS
    for layer in layers:
        for both in (False, True):
            what = f"{layer}, {'forward and backward' if both else 'forward'}"
            with session.attempt(what):
                session.need(8)
                _measure(session, layer, both, at_the_limit(rates, both))
    for layer in layers[:COMPILED]:
        for both in (False, True):
            what = f"{layer}, {'forward and backward' if both else 'forward'}, beside the compiled reference"
            with session.attempt(what):
                session.need(20)
                _beside_compiled(session, layer, both)


def _measure(session: Session, layer: Layer, both: bool, limit: float | None) -> None:
    x, weight = layer.tensors(session.device)
    works = _works(layer, x, weight, both)
    graph = None
    works["ours"]()  # compiles, and chooses the tile
    if session.device == "cuda":
        with session.attempt(f"{layer}, {'both' if both else 'forward'}, as a CUDA graph"):
            graph = session.graphed(works["ours"])
    timed = {"ours": works["ours"], "plain": works["plain"], **({"graph": graph} if graph else {})}
    seconds = session.medians(timed, 0.8)
    rate = layer.products(weight) / min(seconds["ours"], seconds.get("graph", seconds["ours"]))
    session.add("operator, both" if both else "operator", **{
        "layer": str(layer), "G products/s": rate / 1e9, "% of the limit": limit and 100 * rate / limit,
        "ms": 1e3 * seconds["ours"], "ms as a graph": 1e3 * seconds["graph"] if graph else None,
        "ms of the plain layer": 1e3 * seconds["plain"], "times the plain layer": seconds["ours"] / seconds["plain"],
        "MiB": session.peak_mib(works["ours"]),
    })  # fmt: skip


def _works(layer: Layer, x: torch.Tensor, weight: torch.Tensor, both: bool) -> dict[str, Work]:
    forwards = layer.forwards(x, weight)
    if both:
        return {name: with_gradients(forward, x, weight) for name, forward in forwards.items()}
    return {name: without_gradients(forward) for name, forward in forwards.items()}


def _beside_compiled(session: Session, layer: Layer, both: bool) -> None:
    """Add a row for a batch whose products fit in memory a dozen times, as the reference's gradient needs."""
    if session.device == "cuda":
        free = torch.cuda.mem_get_info()[0]
        while layer.batch > 1 and 4 * 12 * layer.products(torch.empty(_shape(layer), device="meta")) > free / 2:
            layer = Layer(**{**vars(layer), "batch": layer.batch // 2})
    x, weight = layer.tensors(session.device)
    forwards = layer.forwards(x, weight)
    if session.device == "cuda":  # compiling for the CPU would need a compiler, and tells nothing about a GPU
        forwards["compiled"] = torch.compile(forwards["reference"], dynamic=False)
    works = {
        name: with_gradients(work, x, weight) if both else without_gradients(work)
        for name, work in forwards.items()
        if name != "plain"
    }
    seconds = session.medians(works, 1.0)
    session.add("reference", **{
        "layer": str(layer), "direction": "both" if both else "forward", "ms": 1e3 * seconds["ours"],
        **{f"ms of the {'compiled ' * (name == 'compiled')}reference": 1e3 * seconds[name]
           for name in ("reference", "compiled") if name in seconds},
        **{f"faster than the {'compiled ' * (name == 'compiled')}reference": seconds[name] / seconds["ours"]
           for name in ("reference", "compiled") if name in seconds},
    })  # fmt: skip


def _shape(layer: Layer) -> tuple[int, ...]:
    kernel = (layer.kernel, layer.kernel) if layer.kernel else ()
    return (layer.outputs, layer.channels // layer.groups, *kernel)
