"""What a forward computes: the products of every layer, everything else, and what it holds in memory at most."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from timm.layers import CondConv2d
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from timm_nrpm.models.modes import evaluating
from timm_nrpm.nn.functional import FEW

COUNTED = (nn.Linear, nn.modules.conv._ConvNd, CondConv2d)
"""The layers that are counted."""

DEPTHWISE = ("depthwise", "narrow depthwise", "channels-last depthwise")
"""Layers with fewer than FEW_OUTPUTS outputs for each input: those whose rows fill vectors, those whose rows leave much
of a vector empty, and those whose neighbouring pixels are not adjacent in memory."""

LAYER_KINDS = ("convolution", "grouped", "pointwise", *DEPTHWISE, "linear", "few positions")
"""Kinds of layers whose products take different times: kernels of several pixels, of several in groups, and of one;
depthwise layers; linear maps; and any layer with fewer positions or rows than fill a vector."""

CURVED = ("gelu", "silu", "sigmoid", "tanh", "softmax", "exp", "erf", "elu", "mish", "softplus")
"""Operations that compute an exponential or the like of every number, by names without underscores at the ends."""

FEW_OUTPUTS = 4  # of a group: with more, the kernels read an input once for four of them
VECTOR = 16  # positions that the widest processors compute at once


@dataclass(frozen=True)
class LayerWork:
    """What one layer computes in a forward of a batch.

    Attributes:
        name: Name of the layer.
        kind: One of LAYER_KINDS.
        products: Number of products of a weight and an input that it adds up.
        outputs: Number of its outputs.
        weights: Number of its weights.
    """

    name: str
    kind: str
    products: int
    outputs: int
    weights: int


@dataclass
class Work:
    """What a forward of a batch computes.

    Attributes:
        layers: The convolutional and linear layers, in the order of their first calls.
        calls: Number of other operations, views excepted.
        moved: Number of numbers that they read and write, those that add up products excepted.
        curved: Number of numbers of which they compute an exponential or the like.
        pooled: Number of numbers in all windows of which they take the largest.
        products: Number of products that they add up, such as those of attention.
        peak: Most bytes that the forward holds at a time, its input included and the model's weights excepted.
    """

    layers: tuple[LayerWork, ...] = ()
    calls: int = 0
    moved: int = 0
    curved: int = 0
    pooled: int = 0
    products: int = 0
    peak: int = 0


def work_of(model: nn.Module, example: Tensor) -> Work:
    """What a forward of `model` computes, in evaluation mode.

    Args:
        model: The network, which runs once and is not changed.
        example: A batch of its inputs, `[B, ...]`.

    Example:
        >>> work = work_of(plain, torch.zeros(1, 1, 8, 8))
        >>> work.layers[-1].name, work.layers[-1].products
        ('fc', 320)
    """
    recorder = _Recorder()
    for own in (*model.parameters(), *model.buffers()):
        recorder.known.add(own.untyped_storage()._cdata)
    recorder.hold(example)
    run_seen(model, example, recorder, recorder.enter, recorder.leaving)
    work = recorder.work
    work.layers = tuple(recorder.layers.values())
    return work


def products(model: nn.Module, example: Tensor) -> dict[str, int]:
    """Number of products of a weight and an input that each convolutional or linear layer adds up for one image.

    Args:
        model: The network, which runs once.
        example: An input of the network `[1, ...]`.

    Example:
        >>> products(plain, torch.zeros(1, 1, 8, 8))["fc"]
        320
    """
    return {layer.name: layer.products for layer in work_of(model, example).layers}


def run_seen(
    model: nn.Module,
    example: Tensor,
    mode: TorchDispatchMode,
    enter: Callable[..., None],
    leaving: Callable[[str], Callable[..., None]],
) -> None:
    """Run a model once, in evaluation mode, while a mode sees its operations.

    Args:
        model: The network, which is not changed.
        example: A batch of its inputs, `[B, ...]`.
        mode: What sees the operations.
        enter: Hook before each of the counted layers, of the module, its arguments and its keyword arguments.
        leaving: Function from the name of such a layer to the hook after it, which is given the output, too.
    """
    handles: list[Any] = []
    for name, module in model.named_modules():
        if isinstance(module, COUNTED):
            handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
            handles.append(module.register_forward_hook(leaving(name), with_kwargs=True))
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # one operation for all of torch's own attention hides its parts
    try:
        with evaluating(model), torch.no_grad(), mode:
            model(example)
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        for handle in handles:
            handle.remove()


def first_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The first argument of a call."""
    first: Tensor = args[0] if args else next(iter(kwargs.values()))
    return first


def kernel_of(module: nn.Module) -> torch.Size:
    """The shape of the weights of one output of a counted layer, channels first."""
    if isinstance(module, CondConv2d):  # its `weight` holds the weights of all experts, flat
        return torch.Size(module.weight_shape[1:])
    weight: Tensor = module.weight  # type: ignore[assignment]
    return weight.shape[1:]


def _kind(module: nn.Module, x: Tensor, out: Tensor) -> str:
    """One of LAYER_KINDS, for a layer that takes `x` and gives `out`."""
    convolves = isinstance(module, (nn.modules.conv._ConvNd, CondConv2d))
    channels = out.shape[1] if convolves else out.shape[-1]
    if out.numel() < FEW * channels:
        return "few positions"
    if not isinstance(module, (nn.modules.conv._ConvNd, CondConv2d)):
        return "linear"
    if channels < FEW_OUTPUTS * module.groups:
        width = out.shape[-1]
        if x.stride(-1) != 1:
            return "channels-last depthwise"
        return "narrow depthwise" if 2 * -(-width // VECTOR) * VECTOR > 3 * width else "depthwise"
    if module.groups > 1:
        return "grouped"
    return "pointwise" if kernel_of(module)[1:].numel() == 1 else "convolution"


@dataclass
class _Recorder(TorchDispatchMode):
    """Notes every operation that is dispatched, and the layers that call it."""

    work: Work = field(default_factory=Work)
    layers: dict[str, LayerWork] = field(default_factory=dict)
    depth: int = 0  # number of counted layers that are running
    held: int = 0  # bytes

    def __post_init__(self) -> None:
        super().__init__()
        self.known: set[int] = set()

    def enter(self, *_: Any) -> None:
        self.depth += 1

    def leaving(self, name: str) -> Callable[..., None]:
        def leave(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
            self.depth -= 1
            x, weight = first_input(args, kwargs), module.weight
            assert isinstance(weight, Tensor)
            # A transposed convolution adds each input to many outputs.
            ends = x if isinstance(module, nn.modules.conv._ConvTransposeNd) else out
            before = self.layers.get(name, LayerWork(name, _kind(module, x, out), 0, 0, weight.numel()))
            products = before.products + ends.numel() * kernel_of(module).numel()
            self.layers[name] = replace(before, products=products, outputs=before.outputs + out.numel())

        return leave

    def hold(self, tensor: Tensor) -> None:
        """Count the memory of a tensor as long as it lives."""
        storage = tensor.untyped_storage()
        number, size = storage._cdata, storage.nbytes()
        if number in self.known:
            return
        self.known.add(number)
        self.held += size
        self.work.peak = max(self.work.peak, self.held)

        def free() -> None:
            self.known.discard(number)
            self.held -= size

        weakref.finalize(storage, free)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        result = func(*args, **(kwargs or {}))
        out = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        for tensor in out:
            self.hold(tensor)
        if not self.depth and given and out and not _is_view(func, given, out):
            name = func.overloadpacket.__name__.strip("_")
            products = products_of(name, given, out[0])
            self.work.calls += 1
            self.work.products += products
            self.work.curved += out[0].numel() * (name in CURVED)
            self.work.pooled += out[0].numel() * math.prod(args[1]) if name.startswith("max_pool2d") else 0
            self.work.moved += 0 if products else sum(tensor.numel() for tensor in (*given, *out))
        return result


def _is_view(func: Any, given: Iterable[Tensor], out: Iterable[Tensor]) -> bool:
    """Whether an operation only looks at memory in another way."""
    pointers = {tensor.untyped_storage().data_ptr() for tensor in given}
    return not func._schema.is_mutable and all(tensor.untyped_storage().data_ptr() in pointers for tensor in out)


def factors_of(name: str, given: list[Tensor]) -> list[Tensor]:
    """The tensors of whose numbers an operation adds up products; none for an operation that does not.

    Args:
        name: Name of the operation, without underscores at its ends.
        given: Tensors that it takes.
    """
    if name in ("mm", "bmm", "mv", "dot", "convolution"):
        return given[:2]
    if name in ("addmm", "baddbmm", "addmv"):
        return given[1:3]
    return given[:3] if "scaled_dot_product" in name else []


def products_of(name: str, given: list[Tensor], out: Tensor) -> int:
    """Number of products that an operation adds up for its result `out`; see :func:`factors_of`."""
    factors = factors_of(name, given)
    if not factors:
        return 0
    if "scaled_dot_product" in name:
        query, key, value = factors
        return query.shape[:-1].numel() * key.shape[-2] * (query.shape[-1] + value.shape[-1])
    return out.numel() * (factors[1][0].numel() if name == "convolution" else factors[0].shape[-1])
