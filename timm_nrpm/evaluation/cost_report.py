"""What a forward of a model costs: products, parameters, and estimated and measured time and memory."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from timm_nrpm.evaluation.machine import Machine, Rates

SHOWN = 10
"""Number of layers in the table, those that take longest."""


@dataclass(frozen=True)
class LayerCost:
    """What one layer costs.

    Attributes:
        name: Name of the layer.
        kind: What it is to the machine, one of `timm_nrpm.models.work.LAYER_KINDS`.
        estimated: Whether it computes the robust estimate, as a layer does that is reprogrammed and not plain.
        products: Number of products that it adds up for one image, each counted once whatever K is.
        parameters: Number of its parameters, lambda included.
        seconds: Estimated time for the batch, in seconds.
        plain_seconds: The same of the plain layer.
    """

    name: str
    kind: str
    estimated: bool
    products: int
    parameters: int
    seconds: float
    plain_seconds: float


@dataclass(frozen=True)
class MeasuredCost:
    """What was measured by running the model and the plain one.

    Attributes:
        seconds: Time of the fastest forward of the batch, in seconds.
        plain_seconds: The same of the plain model.
        memory: Most bytes that the model holds in a forward, its weights included; None where the system does not tell.
        plain_memory: The same of the plain model.
    """

    seconds: float
    plain_seconds: float
    memory: int | None
    plain_memory: int | None


@dataclass(frozen=True)
class CostReport:
    """What a forward of a model costs on this machine, beside the plain model.

    Attributes:
        model: Name of the architecture.
        image: Shape of an image, `(C, H, W)`.
        batch: Number of images in the batch.
        layers: All convolutional and linear layers, in the order of a forward.
        rest_products: Products for one image outside of the layers, such as those of attention.
        rest_seconds: Estimated time of everything between the layers for the batch, in seconds.
        parameters: Number of the model's parameters, lambdas included.
        memory: Estimate of the most bytes that the model holds in a forward of the batch, its weights included.
        plain_memory: The same of the plain model.
        machine: What the times were estimated from.
        measured: What was measured; None unless it was asked for.
    """

    model: str
    image: tuple[int, int, int]
    batch: int
    layers: tuple[LayerCost, ...]
    rest_products: int
    rest_seconds: float
    parameters: int
    memory: int
    plain_memory: int
    machine: Machine
    measured: MeasuredCost | None = None

    @property
    def products(self) -> int:
        """Number of products for one image."""
        return sum(layer.products for layer in self.layers) + self.rest_products

    @property
    def seconds(self) -> float:
        """Estimated time of a forward of the batch, in seconds."""
        return sum(layer.seconds for layer in self.layers) + self.rest_seconds

    @property
    def plain_seconds(self) -> float:
        """Estimated time of the plain model, in seconds."""
        return sum(layer.plain_seconds for layer in self.layers) + self.rest_seconds

    @property
    def slowdown(self) -> float:
        """Estimated time, in times that of the plain model."""
        return self.seconds / self.plain_seconds

    @property
    def verdict(self) -> str:
        """The result, in a sentence."""
        images = f"{self.batch} image{'s' * (self.batch != 1)} of {'x'.join(map(str, self.image))}"
        estimated = sum(layer.estimated for layer in self.layers)
        times = f"{self.slowdown:.1f} times the plain model's {_time(self.plain_seconds)}"
        memory = f"{_size(self.memory)} of memory, {self.memory / self.plain_memory:.2f} times its"
        return (
            f"{self.model}, {images}: about {_time(self.seconds)}, {times}, and {memory}, with the "
            f"estimate in {estimated} of {len(self.layers)} layers."
        )

    def __str__(self) -> str:
        width = max(len("all else"), *(len(layer.name) for layer in self.layers))
        largest = sorted(self.layers, key=lambda layer: -layer.seconds)[:SHOWN]
        lines = [self.verdict, f"{'layer':{width}}  M products  parameters  estimated  times plain  kind"]

        def row(name: str, products: int, parameters: int, seconds: float, plain: float, kind: str) -> str:
            times = f"{seconds / plain:11.1f}"
            return f"{name:{width}}{products / 1e6:12.2f}{parameters:12,}{_time(seconds):>11}  {times}  {kind}".rstrip()

        for layer in largest:
            kind = f"{layer.kind}{', estimate' * layer.estimated}"
            lines.append(row(layer.name, layer.products, layer.parameters, layer.seconds, layer.plain_seconds, kind))
        others = [layer for layer in self.layers if layer not in largest]
        products = self.products - sum(layer.products for layer in largest)
        parameters = self.parameters - sum(layer.parameters for layer in largest)
        seconds = self.rest_seconds + sum(layer.seconds for layer in others)
        plain = self.rest_seconds + sum(layer.plain_seconds for layer in others)
        lines.append(row("all else", products, parameters, seconds, plain, f"{len(others)} layers and what is between"))
        lines.append(row("total", self.products, self.parameters, self.seconds, self.plain_seconds, ""))
        if self.measured is not None:
            lines.append(self._measured(self.measured))
        return "\n".join([*lines, str(self.machine)])

    def _measured(self, measured: MeasuredCost) -> str:
        """What was measured, in a sentence."""
        times, off = measured.seconds / measured.plain_seconds, self.seconds / measured.seconds
        memory = ""
        if measured.memory is not None and measured.plain_memory is not None:
            memory = (
                f", and {_size(measured.memory)} of memory where the plain one takes {_size(measured.plain_memory)}"
            )
        return (
            f"Measured: {_time(measured.seconds)}, {times:.1f} times the plain model's {_time(measured.plain_seconds)}"
            f"{memory}. The estimate is {off:.2f} times the measured time."
        )

    def to_json(self) -> str:
        """The report as JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> CostReport:
        """The report that :meth:`to_json` wrote."""
        data: dict[str, Any] = json.loads(text)
        machine = data["machine"]
        for family in ("plain", "estimate", "other"):
            machine[family] = None if machine[family] is None else Rates(**machine[family])
        data["machine"] = Machine(**machine)
        data["image"] = tuple(data["image"])
        data["layers"] = tuple(LayerCost(**layer) for layer in data["layers"])
        data["measured"] = None if data["measured"] is None else MeasuredCost(**data["measured"])
        return cls(**data)


def _time(seconds: float) -> str:
    """A time in words, to three digits."""
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def _size(count: int) -> str:
    """A number of bytes in words."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
