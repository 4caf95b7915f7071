"""What trains and what does not: which parameters take gradients, which modules are in training mode."""

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
    """Let what is to train take gradients and nothing else.

    Args:
        model: A reprogrammed model.
        config: Its `trainable` names what trains; without it the paradigm does, except for what is frozen already.

    Returns:
        The lambdas that train, and the other parameters that do.

    Raises:
        ValueError: A model that is not reprogrammed, whose layers are all plain, or whose weights were made under
            `torch.inference_mode`; a glob that matches nothing; or nothing left to train. The model is untouched.
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
    ours = {id(layer.lam) for layer in layers.values()}
    named = dict(model.named_parameters())
    if config.trainable is None:
        chosen = _by_paradigm(named, layers, config.paradigm)
    else:
        chosen = _by_name(named, config.trainable)
    for name, parameter in named.items():
        parameter.requires_grad_(name in chosen)
    lams = [p for name, p in named.items() if name in chosen and id(p) in ours]
    return lams, [p for name, p in named.items() if name in chosen and id(p) not in ours]


def _by_paradigm(named: Mapping[str, nn.Parameter], layers: Mapping[str, Reprogrammed], paradigm: str) -> set[str]:
    """Names of all lambdas, and under paradigm "all" of all weights, without what the user froze.

    A lambda that is frozen since `learnable=False` made it so is not one that the user froze.
    """
    given = {id(layer.lam): layer.config.learnable for layer in layers.values()}
    lams = {name for name, p in named.items() if id(p) in given and (p.requires_grad or not given[id(p)])}
    weights = {name for name, p in named.items() if id(p) not in given and p.requires_grad}
    if paradigm == "lambda" and not lams:
        raise ValueError(
            "Nothing would train: every lambda is frozen though the model was reprogrammed with learnable=True. Let "
            'them train by requires_grad_(True), or name them by trainable="*.lam".'
        )
    if paradigm == "all" and not weights:
        raise ValueError(
            "paradigm='all' trains the weights, and every weight of this model is frozen (requires_grad is False): let "
            "those that shall train take gradients by requires_grad_(True), name them by trainable=, or give "
            "paradigm='lambda', which trains lambda alone."
        )
    return lams | weights if paradigm == "all" else lams


def _by_name(named: Mapping[str, nn.Parameter], patterns: Iterable[str]) -> set[str]:
    """Names that match a glob, frozen or not."""
    chosen = set[str]()
    for pattern in patterns:
        found = fnmatch.filter(named, pattern)
        if not found:
            near = difflib.get_close_matches(pattern, named, n=3, cutoff=0.3) or list(named)[:3]
            raise ValueError(f"trainable={pattern!r} matches no parameter. Near names: {', '.join(near)}.")
        chosen.update(found)
    return chosen


def set_modes_(model: nn.Module, training: bool = True) -> None:
    """Training mode where a weight trains, evaluation mode where none does; what has no weights follows its parent.

    Lambda does not count: under paradigm 2 BatchNorm statistics and dropout stay as they are.
    """
    weights = [p for name, p in model.named_parameters() if name.rpartition(".")[2] != "lam"]
    model.training = any(p.requires_grad for p in weights) if weights else training
    for child in model.children():
        set_modes_(child, model.training)


@contextmanager
def given_back(model: nn.Module) -> Iterator[None]:
    """What took gradients, training modes and the random generators, afterwards as before."""
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
                if parameter.requires_grad != flag:  # not even the flag it has may be set for some weights
                    parameter.requires_grad_(flag)
                parameter.grad = None
            for module, mode in modes.items():
                module.training = mode
