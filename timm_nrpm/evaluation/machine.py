"""A small model of a machine: how fast it computes what a forward consists of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from timm_nrpm.models.work import DEPTHWISE, LayerWork, Work

WEIGHTS = "weights"
"""Kind of work of a layer beside its products: weights that come from main memory."""

ELEMENTWISE, CURVED, POOLED, ATTENTION = "elementwise", "curved", "pooled", "attention"
"""Kinds of work outside the layers: numbers that are read and written; those of which an exponential or the like is
computed; those of which the largest in each window is taken; and products."""


@dataclass(frozen=True)
class Rates:
    """How fast one thread computes one family of operations.

    Attributes:
        call: Seconds that a call takes beside its work.
        rates: Amount of work a second by kind: for layers as :func:`amount_of` counts it, products for ATTENTION,
            numbers for the others.
    """

    call: float
    rates: Mapping[str, float]

    def __str__(self) -> str:
        listed = ", ".join(f"{kind} {rate / 1e9:.3g}" for kind, rate in self.rates.items())
        return f"{listed}; {1e6 * self.call:.0f} us a call"


def amount_of(work: LayerWork, estimated: bool) -> int:
    """Amount of work in a layer: its products; but the outputs of a plain depthwise layer, which takes as long as its
    numbers take to move, whatever its kernel is."""
    return work.outputs if work.kind in DEPTHWISE and not estimated else work.products


@dataclass(frozen=True)
class Machine:
    """What a cost is estimated from: the work of a call is taken to be divided evenly among the threads.

    Attributes:
        device: Type of the device, such as `cpu`.
        threads: Number of threads that PyTorch uses; 1 on another device than a CPU.
        iterations: The paper's K of the estimate; 0 without an estimate.
        plain: Speed of plain layers.
        estimate: Speed of layers with the estimate, where a product counts once for all K steps; None without one.
        other: Speed of everything between the layers.
        name: Name of the processor or the GPU; empty if the system does not tell.
    """

    device: str
    threads: int
    iterations: int
    plain: Rates
    estimate: Rates | None
    other: Rates
    name: str = ""

    def layer(self, work: LayerWork, *, estimated: bool) -> float:
        """Seconds of a layer, plain or with the estimate, which starts from the plain sum and so takes no less."""
        families = [self.plain, self.estimate] if estimated and self.estimate is not None else [self.plain]
        return max(
            family.call
            + (
                amount_of(work, family is self.estimate) / family.rates[work.kind]
                + work.weights / family.rates[WEIGHTS]
            )
            / self.threads
            for family in families
        )

    def rest(self, work: Work) -> float:
        """Seconds of everything between the layers."""
        amounts = {ELEMENTWISE: work.moved, CURVED: work.curved, POOLED: work.pooled, ATTENTION: work.products}
        seconds = sum(amount / self.other.rates[kind] for kind, amount in amounts.items())
        return work.calls * self.other.call + seconds / self.threads

    def __str__(self) -> str:
        threads = f"each of {self.threads} threads" if self.threads > 1 else "one thread"
        lines = [f"Assumed of {threads} of this machine's {self.device.upper()}, in G products or numbers a second:"]
        lines.append(f"  plain layers: {self.plain}")
        if self.estimate is not None:
            lines.append(f"  estimate, K = {self.iterations}: {self.estimate}")
        return "\n".join([*lines, f"  between the layers: {self.other}"])
