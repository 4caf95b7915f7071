"""Turning layers of a model into reprogrammed ones, and back: no other module changes the layers of a model."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from timm_nrpm.config import NRPMConfig
from timm_nrpm.errors import ReprogrammingWarning
from timm_nrpm.models.base import Base, checksum_of, weights_sha256
from timm_nrpm.models.bypasses import follow_, unfollow_
from timm_nrpm.models.plain_statistics import (
    KEPT,
    Fingerprint,
    bring_back_,
    complete,
    forget_,
    has_statistics,
    own_state,
    remember_,
    take_,
)
from timm_nrpm.models.provenance import Step
from timm_nrpm.models.replacements import unwatch_, watch_
from timm_nrpm.models.selection import assign, select
from timm_nrpm.models.support import layers_of
from timm_nrpm.nn.ensemble import Ensemble
from timm_nrpm.nn.layers import Reprogrammed, reprogram_layer_, restore_layer_
from timm_nrpm.nn.pixel_model import PixelModel
from timm_nrpm.nn.wrappers import copied, unwrapped

Model = TypeVar("Model", bound=nn.Module)


@dataclass
class Record:
    """How a model was reprogrammed, kept as its attribute `nrpm`.

    Attributes:
        config: Settings that were given to :func:`reprogram_`.
        skipped: Reason why a layer with a linear map cannot be reprogrammed and stays plain, by the name of the layer.
        weights: Fingerprint of the weights when the model was reprogrammed.
        settled: Fingerprint of the weights when the plain model's statistics were taken.
        base: Origin of the plain model, with the hash of its weights when it was reprogrammed.
        statistics: The steps that moved the statistics, as far as they are known.
    """

    config: NRPMConfig
    skipped: dict[str, str]
    weights: Fingerprint
    settled: Fingerprint
    base: Base | None = None
    statistics: tuple[Step, ...] = ()


def reprogram_(model: Model, config: NRPMConfig | None = None, *, example: Tensor | None = None) -> Model:
    """Replace the chosen layers of `model` by reprogrammed ones, in place (NRPM, arXiv 2410.04577, section 4).

    Parameters stay the same objects under the same names. Every chosen layer gains the Parameter `lam`, and every
    BatchNorm a copy of its statistics, kept as those of the plain model. A model that was reprogrammed before is
    restored first, so that it always follows one config. Layers whose exact type is not known, and layers that the
    model does not call, stay plain: a :class:`ReprogrammingWarning` says so, and `model.nrpm.skipped` says why.

    Args:
        model: Any module; a single `nn.Conv2d` or `nn.Linear` works too.
        config: The settings; the default is `NRPMConfig()`.
        example: Input of the model, `[B, C, H, W]` for an image model, on which it is run once to see which layers it
            calls. For a timm model the default is one image of zeros of its input size; another model is run only
            on an example, and without one all its layers count as called.

    Returns:
        `model`.

    Raises:
        ValueError: A pattern matches no layer, a lambda is missing, the number of lambdas is wrong, or the model is in
            DistributedDataParallel, which has counted its parameters already. The model is untouched.

    Example:
        >>> model = reprogram_(timm.create_model("resnet18"), NRPMConfig(lam=0.9, layers="layer1.*"))
        >>> lambdas(model)["layer1.0.conv1"]
        0.9
    """
    config = NRPMConfig() if config is None else config
    if not isinstance(config, NRPMConfig):
        raise ValueError(f"config={config!r} is no NRPMConfig: write reprogram_(model, NRPMConfig(lam=0.8)).")
    if isinstance(model, DistributedDataParallel):
        raise ValueError(
            "DistributedDataParallel has counted this model's parameters: reprogram it before wrapping it."
        )
    if isinstance(unwrapped(model), Ensemble):
        raise ValueError(f"This {type(model).__name__} is an ensemble: reprogram its members before they are joined.")
    wrapper, model = model, cast(Model, unwrapped(model))
    with torch.inference_mode(False):
        _reprogram_(model, config, example)
    return wrapper


def _reprogram_(model: nn.Module, config: NRPMConfig, example: Tensor | None) -> None:
    """Do what :func:`reprogram_` does, on a model without wrappers."""
    plain = plain_copy(model) if reprogrammed_layers(model) else model  # the model to inspect while anything may fail
    supported, skipped = layers_of(plain, config, example)
    chosen = select(supported, config, skipped)
    values = assign(chosen, config)
    # Everything has been checked: nothing fails from here on.
    before = vars(model).get("nrpm")
    base = before.base if isinstance(before, Record) else None
    if base is None and not any(p.is_meta for p in model.parameters()):
        base = Base.guess(plain)  # now, so that saving can tell whether the weights changed since
    _restore_(model)
    for name in chosen:
        reprogram_layer_(model.get_submodule(name), config, values[name])
    watch_(model, _as_settled)
    follow_(model)
    remember_(model)
    model.register_load_state_dict_post_hook(_settled_by_loading)
    weights = Fingerprint.of(model)
    known = (before.weights, before.settled) if isinstance(before, Record) else (weights, weights)
    vars(model)["nrpm"] = Record(config, skipped, *known, base)
    if skipped and config.layers is None:
        listed = [f"  {name}: {why}" for name, why in list(skipped.items())[:5]]
        more = f"\n  ... and {len(skipped) - 5} more, see model.nrpm.skipped" if len(skipped) > 5 else ""
        warnings.warn(
            f"Layers that stay plain, {len(skipped)}:\n" + "\n".join(listed) + more, ReprogrammingWarning, stacklevel=3
        )


def restore_(model: Model) -> Model:
    """Undo :func:`reprogram_` and any calibration, in place, which gives the original model bit for bit.

    BatchNorm statistics become those from when the model was reprogrammed, or from the end of `tune`, which takes them
    anew. Weights keep their current values. If anything but `tune` has trained them since, or the BatchNorms were
    replaced, as `timm.utils.freeze` does, the statistics stay those of the reprogrammed model, and a
    :class:`ReprogrammingWarning` says so. A model that is not reprogrammed is returned
    unchanged.

    Raises:
        ValueError: `model` is a part of a larger model that was reprogrammed as a whole.
    """
    inner = unwrapped(model)
    stale = is_reprogrammed(inner) and not is_settled(inner) and has_statistics(inner)
    _restore_(inner)
    if stale:
        warnings.warn(
            "The weights changed since the plain model's BatchNorm statistics were taken, or its BatchNorms were "
            "replaced, so these stay those of the reprogrammed model: re-estimate them, for example by "
            "torch.optim.swa_utils.update_bn.",
            ReprogrammingWarning,
            stacklevel=2,
        )
    return model


def _restore_(model: Model, kept: bool = False) -> Model:
    """Do what `restore_` does, without its warning; `kept` is the same as in :func:`plain_copy`."""
    for root in [m for m in model.modules() if isinstance(m.__dict__.get("nrpm"), Record)]:
        bring_back_(root, KEPT if kept or is_settled(root) else KEPT[2:])
        forget_(root)
        hooks = root._load_state_dict_post_hooks
        for number in [n for n, hook in hooks.items() if hook is _settled_by_loading]:
            del hooks[number]
        for module in list(root.modules()):
            if isinstance(module, Reprogrammed):
                restore_layer_(module)
            unfollow_(module)
            unwatch_(module)
        del vars(root)["nrpm"]
    if reprogrammed_layers(model):
        raise ValueError("This is a part of a reprogrammed model: call reprogram_ and restore_ on the whole model.")
    return model


def uncalibrate_(model: nn.Module) -> None:
    """Undo `calibrate_`: bring back the plain model's BatchNorm statistics, and remove all parts that it fitted."""
    bring_back_(model)
    for layer in reprogrammed_layers(model).values():
        layer.keep_parts(())
    record_of(model).statistics = ()


def plain_copy(model: Model, *, kept: bool = False) -> Model:
    """The un-reprogrammed model as a second module that shares the Parameters of `model`.

    Its BatchNorm statistics are the plain model's, or those that `model` computes with if the weights were trained
    since the former were taken. Changing its weights changes those of `model`.

    Args:
        model: A reprogrammed model, or any other.
        kept: Whether to use the plain model's statistics even if the weights were trained since, as within an epoch of
            `tune`, which takes these statistics anew after each epoch.

    Raises:
        ValueError: The `forward` of a module was replaced on the instance, which a copy would share.
    """
    inner = cast(Model, unwrapped(model))
    return _restore_(copied(inner, {id(p): p for p in inner.parameters()}), kept)


def is_settled(model: nn.Module) -> bool:
    """Whether the model holds the plain model's statistics, taken with the weights that it has now."""
    record: Record = vars(model)["nrpm"]
    return complete(model) and record.settled.fits(model)


def settle_(model: nn.Module, plain: nn.Module) -> None:
    """Store the statistics of `plain`, which has the weights of `model`, as the plain model's."""
    take_(model, plain)
    record_of(model).settled = Fingerprint.of(model)


def _settled_by_loading(model: nn.Module, keys: Any) -> None:
    """Mark the plain model's statistics as settled, since a whole state dict holds them with the weights they fit."""
    if not keys.missing_keys and is_reprogrammed(model):
        record_of(model).settled = Fingerprint.of(model)
        record_of(model).statistics = ()  # a state dict does not tell how its own came about


@contextmanager
def _as_settled(model: nn.Module) -> Iterator[None]:
    """Have the plain model's statistics stay settled while timm replaces layers, which moves no statistics."""
    settled = is_reprogrammed(model) and is_settled(model)
    yield
    if settled:
        record_of(model).settled = Fingerprint.of(model)


def is_as_reprogrammed(model: nn.Module) -> bool:
    """Whether `plain_copy` gives exactly the model that was reprogrammed.

    The weights must be unchanged, and not tuned before. The statistics that the reprogrammed model computes with may
    have changed.
    """
    record = record_of(model)
    tuned = record.base is not None and record.base.tuned
    return complete(model) and not tuned and record.weights.fits(model) and record.settled.fits(model)


def model_sha256(model: nn.Module) -> str:
    """SHA-256 of all that determines what a model computes: weights, statistics, lambdas, settings of the estimates.

    Two models of one architecture with the same hash have the same logits on the same machine.
    """
    state, estimates = own_state(model), {}
    for name, layer in model.named_modules(remove_duplicate=False):
        if not isinstance(layer, Reprogrammed):
            continue
        state[f"{name}.lam".removeprefix(".")] = layer.lam.detach().float().clamp(0, 1)  # as it is used
        estimates[name] = layer.config.estimator._asdict()
    return checksum_of({"state": weights_sha256(state), "estimates": estimates})


def record_of(model: nn.Module) -> Record:
    """The record of a reprogrammed model, its attribute `nrpm`.

    Raises:
        ValueError: The model is not reprogrammed, or parts of it were reprogrammed on their own.
    """
    model = unwrapped(model)
    if isinstance(model, Ensemble):
        raise ValueError(
            f"This {type(model).__name__} is an ensemble, which has no lambdas of its own: do this to its members, and "
            "join them afterwards."
        )
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


def identity_of(net: PixelModel) -> Mapping[str, object]:
    """What identifies a model on pixels besides its weights: types of modules, settings of estimates, normalisation."""
    kinds = {name: type(module).__qualname__ for name, module in net.model.named_modules()}
    layers = reprogrammed_layers(net.model)
    estimates = {name: {**layer.config.settings, "lam": None, "layers": None} for name, layer in layers.items()}
    return {"modules": checksum_of({"kinds": kinds, "estimates": estimates}), **net.normalisation()}


def is_reprogrammed(model: nn.Module) -> bool:
    """Whether `reprogram_` was called on this module itself, not on one inside or around it."""
    return isinstance(vars(model).get("nrpm"), Record)


def reprogrammed_layers(model: nn.Module) -> dict[str, Reprogrammed]:
    """The reprogrammed layers of `model` by name; a layer with two names is listed under the first."""
    return {name: m for name, m in model.named_modules() if isinstance(m, Reprogrammed)}


def lambdas(model: nn.Module) -> dict[str, float]:
    """Lambda of every reprogrammed layer by name, in [0, 1]; empty for a model that is not reprogrammed.

    Example:
        >>> lambdas(create_model("resnet18", lam=0.8))["layer1.0.conv1"]
        0.8
    """
    return {name: decimal_of(layer.lam) for name, layer in reprogrammed_layers(unwrapped(model)).items()}


def decimal_of(lam: Tensor) -> float:
    """The shortest decimal that gives this float32, so that 0.8 reads 0.8 and not 0.800000011920929."""
    return min(max(float(str(lam.detach().float().cpu().numpy())), 0.0), 1.0)
