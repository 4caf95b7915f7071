"""The architectures that exist: those of timm, reprogrammed, and a small one that comes with this package."""

from __future__ import annotations

from collections import deque
from importlib.resources import files
from typing import Any

import timm
import torch
from timm.models import (
    DefaultCfg,
    build_model_with_cfg,
    generate_default_cfgs,
    get_arch_name,
    get_pretrained_cfg,
    register_model,
)
from timm.models.resnet import BasicBlock, ResNet
from torch import nn

from timm_nrpm.config import Lambdas, LayerSelection, NRPMConfig
from timm_nrpm.models.architectures import Support, census, measured
from timm_nrpm.models.backbones import CifarResNet
from timm_nrpm.models.base import Base
from timm_nrpm.models.creation import brings_weights, check_name, create_plain
from timm_nrpm.models.loading import from_timm, is_variant
from timm_nrpm.models.reprogramming import record_of, reprogram_, reprogrammed_layers

__all__ = ["create_model", "is_supported", "list_models"]  # timm adds the entrypoints it registers

DIGITS = "resnet8_digits"
"""Name of the bundled model of 85 kB, trained by `scripts/train_digits.py` on scikit-learn's 8x8 handwritten digits."""

ASSETS = files("timm_nrpm") / "assets"

default_cfgs: dict[str, DefaultCfg] = dict(
    generate_default_cfgs(
        {
            DIGITS: {
                "file": str(ASSETS / f"{DIGITS}.safetensors"),
                "num_classes": 10,
                "input_size": (1, 8, 8),
                "fixed_input_size": False,
                "mean": (0.5,),
                "std": (0.5,),
                "crop_pct": 1.0,
                "first_conv": "conv1",
                "classifier": "fc",
                "license": "apache-2.0",
            }
        }
    )
)


class _SmallResNet(CifarResNet):
    """A ResNet of three blocks, for 8x8 images."""

    def __init__(self, in_chans: int = 1, **kwargs: Any) -> None:
        super().__init__(in_chans, (8, 16, 32, 32), block=BasicBlock, layers=(1, 1, 1, 1), **kwargs)
        # A fourth stage would see one pixel and eight of padding. It is an empty Sequential and no Identity, since timm
        # iterates over the blocks of every stage for checkpointing and for intermediate features.
        self.layer4 = nn.Sequential()
        self.feature_info[4]["reduction"] = self.feature_info[3]["reduction"]


@register_model
def resnet8_digits(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """A ResNet of three blocks for 8x8 grey images, 20 thousand parameters."""
    return build_model_with_cfg(_SmallResNet, DIGITS, pretrained, **{"num_classes": 10, **kwargs})


@torch.inference_mode(False)  # no gradient would pass through weights made in that mode
def create_model(
    name: str,
    pretrained: bool = False,
    *,
    lam: Lambdas = 0.8,
    iterations: int = 3,
    eps: float = 1e-3,
    penalty: str = "l1",
    layers: LayerSelection = None,
    learnable: bool = False,
    standardize: bool = False,
    **timm_kwargs: Any,
) -> nn.Module:
    """Create a timm model and reprogram it.

    Args:
        name: Any name that `timm.create_model` takes, with or without a tag, `hf-hub:` and `local-dir:` included.
        pretrained: Whether to load pretrained weights.
        lam, iterations, eps, penalty, layers, learnable, standardize: Settings; see :class:`timm_nrpm.NRPMConfig`.
        **timm_kwargs: Further arguments of `timm.create_model`.

    Returns:
        The reprogrammed model, in training mode as timm returns it.

    Raises:
        ValueError: timm does not know the name (the message suggests similar ones), or a setting is outside its range.
        timm_nrpm.errors.WeightsUnavailable: The weights can be neither downloaded nor found on this machine.

    Example:
        >>> model = timm_nrpm.create_model("resnet18", pretrained=True, lam=0.8, num_classes=10)
        >>> timm_nrpm.lambdas(model)["layer1.0.conv1"]
        0.8
    """
    config = NRPMConfig(lam, iterations, eps, penalty, layers, learnable=learnable, standardize=standardize)
    name = name.removeprefix("nrpm_")
    if isinstance(timm_kwargs.get("pretrained_cfg"), str):  # timm passes the tag of nrpm_resnet18.a1_in1k here
        name = f"{name}.{timm_kwargs.pop('pretrained_cfg')}"
    model = create_plain(name, pretrained, **timm_kwargs)
    if reprogrammed_layers(model):
        raise ValueError(f"{name} is a variant already: load it by timm_nrpm.from_pretrained.")
    given = {k: v for k, v in timm_kwargs.items() if v is not None}
    # Nobody else can find weights from a file on this machine by the name.
    local = name.startswith("local-dir:") or brings_weights(given)
    record = record_of(reprogram_(model, config))
    if record.base is not None:
        record.base = Base.of(model, None if local or not pretrained else name, given, record.base.sha256)
    return model


def list_models(filter: str = "", pretrained: bool = False) -> list[str]:
    """Names of the architectures in which every linear map can be reprogrammed.

    The list was measured by `scripts/census.py`, which builds and runs every architecture of timm. Other architectures
    can be created as well, but some of their layers stay plain, as a warning says; :func:`is_supported` says which.

    Args:
        filter: Wildcard as in `timm.list_models`, such as `"resnet*"`.
        pretrained: Whether to list only names with pretrained weights, tags included.

    Example:
        >>> list_models("resnet1*")
        ['resnet10_cifar', 'resnet10_cifar_narrow', 'resnet10t', 'resnet14t', 'resnet18', ...]
    """
    known = {name for name, why in census().items() if not why}
    return [n for n in timm.list_models(filter, pretrained=pretrained) if get_arch_name(n) in known]


def is_supported(name: str) -> Support:
    """Whether every convolution and linear map of an architecture can be reprogrammed, and if not, why.

    The answer is that of `scripts/census.py`, from which :func:`list_models` lists names. An architecture that was not
    there, such as one of your own that is registered with timm, is built and run by the same rules, which takes about
    a second.

    Args:
        name: Name of an architecture, such as `"resnet18"`, with or without a tag or the prefix `nrpm_`.

    Returns:
        An object that is true if the architecture is covered whole, and otherwise says in `why` what stays plain.

    Raises:
        ValueError: timm does not know the name (the message suggests similar ones), it names a repository or a folder,
            or the architecture cannot be built and run.

    Example:
        >>> bool(is_supported("resnet18"))
        True
        >>> is_supported("sequencer2d_s").why
        'LSTM stages.0.blocks.0.rnn_tokens.rnn_v and 35 more (weights read 2744 times): its type LSTM is not one...'
    """
    if ":" in name or "/" in name:
        raise ValueError(
            f"name={name!r} names a repository or a folder: give the architecture in its config.json, such as resnet18."
        )
    name = name.removeprefix("nrpm_")
    check_name(name)
    architecture = get_arch_name(name)
    why = census()[architecture] if architecture in census() else measured(architecture).why
    return Support(architecture, not why, why)


def _register(architecture: str, tags: list[str]) -> None:
    """Register `nrpm_<architecture>` with timm, with the same pretrained weights."""

    def entrypoint(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        if is_variant(kwargs.get("pretrained_cfg")):
            return from_timm(kwargs.pop("pretrained_cfg"), pretrained, kwargs)
        return create_model(architecture, pretrained, **kwargs)

    name = f"nrpm_{architecture}"
    entrypoint.__name__ = entrypoint.__qualname__ = name
    entrypoint.__module__ = __name__
    entrypoint.__doc__ = f"`{architecture}`, reprogrammed: see `timm_nrpm.create_model`."
    # Finalised configs are taken, since timm completes others by a repository named after the new architecture.
    default = get_pretrained_cfg(architecture)
    if default is not None:
        first = default.tag or ""  # the order matters: timm takes the first as the default
        others = {tag: get_pretrained_cfg(f"{architecture}.{tag}") for tag in tags if tag not in ("", first)}
        cfgs = {first: default, **{tag: cfg for tag, cfg in others.items() if cfg is not None}}
        default_cfgs[name] = DefaultCfg(deque(cfgs), cfgs, any(cfg.has_weights for cfg in cfgs.values()))
    globals()[name] = register_model(entrypoint)


def _register_all() -> None:
    tags_of: dict[str, list[str]] = {}
    for name in timm.list_models(include_tags=True):
        architecture, _, tag = name.partition(".")
        tags_of.setdefault(architecture, []).append(tag)
    for architecture, tags in tags_of.items():
        _register(architecture, tags)


_register_all()
