"""The plain model's BatchNorm statistics, kept beside those that a reprogrammed model computes with.

The plain model is the one that was reprogrammed. Its weights are those of the reprogrammed model, and its statistics
lie from `reprogram_` until `restore_` in buffers of the same modules, `plain_running_mean` beside `running_mean`. So
they go wherever the model goes: into its state dict and every copy, average and cast of it, whatever moves the
statistics that it computes with.
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
SAMPLES = 8
"""Numbers of every weight by which it is told whether it changed."""


def norms_of(model: nn.Module) -> dict[str, _BatchNorm]:
    """BatchNorm modules that have statistics, by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, _BatchNorm) and m.running_mean is not None}


@torch.inference_mode(False)
def remember_(model: nn.Module) -> None:
    """Keep the statistics that a model has now as those of the plain model."""
    for norm in norms_of(model).values():
        for key in _present(norm):
            norm.register_buffer(PREFIX + key, norm._buffers[key].clone())  # type: ignore[union-attr]
        norm.register_load_state_dict_pre_hook(_load_plain)


@torch.no_grad()
def bring_back_(model: nn.Module, keys: Sequence[str] = KEPT) -> None:
    """Let a model compute with the plain model's statistics, or with some of them."""
    for norm in norms_of(model).values():
        for key in set(_present(norm)) & set(keys):
            kept = norm._buffers.get(PREFIX + key)
            if kept is not None:
                norm._buffers[key].copy_(kept)  # type: ignore[union-attr]


@torch.no_grad()
def take_(model: nn.Module, plain: nn.Module) -> None:
    """Take the statistics of `plain` as those of the plain model from now on."""
    theirs = norms_of(plain)
    for name, norm in norms_of(model).items():
        for key in _present(norm):
            kept = norm._buffers.get(PREFIX + key)
            if kept is not None:
                kept.copy_(theirs[name]._buffers[key])  # type: ignore[arg-type]


def forget_(model: nn.Module) -> None:
    """Remove what `remember_` added."""
    for norm in model.modules():
        if not isinstance(norm, _BatchNorm):
            continue
        for key in KEPT:
            norm._buffers.pop(PREFIX + key, None)
        hooks = norm._load_state_dict_pre_hooks
        for number in [n for n, hook in hooks.items() if getattr(hook, "hook", None) is _load_plain]:
            del hooks[number]


def complete(model: nn.Module) -> bool:
    """Whether every BatchNorm has the plain model's statistics beside its own."""
    return all(PREFIX + key in norm._buffers for norm in norms_of(model).values() for key in _present(norm))


def moved(model: nn.Module) -> dict[str, Tensor]:
    """Running means and variances of all BatchNorms by buffer name, if any differs from the plain model's; else
    none."""
    norms = norms_of(model)
    now = {f"{name}.{key}": norm._buffers[key] for name, norm in norms.items() for key in KEPT[:2]}
    kept = {f"{name}.{key}": norm._buffers.get(PREFIX + key) for name, norm in norms.items() for key in KEPT[:2]}
    same = all(kept[name] is not None and torch.equal(kept[name], value) for name, value in now.items())  # type: ignore[arg-type]
    return {} if same else {name: value for name, value in now.items() if value is not None}


def own_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict without the plain model's statistics: what decides what the model computes.

    The number of batches that BatchNorm has seen decides nothing, so it is the plain model's.
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
    """A few numbers of every weight, by which to tell whether weights changed; a cast of them still fits.

    Attributes:
        samples: Evenly spaced elements of each weight by its name, lambdas left out.
    """

    samples: dict[str, Tensor]

    @classmethod
    def of(cls, model: nn.Module) -> Fingerprint:
        return cls({name: values.clone() for name, values in _samples(model)})

    def fits(self, model: nn.Module) -> bool:
        """Whether the weights of a model are these, in whatever precision it holds them now."""
        now = dict(_samples(model))
        if now.keys() != self.samples.keys():
            return False
        return all(
            values.shape == then.shape and torch.equal(values, then.to(values.dtype))
            for values, then in ((now[name], then) for name, then in self.samples.items())
        )


def _samples(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, weight in model.named_parameters():
        if name.rpartition(".")[2] == "lam" or weight.is_meta:
            continue
        step = max(1, weight.numel() // SAMPLES)
        places = torch.arange(0, weight.numel(), step, device=weight.device)[:SAMPLES]
        yield name, torch.take(weight.detach(), places).cpu()


def _present(norm: nn.Module) -> list[str]:
    """Statistics that a BatchNorm has."""
    return [key for key in KEPT if norm._buffers.get(key) is not None]


def _load_plain(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """A checkpoint of the plain model brings its statistics alone: they are the plain model's, too."""
    for key in _present(module):
        if prefix + key in state and PREFIX + key in module._buffers:
            state.setdefault(prefix + PREFIX + key, state[prefix + key])
