"""Whether what is saved gives the same model again: it is built as a reader would build it, and compared."""

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
"""Largest difference of logits, relative to the largest logit, of what counts as the same function."""


def check_loads(folder: Path, plain: nn.Module) -> None:
    """Raise a ValueError unless a full variant gives `plain` again, bit for bit.

    Args:
        folder: Folder that holds a whole variant with its weights.
        plain: The plain model that the variant was saved from.
    """
    with torch.random.fork_rng(devices=[]):  # timm draws weights before it loads others
        try:
            again = restore_(Variant.read(folder.joinpath, str(folder)).build(folder.joinpath, lambda: plain, "it"))
            why = _difference(again, plain)
        except (BrokenVariant, WrongBase) as error:
            why = _reason(folder, plain) or str(error)
    if why:
        architecture = getattr(plain, "pretrained_cfg", {}).get("architecture")
        raise ValueError(
            f"{architecture} cannot be saved with its weights: nobody could load it, since what timm builds by that "
            f"name is another model ({why}). {_advice(plain)}"
        )


def is_rebuilt(base: Base, plain: nn.Module) -> bool:
    """Whether the name of a base still builds `plain`, apart from its weights."""
    if base.name is None or ":" in base.name:  # of a repository on the Hub, whose config says what to build
        return base.name is not None
    with torch.random.fork_rng(devices=[]):
        try:
            again = timm.create_model(base.name, pretrained=False, **base.kwargs, dtype=base.torch_dtype)
        except Exception:  # whatever timm makes of arguments that it took before
            return False
    found, wanted = ({k: (v.shape, v.dtype) for k, v in m.state_dict().items()} for m in (plain, again))
    return found == wanted and not _difference(again, plain)


def _difference(again: nn.Module, plain: nn.Module) -> str:
    """How a model differs from `plain` apart from its weights, in words; empty if it does not.

    Args:
        again: A model with tensors of the same names and shapes, which are replaced by those of `plain`.
        plain: The model that it is compared with.
    """
    again.to(next(plain.parameters()).device)
    theirs, state = dict(again.named_buffers()), plain.state_dict()
    for name, value in plain.named_buffers():
        found = theirs.get(name)
        # One of another shape is a cache of what was run last; whether it matters, the logits tell.
        if name not in state and found is not None and found.shape == value.shape and not _equal(found, value):
            return f"buffer {name}, which is not saved, has other values"
    again.load_state_dict(state, assign=True)  # in the same layout, for the same rounding
    wanted, logits = _logits(plain), _logits(again)
    if wanted is None:
        return ""
    if logits is None or logits.shape != wanted.shape:
        return "it does not run on the same images"
    far = (logits - wanted).abs().max() > CLOSE * wanted.abs().max()
    return "with the same weights it computes other logits" if far else ""


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


@torch.no_grad()
def _logits(model: nn.Module) -> Tensor | None:
    """Logits of one image; None if the model does not run on it."""
    like = next(model.parameters())
    with evaluating(model), suppress(Exception):
        size = get_model_input_config(model)["input_size"]
        image = torch.arange(torch.Size(size).numel()).sin().reshape(1, *size)  # and no draw of a random number
        logits = model(image.to(like.device, like.dtype))
        return logits.double() if isinstance(logits, Tensor) and logits.isfinite().all() else None
    return None


def _reason(folder: Path, plain: nn.Module) -> str:
    """Which tensors timm's own model has not, or has besides, or in another shape; empty if that is not why."""
    with suppress(Exception):
        config = json.loads((folder / TIMM_FILES[0]).read_text())
        arguments = {"num_classes": config["num_classes"], **config.get("model_args", {})}
        theirs = timm.create_model(config["architecture"], pretrained=False, **arguments)
        return differences(*({k: tuple(v.shape) for k, v in m.state_dict().items()} for m in (plain, theirs)))
    return ""


def _advice(plain: nn.Module) -> str:
    """What may be done about it."""
    if any("FrozenBatchNorm" in type(module).__name__ for module in plain.modules()):
        return "Call timm.layers.unfreeze_batch_norm_2d(model), then save."
    if any(".parametrizations." in f".{name}" for name in plain.state_dict()):
        return "Call torch.nn.utils.parametrize.remove_parametrizations on these layers, then save."
    if any(name.endswith(("_orig", "_mask")) for name in plain.state_dict()):
        return "Call torch.nn.utils.prune.remove on these layers, then save."
    return (
        "Undo what was changed after timm made it, or keep the weights yourself: reprogram the model anew, save with "
        "full=False, and load with base=."
    )
