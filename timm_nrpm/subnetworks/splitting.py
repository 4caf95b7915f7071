"""Splits of a network into an early part and a late part, by its layers in the order in which a forward calls them."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from timm_nrpm.checks import check_integer
from timm_nrpm.models.modes import evaluating
from timm_nrpm.models.selection import example_of
from timm_nrpm.models.work import COUNTED

SHORTCUTS = ("downsample", "shortcut")
"""Names of the modules that bring a residual block's input past its layers. In the paper's count a ResNet-18 has 18
layers, so a layer inside such a module is not counted; it belongs to the part in which it is called."""


@dataclass(frozen=True)
class Split:
    """A network in two parts.

    Attributes:
        early: Names of the counted layers of the early part (the paper's f_a), in the order of a forward.
        late: Those of the late part (f_b).
        late_state: Names of all parameters and buffers of the late part, as a state dict has them: of its layers, and
            of the modules, such as BatchNorm, that a forward calls after the first of them.
        early_modules: Names of the modules that a forward calls before it, among them those that the late part lies in.
    """

    early: tuple[str, ...]
    late: tuple[str, ...]
    late_state: tuple[str, ...]
    early_modules: tuple[str, ...]

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of all counted layers, in the order of a forward."""
        return self.early + self.late

    def trainable(self, model: nn.Module) -> tuple[str, ...]:
        """Names of the late part's parameters, lambdas excepted, as `TuneConfig(trainable=)` takes them."""
        late = set(self.late_state)
        return tuple(name for name, _ in model.named_parameters() if name in late)

    def composed(self, early: Mapping[str, Tensor], late: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The state of a network whose early part is from one state dict, and whose late part is from another."""
        return {**early, **{name: late[name] for name in self.late_state}}


def split(model: nn.Module, late: int, *, example: Tensor | None = None) -> Split:
    """Split a network in two, counting convolutional and linear layers from the output.

    Args:
        model: A network whose forward calls its layers in one order, plain or reprogrammed. It runs once and is not
            changed.
        late: Number of layers of the late part, from 1 to one less than all.
        example: Input of the model `[B, ...]`; by default an image of zeros for a timm model.

    Raises:
        ValueError: One part would be empty, the model does not run on the example, or it calls layers in no one order.

    Example:
        >>> model = timm_nrpm.create_model("resnet8_digits", pretrained=True)
        >>> split(model, 2).late
        ('layer3.0.conv2', 'fc')
    """
    calls = _calls(model, example)
    counted = _counted(model, calls)
    layers = [name for name in calls if name in counted]
    why = f": the model has {len(layers)} convolutional and linear layers, and either part needs one"
    if len(layers) < 2:
        raise ValueError(f"The model has {len(layers)} convolutional or linear layers: two parts take two.")
    late = check_integer("late", late, least=1, most=len(layers) - 1, why=why)
    until = len(layers) - late
    first = calls.index(layers[until])
    called = {name: number >= first for number, name in enumerate(calls)}
    state = [
        name for name in model.state_dict()
        if name.rpartition(".")[2] != "lam" and called[_nearest(name.rpartition(".")[0], called)]
    ]  # fmt: skip
    return Split(tuple(layers[:until]), tuple(layers[until:]), tuple(state), tuple(calls[:first]))


def layer_parameters(model: nn.Module, *, example: Tensor | None = None) -> dict[str, tuple[str, ...]]:
    """The parameters that go with each layer, lambdas excepted: its own, and those of what a forward calls between it
    and the next counted layer, such as BatchNorm and shortcuts; of the first layer, also of what is called before it.

    Args:
        model: A network whose forward calls its layers in one order, plain or reprogrammed. It runs once and is not
            changed.
        example: Input of the model `[B, ...]`; by default an image of zeros for a timm model.

    Returns:
        Names of parameters, as `TuneConfig(trainable=)` takes them, by the name of the layer, in the order of a
        forward.

    Raises:
        ValueError: The model does not run on the example, or it calls layers in no one order.

    Example:
        >>> layer_parameters(timm_nrpm.create_model("resnet8_digits", pretrained=True))["conv1"]
        ('conv1.weight', 'bn1.weight', 'bn1.bias')
    """
    calls = _calls(model, example)
    counted = _counted(model, calls)
    owners, layer = dict[str, str](), next(name for name in calls if name in counted)
    found: dict[str, list[str]] = {name: [] for name in calls if name in counted}
    for name in calls:
        layer = name if name in counted else layer
        owners[name] = layer
    for name, _ in model.named_parameters():
        module, _, kind = name.rpartition(".")
        if kind != "lam":
            found[owners[_nearest(module, owners)]].append(name)
    return {name: tuple(names) for name, names in found.items()}


def _nearest(name: str, called: Container[str]) -> str:
    """The module itself, or the nearest one around it that is called, where its weights are read without a call."""
    while name not in called:
        name = name.rpartition(".")[0]
    return name


def _counted(model: nn.Module, calls: Iterable[str]) -> set[str]:
    """Names of the layers that count: all that a forward calls but those on shortcuts."""
    modules = dict(model.named_modules())
    layers = [name for name in calls if isinstance(modules[name], COUNTED)]
    return {name for number, name in enumerate(layers) if not _is_shortcut(name, layers[:number], layers)}


def _is_shortcut(name: str, before: Iterable[str], layers: Iterable[str]) -> bool:
    """Whether a layer stands in a shortcut: in a module of that name beside layers of the same block, which stand in
    the block itself or are called before. A stage that begins with a downsampling has blocks beside it."""
    path = name.split(".")
    for place in (number for number, part in enumerate(path) if part in SHORTCUTS):
        block, inside = path[:place], path[: place + 1]
        beside = [each.split(".") for each in layers]
        beside = [each for each in beside if each[:place] == block and each[: place + 1] != inside]
        if any(len(each) == place + 1 or ".".join(each) in before for each in beside):
            return True
    return False


def _calls(model: nn.Module, example: Tensor | None) -> list[str]:
    """Names of all modules that a forward calls, in the order of their first calls.

    Raises:
        ValueError: There is no input that the model runs on, or a layer is called again after another one.
    """
    order: dict[str, None] = {}
    last: list[str] = []

    def note(name: str, counted: bool) -> Callable[..., None]:
        def hook(*_: object) -> None:
            if counted:
                if name in order and last[0] != name:
                    raise ValueError(
                        f"The model calls {name} again after {last[0]}: its layers have no one order, so it cannot be "
                        "split into an early and a late part."
                    )
                last[:] = [name]
            order.setdefault(name)

        return hook

    example = example_of(model) if example is None else example
    if example is None:
        raise ValueError("The model is not timm's, and its layers are found by a forward: give an input as example=.")
    hooks = {name: note(name, isinstance(module, COUNTED)) for name, module in model.named_modules()}
    with _hooked(model, hooks), evaluating(model), torch.no_grad():
        model(example)
    return list(order)


@contextmanager
def _hooked(model: nn.Module, hooks: Mapping[str, Callable[..., None]]) -> Iterator[None]:
    """Call a function before every call of a module."""
    modules = dict(model.named_modules())
    handles = [modules[name].register_forward_pre_hook(hook) for name, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
