"""Checks that a saved variant gives the same model again, by building it as a reader would and comparing."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

import timm
import torch
from timm.models import get_model_input_config
from torch import Tensor, nn

from timm_nrpm.errors import BrokenVariant, WrongBase
from timm_nrpm.models.base import Base
from timm_nrpm.models.creation import TIMM_FILES
from timm_nrpm.models.format import Variant
from timm_nrpm.models.modes import evaluating
from timm_nrpm.models.reprogramming import restore_
from timm_nrpm.models.tensors import differences

CLOSE = 1e-3
"""Largest difference of logits, relative to the largest logit, between models that count as the same function."""


def check_loads(folder: Path, plain: nn.Module) -> None:
    """Raise a ValueError unless a full variant gives `plain` again, bit for bit.

    Args:
        folder: Folder that holds a whole variant with its weights.
        plain: The plain model that the variant was saved from.
    """
    with torch.random.fork_rng(devices=[]):  # timm draws random weights before it loads others
        try:
            rebuilt = restore_(Variant.read(folder.joinpath, str(folder)).build(folder.joinpath, lambda: plain, "it"))
            difference = _difference(rebuilt, plain)
        except (BrokenVariant, WrongBase) as error:
            difference = _tensor_difference(folder, plain) or str(error)
    if difference:
        architecture = getattr(plain, "pretrained_cfg", {}).get("architecture")
        raise ValueError(
            f"{architecture} cannot be saved with its weights: nobody could load it, since timm builds another model "
            f"by that name ({difference}). {_advice(plain)}"
        )


def is_rebuilt(base: Base, plain: nn.Module) -> bool:
    """Whether timm still builds `plain`, apart from its weights, by the name of its base."""
    if base.name is None or ":" in base.name:  # a repository's own config says what to build
        return base.name is not None
    with torch.random.fork_rng(devices=[]):
        try:
            rebuilt = timm.create_model(base.name, pretrained=False, **base.kwargs, dtype=base.torch_dtype)
        except Exception:  # timm may raise anything, even for arguments that it took before
            return False
    ours, theirs = ({k: (v.shape, v.dtype) for k, v in m.state_dict().items()} for m in (plain, rebuilt))
    return ours == theirs and not _difference(rebuilt, plain)


def _difference(rebuilt: nn.Module, plain: nn.Module) -> str:
    """How a model differs from `plain` apart from its weights, in words; empty if it does not.

    Args:
        rebuilt: A model with tensors of the same names and shapes, which are replaced by those of `plain`.
        plain: The model that it is compared with.
    """
    rebuilt.to(next(plain.parameters()).device)
    buffers, state = dict(rebuilt.named_buffers()), plain.state_dict()
    for name, value in plain.named_buffers():
        buffer = buffers.get(name)
        # A buffer of another shape is a cache of the last input; the logits show whether it matters.
        if name not in state and buffer is not None and buffer.shape == value.shape and not _equal(buffer, value):
            return f"buffer {name}, which is not saved, has other values"
    rebuilt.load_state_dict(state, assign=True)  # assigned tensors keep their layout, and so the rounding of sums
    expected, logits = _logits(plain), _logits(rebuilt)
    if expected is None:
        return ""
    if logits is None or logits.shape != expected.shape:
        return "it does not run on the same images"
    differ = (logits - expected).abs().max() > CLOSE * expected.abs().max()
    return "with the same weights it computes other logits" if differ else ""


def _equal(first: Tensor, second: Tensor) -> bool:
    return first.dtype == second.dtype and torch.equal(first, second)


@torch.no_grad()
def _logits(model: nn.Module) -> Tensor | None:
    """Logits of one image; None if the model does not run on it, or gives other than finite logits."""
    parameter = next(model.parameters())
    with evaluating(model), suppress(Exception):
        size = get_model_input_config(model)["input_size"]
        image = torch.arange(torch.Size(size).numel()).sin().reshape(1, *size)  # no random numbers are drawn
        logits = model(image.to(parameter.device, parameter.dtype))
        return logits.double() if isinstance(logits, Tensor) and logits.isfinite().all() else None
    return None


def _tensor_difference(folder: Path, plain: nn.Module) -> str:
    """How the tensors of `plain` differ from those of the model that timm builds, in words; empty if they do not."""
    with suppress(Exception):
        config = json.loads((folder / TIMM_FILES[0]).read_text())
        arguments = {"num_classes": config["num_classes"], **config.get("model_args", {})}
        theirs = timm.create_model(config["architecture"], pretrained=False, **arguments)
        return differences(*({k: tuple(v.shape) for k, v in m.state_dict().items()} for m in (plain, theirs)))
    return ""


def _advice(plain: nn.Module) -> str:
    """The advice in the error message on how to save the model all the same."""
    if any("FrozenBatchNorm" in type(module).__name__ for module in plain.modules()):
        return "Call timm.layers.unfreeze_batch_norm_2d(model), then save."
    if any(".parametrizations." in f".{name}" for name in plain.state_dict()):
        return "Call torch.nn.utils.parametrize.remove_parametrizations on these layers, then save."
    if any(".base_layer." in f".{name}" for name in plain.state_dict()):
        return "Call merge_and_unload() on PEFT's model, and save what it gives."
    if any(name.endswith(("_orig", "_mask")) for name in plain.state_dict()):
        return "Call torch.nn.utils.prune.remove on these layers, then save."
    return (
        "Undo what was changed after timm made it, or keep the weights yourself: reprogram the model anew, save with "
        "full=False, and load with base=."
    )
