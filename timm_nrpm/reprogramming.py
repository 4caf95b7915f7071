"""Turn the layers of a model into reprogrammed ones, and back: the only place that walks a model."""

from __future__ import annotations

import copy
import difflib
import fnmatch
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from timm.models._input import get_model_input_config
from torch import Tensor, nn

from timm_nrpm.base import Base, checksum_of, weights_sha256
from timm_nrpm.config import NRPMConfig
from timm_nrpm.layers import LINEAR_MAPS, REPROGRAMMED, Reprogrammed, reprogram_layer_, restore_layer_

Model = TypeVar("Model", bound=nn.Module)

FUSIONS = ("fuse", "reparameterize", "switch_to_deploy")
"""Methods by which timm merges layers into new plain ones."""


class ReprogrammingWarning(UserWarning):
    """Layers stay plain that one might think reprogrammed."""


@dataclass(frozen=True)
class Statistic:
    """A BatchNorm statistic before calibration, and what calibration made of it."""

    before: Tensor
    after: Tensor


@dataclass
class Record:
    """What is known of a reprogrammed model, kept as its attribute `nrpm`.

    Attributes:
        config: As given to :func:`reprogram_`.
        skipped: Name of each layer that holds a linear map and was left plain though nobody asked for it, and why.
        statistics: What calibration did to BatchNorm statistics, by module name and buffer; empty until calibrated.
        base: Where the plain model came from, and the hash of its weights when it was reprogrammed.
    """

    config: NRPMConfig
    skipped: dict[str, str]
    statistics: dict[str, dict[str, Statistic]] = field(default_factory=dict)
    base: Base | None = None


def reprogram_(model: Model, config: NRPMConfig | None = None, *, example: Tensor | None = None) -> Model:
    """Replace the chosen layers of `model` by their reprogrammed class, in place (NRPM, arXiv 2410.04577, section 4).

    Parameters stay the same objects under the same names; every layer gains one, `lam`. A model that was reprogrammed
    before is restored first, so it always follows one config. Layers whose type is not known exactly, and layers that
    the model does not call, are left alone: a :class:`ReprogrammingWarning` says so, and `model.nrpm.skipped` says why.

    Args:
        model: Any module; a single `nn.Conv2d` or `nn.Linear` works too.
        config: The settings; the default is `NRPMConfig()`.
        example: An input, `[B, C, H, W]` for an image model, with which the model is run once to see what it calls.
            For a timm model the default is one image of zeros of its input size; another model is run only with an
            example, and without one all its layers are taken to be called.

    Returns:
        `model`.

    Raises:
        ValueError: A pattern that matches no layer, a lambda missing or of the wrong count. The model is untouched.

    Example:
        >>> model = reprogram_(timm.create_model("resnet18"), NRPMConfig(lam=0.9, layers="layer1.*"))
        >>> lambdas(model)["layer1.0.conv1"]
        0.9
    """
    config = NRPMConfig() if config is None else config
    if not isinstance(config, NRPMConfig):
        raise ValueError(f"config={config!r} is no NRPMConfig: write reprogram_(model, NRPMConfig(lam=0.8)).")
    plain = plain_copy(model) if reprogrammed_layers(model) else model  # what to look at while anything may fail
    supported = {name: m for name, m in plain.named_modules() if type(m) in REPROGRAMMED}
    skipped = {
        name: f"its type {type(m).__qualname__} is not one whose arithmetic is known"
        for name, m in plain.named_modules()
        if isinstance(m, LINEAR_MAPS) and name not in supported
    }
    called = _call_order(plain, supported, example)
    if called is not None:
        reason = "the model never calls it in a forward (it may read the weight past the module)"
        skipped |= {name: reason for name in supported if name not in called}
        supported = {name: supported[name] for name in called}
    chosen = _select(supported, config, skipped)
    values = _assign(chosen, config)
    # Everything is checked: from here on nothing fails.
    base = getattr(model.__dict__.get("nrpm"), "base", None)
    if base is None and not any(p.is_meta for p in model.parameters()):
        base = Base.guess(plain)  # now, so that saving can tell whether the weights changed since
    restore_(model)
    for name in chosen:
        reprogram_layer_(model.get_submodule(name), config, values[name])
    _refuse_fusion(model)
    vars(model)["nrpm"] = Record(config, skipped, base=base)
    if skipped and config.layers is None:
        listed = [f"  {name}: {why}" for name, why in list(skipped.items())[:5]]
        more = f"\n  ... and {len(skipped) - 5} more, see model.nrpm.skipped" if len(skipped) > 5 else ""
        warnings.warn(
            f"Layers that stay plain, {len(skipped)}:\n" + "\n".join(listed) + more, ReprogrammingWarning, stacklevel=2
        )
    return model


def restore_(model: Model) -> Model:
    """Undo :func:`reprogram_` and any calibration, in place: the original model, bit for bit.

    Weights keep the values they have now. BatchNorm statistics that training moved on since calibration are moved back
    by what calibration did to them. A model that is not reprogrammed is returned as it is.

    Raises:
        ValueError: `model` is a part of a larger model that was reprogrammed as a whole.
    """
    for root in [m for m in model.modules() if isinstance(m.__dict__.get("nrpm"), Record)]:
        forget_calibration_(root, vars(root)["nrpm"])
        for module in list(root.modules()):
            if isinstance(module, Reprogrammed):
                restore_layer_(module)
            for method in FUSIONS:
                if module.__dict__.get(method) is _refused:
                    delattr(module, method)
        del vars(root)["nrpm"]
    if reprogrammed_layers(model):
        raise ValueError("This is a part of a reprogrammed model: call reprogram_ and restore_ on the whole model.")
    return model


def forget_calibration_(model: nn.Module, record: Record) -> None:
    """Undo `calibrate_`: the BatchNorm statistics from before, and no corrections."""
    for name, kept in record.statistics.items():
        module = model.get_submodule(name)
        for key, statistic in kept.items():
            buffer = getattr(module, key)
            moved = not torch.equal(buffer, statistic.after.to(buffer))
            buffer.copy_(_moved_back(key, kept, buffer) if moved else statistic.before)
    record.statistics = {}
    for layer in reprogrammed_layers(model).values():
        layer.drop_correction()


def _moved_back(key: str, kept: Mapping[str, Statistic], now: Tensor) -> Tensor:
    """What calibration did, undone on a statistic that training moved on since: the same affine map backwards."""
    mean, var = kept["running_mean"], kept["running_var"]
    square = torch.where(var.before > 0, var.after / var.before, 1.0).to(now)
    if key == "running_var":
        return now / square
    growth = square.sqrt()
    return (now - (mean.after.to(now) - growth * mean.before.to(now))) / growth


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """`model.eval()` inside, and every module's own training mode again afterwards."""
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def attackable(model: nn.Module) -> Iterator[None]:
    """`evaluating`, and no Parameter takes a gradient: an attack needs that of the pixels alone."""
    learning = [p for p in model.parameters() if p.requires_grad]
    with evaluating(model), torch.enable_grad():
        for parameter in learning:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in learning:
                parameter.requires_grad_(True)


def plain_copy(model: Model) -> Model:
    """The un-reprogrammed model as a second module that shares the Parameters of `model`.

    Its BatchNorm statistics are those from before calibration. Changing its weights changes those of `model`.
    """
    memo = {id(p): p for p in model.parameters()}
    return restore_(copy.deepcopy(model, memo))


def model_sha256(model: nn.Module) -> str:
    """Hash of all that decides what a model computes: weights, statistics, lambdas, and how each layer estimates.

    Of two models of one architecture that have the same, both have the same logits on the same machine.
    """
    state, estimates = dict(model.state_dict()), {}
    for name, layer in model.named_modules(remove_duplicate=False):
        if not isinstance(layer, Reprogrammed):
            continue
        state[f"{name}.lam".removeprefix(".")] = layer.lam.detach().clamp(0, 1)  # what counts
        estimates[name] = {key: value for key, value in layer.settings().items() if key != "lam"}
    return checksum_of({"state": weights_sha256(state), "estimates": estimates})


def record_of(model: nn.Module) -> Record:
    """`model.nrpm`; a ValueError for a model that is not reprogrammed."""
    record, *parts = [m.__dict__.get("nrpm") for m in model.modules() if m is model or "nrpm" in m.__dict__]
    if any(isinstance(part, Record) for part in parts):
        raise ValueError(
            "Parts of this model were reprogrammed on their own: call reprogram_ once, on the whole model."
        )
    if not isinstance(record, Record):
        raise ValueError(
            f"This {type(model).__name__} is not reprogrammed: call timm_nrpm.reprogram_(model, config) first."
        )
    return record


def reprogrammed_layers(model: nn.Module) -> dict[str, Reprogrammed]:
    """The reprogrammed layers of `model` by name; a layer with two names appears under the first."""
    return {name: m for name, m in model.named_modules() if isinstance(m, Reprogrammed)}


def lambdas(model: nn.Module) -> dict[str, float]:
    """Lambda of every reprogrammed layer, in [0, 1]; empty for a model that is not reprogrammed.

    Example:
        >>> lambdas(create_model("resnet18", lam=0.8))["layer1.0.conv1"]
        0.8
    """
    return {name: _decimal(layer.lam) for name, layer in reprogrammed_layers(model).items()}


def _decimal(lam: Tensor) -> float:
    # The shortest decimal that gives this float32, so that 0.8 reads 0.8 and not 0.800000011920929.
    return min(max(float(str(lam.detach().float().cpu().numpy())), 0.0), 1.0)


def _call_order(model: nn.Module, layers: Mapping[str, nn.Module], example: Tensor | None) -> list[str] | None:
    """Names of the layers that a forward calls, first call first; None if there is no input to run it on."""
    like = next(model.parameters(), None)
    given = example is not None
    if example is None:
        if like is None or not hasattr(model, "pretrained_cfg"):
            return None
        size = get_model_input_config(model)["input_size"]  # of this model, not of its pretrained weights
        example = torch.zeros(1, *size, device=like.device, dtype=like.dtype)
    order: dict[str, None] = {}

    def note(name: str) -> Callable[..., None]:
        return lambda *_: order.setdefault(name)

    hooks = [m.register_forward_pre_hook(note(name)) for name, m in layers.items()]
    try:
        with evaluating(model), torch.no_grad():
            model(example)
    except Exception as error:
        if given:
            raise ValueError(
                f"The model does not run on the example given, {list(example.shape)} of {example.dtype}: {error}"
            ) from error
        warnings.warn(
            f"The model does not run on an image of zeros, {list(example.shape)} ({error}): layers that it never calls "
            "cannot be told apart. Give an input it takes as example=.",
            ReprogrammingWarning,
            stacklevel=3,
        )
        return None
    finally:
        for hook in hooks:
            hook.remove()
    return list(order)


def _select(layers: dict[str, nn.Module], config: NRPMConfig, skipped: Mapping[str, str]) -> dict[str, nn.Module]:
    """The layers that `config.layers` asks for."""
    chosen = config.layers
    if chosen is None:
        names = set(layers)
    elif callable(chosen):
        names = {name for name, module in layers.items() if chosen(name, module)}
    elif isinstance(chosen, str) and chosen.startswith("first:"):
        count = re.fullmatch(r"first:([1-9]\d*)", chosen)
        if count is None:
            raise ValueError(f'layers={chosen!r} is not understood: write "first:4" for the first four layers.')
        names = set(list(layers)[: int(count[1])])
    else:
        names = set()
        for pattern in [chosen] if isinstance(chosen, str) else chosen:
            found = fnmatch.filter(layers, pattern)
            if not found:
                raise ValueError(_no_match(f"layers={pattern!r}", pattern, layers, skipped))
            names.update(found)
    if not names:
        raise ValueError(
            f"layers={chosen!r} selects none of the {len(layers)} layers that can be reprogrammed"
            + (f" ({', '.join(list(layers)[:3])}, ...)." if layers else f": {_reasons(skipped)}.")
        )
    return {name: module for name, module in layers.items() if name in names}


def _assign(layers: Mapping[str, nn.Module], config: NRPMConfig) -> dict[str, float]:
    """Lambda for each of `layers`."""
    lam = config.lam
    if isinstance(lam, float):
        return dict.fromkeys(layers, lam)
    if isinstance(lam, tuple):
        if len(lam) != len(layers):
            raise ValueError(f"lam has {len(lam)} numbers and {len(layers)} layers are chosen: {', '.join(layers)}.")
        return dict(zip(layers, lam, strict=True))
    assert isinstance(lam, Mapping)
    values: dict[str, float] = {}
    for pattern, value in sorted(lam.items(), key=lambda item: item[0] in layers):  # a layer's own name beats a glob
        found = [pattern] if pattern in layers else fnmatch.filter(layers, pattern)
        if not found:
            raise ValueError(_no_match(f"lam[{pattern!r}]", pattern, layers, {}))
        values |= dict.fromkeys(found, value)
    missing = [name for name in layers if name not in values]
    if missing:
        raise ValueError(f"lam names no value for {len(missing)} of the chosen layers: {', '.join(missing[:5])}.")
    return values


def _no_match(what: str, pattern: str, layers: Mapping[str, Any], skipped: Mapping[str, str]) -> str:
    refused = fnmatch.filter(skipped, pattern)
    if refused:
        return f"{what} matches only layers that cannot be reprogrammed: {_reasons({n: skipped[n] for n in refused})}."
    if any(name.startswith(f"{pattern}.") for name in layers):
        return f"{what} matches no layer itself: write {pattern + '.*'!r} for the layers inside."
    near = difflib.get_close_matches(pattern, layers, n=3, cutoff=0.3) or list(layers)[:3]
    return f"{what} matches none of the {len(layers)} layers that can be chosen. Near names: {', '.join(near)}."


def _reasons(skipped: Mapping[str, str]) -> str:
    return "; ".join(f"{name}: {why}" for name, why in list(skipped.items())[:3]) or "it has no linear map"


def _refused(*_: Any, **__: Any) -> Any:
    raise RuntimeError(
        "Fusing would silently drop reprogrammed layers and their lambdas. "
        "Call timm_nrpm.restore_(model) first, fuse, then reprogram_ the fused model."
    )


def _refuse_fusion(model: nn.Module) -> None:
    for module in model.modules():
        for method in FUSIONS:
            if callable(getattr(module, method, None)) and reprogrammed_layers(module):
                setattr(module, method, _refused)
