"""The plain model's BatchNorm statistics, kept beside those that a reprogrammed model computes with.

The plain model is the one that was reprogrammed. Its weights are those of the reprogrammed model, and its statistics
are kept from `reprogram_` until `restore_` in buffers of the same modules, `plain_running_mean` beside `running_mean`.
So they belong to the state dict and to every copy, average and cast of the model, and do not change with the statistics
that it computes with.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

PREFIX = "plain_"
KEPT = ("running_mean", "running_var", "num_batches_tracked")
"""Names of the statistics of a BatchNorm, of which each has a copy under its name with `PREFIX`."""

SAMPLES = 8
"""Largest number of elements of each weight that are compared to detect a change."""


def norms_of(model: nn.Module) -> dict[str, _BatchNorm]:
    """BatchNorm modules that have running statistics, by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, _BatchNorm) and m.running_mean is not None}


def has_statistics(model: nn.Module) -> bool:
    """Whether a model has running statistics, in a BatchNorm or in what took its place, such as timm's frozen one."""
    return any(name.rpartition(".")[2] == KEPT[0] for name, _ in model.named_buffers())


@torch.inference_mode(False)
def remember_(model: nn.Module) -> None:
    """Store the current statistics of a model as those of the plain model."""
    for norm in norms_of(model).values():
        for key in _present(norm):
            norm.register_buffer(PREFIX + key, norm._buffers[key].clone())  # type: ignore[union-attr]
        norm.register_load_state_dict_pre_hook(_load_plain)


@torch.no_grad()
def bring_back_(model: nn.Module, keys: Sequence[str] = KEPT) -> None:
    """Make a model compute with the plain model's statistics, or with those named in `keys`."""
    for norm in norms_of(model).values():
        for key in set(_present(norm)) & set(keys):
            kept = norm._buffers.get(PREFIX + key)
            if kept is not None:
                norm._buffers[key].copy_(kept)  # type: ignore[union-attr]


@torch.no_grad()
def take_(model: nn.Module, plain: nn.Module) -> None:
    """Store the statistics of `plain` as those of the plain model."""
    sources = norms_of(plain)
    for name, norm in norms_of(model).items():
        for key in _present(norm):
            kept = norm._buffers.get(PREFIX + key)
            if kept is not None:
                kept.copy_(sources[name]._buffers[key])  # type: ignore[arg-type]


def forget_(model: nn.Module) -> None:
    """Remove the buffers and hooks that `remember_` added."""
    for norm in model.modules():
        if not isinstance(norm, _BatchNorm):
            continue
        for key in KEPT:
            norm._buffers.pop(PREFIX + key, None)
        hooks = norm._load_state_dict_pre_hooks
        for number in [n for n, hook in hooks.items() if getattr(hook, "hook", None) is _load_plain]:
            del hooks[number]


def complete(model: nn.Module) -> bool:
    """Whether every BatchNorm holds the plain model's statistics beside its own."""
    return all(PREFIX + key in norm._buffers for norm in norms_of(model).values() for key in _present(norm))


def moved(model: nn.Module) -> dict[str, Tensor]:
    """Running means and variances of all BatchNorms by buffer name; empty if all equal the plain model's."""
    norms = norms_of(model)
    now = {f"{name}.{key}": norm._buffers[key] for name, norm in norms.items() for key in KEPT[:2]}
    kept = {f"{name}.{key}": norm._buffers.get(PREFIX + key) for name, norm in norms.items() for key in KEPT[:2]}
    same = all(kept[name] is not None and torch.equal(kept[name], value) for name, value in now.items())  # type: ignore[arg-type]
    return {} if same else {name: value for name, value in now.items() if value is not None}


def own_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict without the plain model's statistics: the tensors that determine what the model computes.

    The number of batches that a BatchNorm has seen determines nothing, so it is the plain model's.
    """
    state = dict(model.state_dict())
    for key in [key for key in state if key.rpartition(".")[2].startswith(f"{PREFIX}")]:
        name, _, last = key.rpartition(".")
        if last.removeprefix(PREFIX) not in KEPT:
            continue
        kept = state.pop(key)
        if last == f"{PREFIX}num_batches_tracked":
            state[f"{name}.num_batches_tracked".removeprefix(".")] = kept
    return state


@dataclass(frozen=True)
class Fingerprint:
    """A few elements of every weight, which show whether weights changed; a cast of the weights still fits.

    Attributes:
        samples: At most `SAMPLES` evenly spaced elements of each weight by its name, without lambdas.
    """

    samples: dict[str, Tensor]

    @classmethod
    def of(cls, model: nn.Module) -> Fingerprint:
        """The fingerprint of a model's current weights."""
        return cls({name: values.clone() for name, values in _samples(model)})

    def fits(self, model: nn.Module) -> bool:
        """Whether a model has these weights, in whatever precision it holds them now."""
        now = dict(_samples(model))
        if now.keys() != self.samples.keys():
            return False
        return all(
            values.shape == stored.shape and torch.equal(values, stored.to(values.dtype))
            for values, stored in ((now[name], stored) for name, stored in self.samples.items())
        )


def _samples(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, weight in model.named_parameters():
        if name.rpartition(".")[2] == "lam" or weight.is_meta:
            continue
        step = max(1, weight.numel() // SAMPLES)
        places = torch.arange(0, weight.numel(), step, device=weight.device)[:SAMPLES]
        yield name, torch.take(weight.detach(), places).cpu()


def _present(norm: nn.Module) -> list[str]:
    """Names of the statistics that a BatchNorm has."""
    return [key for key in KEPT if norm._buffers.get(key) is not None]


def _load_plain(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Take the statistics of a state dict as the plain model's, too, if it comes from a plain model."""
    for key in _present(module):
        if prefix + key in state and PREFIX + key in module._buffers:
            state.setdefault(prefix + PREFIX + key, state[prefix + key])
