"""Weights that a model reads past their layer: a switch with which it calls the layer, and how others are found.

The attentions of BEiT, EVA and Swin V2 join three biases and give them to the linear map with the weight of their layer
`qkv`. With timm's own switch they call the layer and add the biases to what it gives. That rounds differently, so the
switch is on only while the layer is not plain.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from timm_nrpm.models.work import factors_of, products_of, run_seen
from timm_nrpm.nn.layers import Reprogrammed

SWITCH, LAYER = "qkv_bias_separate", "qkv"
INPUT, CONSTANT = "the input", "a constant"
"""Where numbers come from that are no parameter and no buffer; no parameter has such a name."""


@contextmanager
def opened(model: nn.Module) -> Iterator[None]:
    """Have the model call these layers within the context."""
    closed = [module for module in model.modules() if getattr(module, SWITCH, None) is False]
    for module in closed:
        setattr(module, SWITCH, True)
    try:
        yield
    finally:
        for module in closed:
            setattr(module, SWITCH, False)


def follow_(model: nn.Module) -> None:
    """Have the switches of all reprogrammed layers follow whether these are plain."""
    for module in model.modules():
        switched = getattr(module, SWITCH, None) is False and isinstance(getattr(module, LAYER, None), Reprogrammed)
        if switched:
            module.register_forward_pre_hook(_follow)


def unfollow_(module: nn.Module) -> None:
    """Undo :func:`follow_` for one module."""
    hooks = module._forward_pre_hooks
    for number in [number for number, hook in hooks.items() if hook is _follow]:
        del hooks[number]
        setattr(module, SWITCH, False)


def _follow(module: nn.Module, _: Any) -> None:
    setattr(module, SWITCH, not getattr(module, LAYER).is_plain())


@dataclass(frozen=True)
class Reading:
    """What a forward computes with one parameter or buffer outside of the layers that are counted.

    Attributes:
        times: Number of operations that multiply numbers from the input by it.
        products: Number of products that they add up.
    """

    times: int
    products: int


def read_past(model: nn.Module, example: Tensor) -> dict[str, Reading]:
    """The parameters and buffers by which a forward multiplies numbers from its input outside of the counted layers.

    They are followed through operations, such as a change of shape, until one adds up their products: a matrix product
    or a convolution. Sums that a model writes as an elementwise product and a sum are not found.

    Args:
        model: The network, which runs once and is not changed.
        example: A batch of its inputs, `[B, ...]`, on the meta device if the model is there.

    Returns:
        What is read, by the name of the parameter or buffer, in the order of the first readings.

    Example:
        >>> read_past(plain, torch.zeros(1, 1, 8, 8))
        {}
    """
    reader = _Reader()
    for name, tensor in (*model.named_buffers(), *model.named_parameters()):
        reader.note(tensor, name)
    reader.weights = {name for name, _ in model.named_parameters()}
    reader.note(example, INPUT)
    run_seen(model, example, reader, reader.enter, lambda name: reader.leave)
    return reader.found


@dataclass
class _Reader(TorchDispatchMode):
    """Follows where the numbers of every tensor come from."""

    found: dict[str, Reading] = field(default_factory=dict)
    weights: set[str] = field(default_factory=set)
    depth: int = 0  # number of counted layers that are running

    def __post_init__(self) -> None:
        super().__init__()
        self.sources: dict[int, str] = {}  # by the memory of a tensor, which its views share

    def enter(self, *_: Any) -> None:
        self.depth += 1

    def leave(self, *_: Any) -> None:
        self.depth -= 1

    def note(self, tensor: Tensor, source: str) -> None:
        """Note the source of a tensor, unless its memory holds numbers from the input or a parameter already."""
        if tensor.layout != torch.strided:
            return  # a sparse tensor has no memory of one piece
        storage = tensor.untyped_storage()
        number = storage._cdata
        if number not in self.sources:
            weakref.finalize(storage, self.sources.pop, number, None)
        elif self._rank(self.sources[number]) <= self._rank(source):
            return
        self.sources[number] = source

    def _rank(self, source: str) -> int:
        """The place of a source among several of one operation, of which the first is that of its result."""
        return 0 if source == INPUT else 1 if source in self.weights else 3 if source == CONSTANT else 2

    def _source(self, tensor: Tensor) -> str:
        if tensor.layout != torch.strided:
            return CONSTANT
        return self.sources.get(tensor.untyped_storage()._cdata, CONSTANT)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        source = min((self._source(tensor) for tensor in given), key=self._rank, default=CONSTANT)
        name = func.overloadpacket.__name__.strip("_")
        factors = [self._source(tensor) for tensor in factors_of(name, given)]
        result = func(*args, **(kwargs or {}))
        out = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if not self.depth and INPUT in factors:
            for each in set(factors) - {INPUT, CONSTANT}:
                before = self.found.get(each, Reading(0, 0))
                products = before.products + products_of(name, given, out[0])
                self.found[each] = Reading(before.times + 1, products)
        if factors and source != INPUT:
            source = CONSTANT  # what a learned query gives is no weight
        for tensor in out:
            self.note(tensor, source)
        return result
