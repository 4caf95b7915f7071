"""How much of each of timm's architectures can be reprogrammed: its layers, their products, and what stays plain."""

from __future__ import annotations

import json
import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

import timm
import torch
from torch import Tensor, nn

from timm_nrpm.config import NRPMConfig
from timm_nrpm.models.bypasses import Reading, opened, read_past
from timm_nrpm.models.selection import example_of
from timm_nrpm.models.support import UNCALLED, layers_of, times_of
from timm_nrpm.models.work import products

CENSUS = files("timm_nrpm") / "assets" / "architectures.json"
"""What `scripts/census.py` found out about every architecture of timm."""

OF_NO_LAYER = (
    "the model multiplies by them itself, as by tables of relative positions, and only layers are reprogrammed: in a "
    "model of your own write the product as nn.Linear"
)
READ_TOO = (
    "the model calls the layer and also multiplies by its weight itself: call the layer wherever its weight is needed"
)


@dataclass(frozen=True)
class Remainder:
    """Weights of one kind that no reprogrammed layer multiplies by.

    Attributes:
        kind: Type of the layer, such as `LSTM`, or `weights of no layer`.
        names: Names of these layers or weights.
        times: Number of operations of a forward that multiply by them past a layer.
        products: Number of products with them in a forward of one image.
        why: Why, and what one can do, in words.
    """

    kind: str
    names: tuple[str, ...]
    times: int
    products: int
    why: str

    def __str__(self) -> str:
        first, count = self.names[0], len(self.names)
        listed = first if count == 1 else f"{first} and {count - 1} more"
        read = f" (weights read {times_of(self.times)})" if self.times else ""
        return f"{self.kind} {listed}{read}: {self.why}"


@dataclass(frozen=True)
class Coverage:
    """How much of a model can be reprogrammed.

    Attributes:
        parameters: Number of the model's parameters.
        layers: Number of layers that can be reprogrammed.
        covered: Number of products of inputs and weights that they add up for one image.
        plain: Layers that stay plain though a forward uses them.
        unused: Names of layers that a forward does not use.
        loose: Weights that belong to no layer; None without any.
        fixed: Number of products with fixed filters, which are buffers and no weights.
    """

    parameters: int
    layers: int
    covered: int
    plain: tuple[Remainder, ...]
    unused: tuple[str, ...]
    loose: Remainder | None
    fixed: int

    @property
    def whole(self) -> bool:
        """Whether every layer with a linear map that a forward uses can be reprogrammed."""
        return not self.plain

    @property
    def share(self) -> float:
        """Share of the products of inputs and weights that reprogrammed layers add up, weights of no layer counted."""
        others = self.plain if self.loose is None else (*self.plain, self.loose)
        products = self.covered + sum(each.products for each in others)
        return self.covered / products if products else math.nan

    @property
    def why(self) -> str:
        """What stays plain and why; empty if the model is covered whole."""
        return "; ".join(map(str, self.plain))


@dataclass(frozen=True)
class Support:
    """Whether an architecture can be reprogrammed whole; true in a condition if it can.

    Attributes:
        architecture: timm's name of the architecture.
        whole: Whether every convolution and linear map that a forward uses can be reprogrammed.
        why: What stays plain and why, in words; empty if nothing does.

    Example:
        >>> print(Support("resnet18", True, ""))
        resnet18 is covered whole.
    """

    architecture: str
    whole: bool
    why: str

    def __bool__(self) -> bool:
        return self.whole

    def __str__(self) -> str:
        return f"{self.architecture} is covered {'whole' if self.whole else f'in part: {self.why}'}."


def coverage_of(plain: nn.Module, example: Tensor) -> Coverage:
    """How much of a model can be reprogrammed, with default settings.

    Args:
        plain: A model without reprogrammed layers, which is left as it was. It may be on the meta device, where a
            forward computes shapes alone.
        example: An input of the model, `[1, ...]`, on the device of the model.

    Raises:
        ValueError: The model does not run on `example`.

    Example:
        >>> found = coverage_of(plain, torch.zeros(1, 1, 8, 8))
        >>> found.whole, found.layers, found.share
        (True, 10, 1.0)
    """
    supported, skipped = layers_of(plain, NRPMConfig(), example)
    with opened(plain):
        counted, read = products(plain, example), read_past(plain, example)
    weights = {name for name, _ in plain.named_parameters()}
    reasons = {name: why for name, why in skipped.items() if why != UNCALLED}
    outside = {name: _owner(name, {*supported, *skipped}) for name in read if name in weights}
    reasons |= {owner: READ_TOO for owner in outside.values() if owner in supported}
    plain_layers = []
    for (kind, why), names in _grouped(plain, reasons).items():
        readings = [read[weight] for weight, owner in outside.items() if owner in names]
        inside = sum(counted.get(name, 0) for name in names if name in skipped)
        plain_layers.append(_remainder(kind, names, readings, why, inside))
    loose = [name for name, owner in outside.items() if owner is None]
    return Coverage(
        parameters=sum(parameter.numel() for parameter in plain.parameters()),
        layers=len(supported),
        covered=sum(counted.get(name, 0) for name in supported),
        plain=tuple(plain_layers),
        unused=tuple(name for name in skipped if name not in reasons),
        loose=_remainder("weights of no layer", loose, [read[name] for name in loose], OF_NO_LAYER) if loose else None,
        fixed=sum(reading.products for name, reading in read.items() if name not in weights),
    )


def _owner(weight: str, layers: Container[str]) -> str | None:
    """The layer that holds a weight, itself or in a module inside of it; None if no layer does."""
    name = weight.rpartition(".")[0]
    while name and name not in layers:
        name = name.rpartition(".")[0]
    return name if name in layers else None


def _grouped(model: nn.Module, reasons: Mapping[str, str]) -> dict[tuple[str, str], list[str]]:
    """Names of layers by their type and the reason why they stay plain."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name, why in reasons.items():
        groups.setdefault((type(model.get_submodule(name)).__qualname__, why), []).append(name)
    return groups


def _remainder(kind: str, names: Sequence[str], readings: Sequence[Reading], why: str, inside: int = 0) -> Remainder:
    """The remainder of these names, with `inside` products in calls of the layers and others in readings past them."""
    times, past = (sum(getattr(each, what) for each in readings) for what in ("times", "products"))
    return Remainder(kind, tuple(names), times, inside + past, why)


def measured(architecture: str) -> Coverage:
    """How much of one of timm's architectures can be reprogrammed, found by building and running it once.

    It is built on the meta device, which computes shapes alone and takes a fraction of a second; where that fails, on
    the CPU.

    Args:
        architecture: A name that timm knows, without a tag.

    Raises:
        ValueError: The architecture runs on neither device; the message says why.
    """
    failures = []
    for device in ("meta", "cpu"):
        try:
            with torch.device(device), torch.no_grad():
                model = timm.create_model(architecture).eval()
                example = example_of(model)
                if example is None:
                    raise ValueError(f"{architecture} has no parameters, or no config that says what images it takes")
                return coverage_of(model, example)
        except Exception as error:
            failures.append(f"on {device}: {type(error).__name__}: {error}")
    raise ValueError(f"{architecture} cannot be built and run ({'; '.join(failures)}).")


@cache
def census() -> dict[str, str]:
    """Why each of timm's architectures is covered in part, by name, and nothing for one that is covered whole."""
    content = json.loads(CENSUS.read_text())
    return {**dict.fromkeys(content["complete"], ""), **content["partial"]}
