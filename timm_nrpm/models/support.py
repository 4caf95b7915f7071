"""The rules by which a layer can be reprogrammed or stays plain, with a sentence on why and on what to do."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils.parametrize import is_parametrized

from timm_nrpm.config import NRPMConfig
from timm_nrpm.models.bypasses import opened, read_past
from timm_nrpm.models.selection import call_order, example_of
from timm_nrpm.nn.layers import LINEAR_MAPS, REPROGRAMMED

RECURRENT = (
    "its gates are sums inside a recurrence and stay as they are; the other layers can be reprogrammed, and a model "
    "without a recurrence, such as mixer_b16_224, can be as a whole"
)
ADVICE: tuple[tuple[type[nn.Module], str], ...] = (
    (nn.RNNBase, RECURRENT),
    (nn.RNNCellBase, RECURRENT),
    (nn.MultiheadAttention, "it reads its weights itself; a timm attention with qkv and proj can be reprogrammed"),
    (NonDynamicallyQuantizableLinear, "it belongs to an nn.MultiheadAttention, which reads its weight itself"),
)
"""What a message adds on layers of some types that stay plain."""

UNPARAMETRIZED = (
    'a parametrization computes its weight; torch.nn.utils.parametrize.remove_parametrizations(layer, "weight") keeps '
    "the weight that it gives, and then the layer can be reprogrammed"
)
UNCALLED = "the model never calls it in a forward pass"


def layers_of(
    plain: nn.Module, config: NRPMConfig, example: Tensor | None = None
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The layers of a model that can be reprogrammed, and those with a linear map that stay plain.

    Args:
        plain: A model without reprogrammed layers.
        config: The settings, some of which not every layer allows.
        example: Input of the model, on which it is run to see which layers it calls; by default an image of zeros for
            a timm model. Without an input, all layers count as called.

    Returns:
        The former by name, in the order of their first calls, and why each of the latter stays plain, by name.

    Raises:
        ValueError: The model does not run on `example`.
    """
    supported = {name: m for name, m in plain.named_modules() if type(m) in REPROGRAMMED}
    skipped = {
        name: _unknown(module)
        for name, module in plain.named_modules()
        if isinstance(module, LINEAR_MAPS) and name not in supported
    }
    obstacles = {name: REPROGRAMMED[type(m)].obstacle(m, config) for name, m in supported.items()}
    skipped |= {name: why for name, why in obstacles.items() if why}
    supported = {name: m for name, m in supported.items() if name not in skipped}
    with opened(plain):
        called = call_order(plain, supported, example)
        if called is None:
            return supported, skipped
        uncalled = [name for name in supported if name not in called]
        example = example_of(plain) if example is None else example
        read = read_past(plain, example) if uncalled and example is not None else {}
    for name in uncalled:
        reading = read.get(f"{name}.weight")
        past = f", and reads its weight past it {times_of(reading.times)}" if reading else ""
        skipped[name] = UNCALLED + past
    return {name: supported[name] for name in called}, skipped


def _unknown(module: nn.Module) -> str:
    """Why a layer of a type without a reprogrammed class stays plain."""
    reason = f"its type {type(module).__qualname__} is not one whose arithmetic is known"
    advice = next((advice for kind, advice in ADVICE if isinstance(module, kind)), "")
    if is_parametrized(module):
        advice = UNPARAMETRIZED
    return f"{reason}: {advice}" if advice else reason


def times_of(count: int) -> str:
    """How often something happens, in words."""
    return "once" if count == 1 else f"{count} times"
