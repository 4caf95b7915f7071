"""Selection of what trains: which parameters take gradients, and which modules are in training mode."""

from __future__ import annotations

import difflib
import fnmatch
import random
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from timm_nrpm.config import TuneConfig
from timm_nrpm.models.modes import check_gradients
from timm_nrpm.models.reprogramming import reprogrammed_layers
from timm_nrpm.nn.layers import Reprogrammed


def select_(model: nn.Module, config: TuneConfig) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Set `requires_grad` of the parameters that train, and clear it of all others.

    Args:
        model: A reprogrammed model.
        config: Settings of the run. Its `trainable` names the parameters that train; the default is those of its
            paradigm that the user did not freeze.

    Returns:
        The lambdas that train, and the other parameters that do.

    Raises:
        ValueError: The model is not reprogrammed, its layers are all plain, or its weights were made under
            `torch.inference_mode`; a glob matches nothing; or nothing is left to train. The model is untouched.
    """
    layers = reprogrammed_layers(model)
    if not layers:
        raise ValueError("This model is not reprogrammed: call timm_nrpm.reprogram_(model, config) first.")
    check_gradients(model)
    settings = next(iter(layers.values())).config
    if settings.iterations == 0 or settings.penalty == "l2":
        raise ValueError(
            f"Reprogrammed with iterations={settings.iterations} and penalty={settings.penalty!r}, every layer is the "
            "plain one whatever lambda is: give iterations >= 1 and another penalty."
        )
    lam_ids = {id(layer.lam) for layer in layers.values()}
    named = dict(model.named_parameters())
    if config.trainable is None:
        chosen = _by_paradigm(named, layers, config.paradigm)
    else:
        chosen = _by_name(named, config.trainable)
    for name, parameter in named.items():
        parameter.requires_grad_(name in chosen)
    lams = [p for name, p in named.items() if name in chosen and id(p) in lam_ids]
    return lams, [p for name, p in named.items() if name in chosen and id(p) not in lam_ids]


def _by_paradigm(named: Mapping[str, nn.Parameter], layers: Mapping[str, Reprogrammed], paradigm: str) -> set[str]:
    """Names of all lambdas, and under paradigm "all" of all weights, except those that the user froze.

    A lambda that is frozen because of `learnable=False` does not count as frozen by the user.
    """
    learnable = {id(layer.lam): layer.config.learnable for layer in layers.values()}
    lams = {name for name, p in named.items() if id(p) in learnable and (p.requires_grad or not learnable[id(p)])}
    weights = {name for name, p in named.items() if id(p) not in learnable and p.requires_grad}
    if paradigm == "lambda" and not lams:
        raise ValueError(
            "Nothing would train: every lambda is frozen though the model was reprogrammed with learnable=True. "
            'Call requires_grad_(True) on those that should train, or name them by trainable="*.lam".'
        )
    if paradigm == "all" and not weights:
        raise ValueError(
            "paradigm='all' trains the weights, and every weight of this model is frozen (requires_grad is False): "
            "call requires_grad_(True) on those that should train, name them by trainable=, or give paradigm='lambda', "
            "which trains lambda alone."
        )
    return lams | weights if paradigm == "all" else lams


def _by_name(named: Mapping[str, nn.Parameter], patterns: Iterable[str]) -> set[str]:
    """Names of the parameters that match a glob, frozen or not."""
    chosen = set[str]()
    for pattern in patterns:
        matches = fnmatch.filter(named, pattern)
        if not matches:
            near = difflib.get_close_matches(pattern, named, n=3, cutoff=0.3) or list(named)[:3]
            raise ValueError(f"trainable={pattern!r} matches no parameter. Near names: {', '.join(near)}.")
        chosen.update(matches)
    return chosen


def set_modes_(model: nn.Module, training: bool = True, still: Iterable[str] = ()) -> None:
    """Set modules with a weight that trains to training mode, and other modules with weights to evaluation mode.

    Modules without weights follow their parent. Lambda does not count as a weight: under paradigm 2 BatchNorm and
    dropout stay in evaluation mode.

    Args:
        model: The model.
        training: Mode of a model without weights.
        still: Globs of names of modules that are in evaluation mode in any case.

    Raises:
        ValueError: A glob matches no module.
    """
    _follow_(model, training)
    modules = dict(model.named_modules())
    for pattern in still:
        matches = fnmatch.filter(modules, pattern)
        if not matches:
            near = difflib.get_close_matches(pattern, modules, n=3, cutoff=0.3) or list(modules)[1:4]
            raise ValueError(f"still={pattern!r} matches no module. Near names: {', '.join(near)}.")
        for name in matches:
            modules[name].training = False


def _follow_(model: nn.Module, training: bool) -> None:
    """Set the modes as what trains has them."""
    weights = [p for name, p in model.named_parameters() if name.rpartition(".")[2] != "lam"]
    model.training = any(p.requires_grad for p in weights) if weights else training
    for child in model.children():
        _follow_(child, model.training)


@contextmanager
def given_back(model: nn.Module) -> Iterator[None]:
    """Restore `requires_grad`, training modes and random generators at the end, and clear the gradients."""
    learning = {p: p.requires_grad for p in model.parameters()}
    modes = {m: m.training for m in model.modules()}
    states = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
            for parameter, flag in learning.items():
                if parameter.requires_grad != flag:  # some weights refuse even the flag that they have
                    parameter.requires_grad_(flag)
                parameter.grad = None
            for module, mode in modes.items():
                module.training = mode
