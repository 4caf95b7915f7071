"""Loading files of weights: those of the paper's authors, of timm's training script, and state dicts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError
from timm.models import load_state_dict
from torch import Tensor, nn

from timm_nrpm.models.reprogramming import reprogrammed_layers
from timm_nrpm.models.tensors import differences

Model = TypeVar("Model", bound=nn.Module)

RENAMED = {"shortcut": "downsample", "linear": "fc"}
"""timm's names of modules by the authors' names."""


def load_published_(model: Model, file: str | Path) -> Model:
    """Load weights of the paper's authors, of timm's training script or of a state dict into a plain model, in place.

    Args:
        model: A timm model that is not reprogrammed.
        file: Path of one of these: a checkpoint of the authors (`.pth`, or `.t7` with an entry `net`), whose lambdas
            are left out; a training checkpoint of timm (`.pth.tar`), whose averaged weights are preferred, as in
            `timm.create_model(checkpoint_path=...)`; or a state dict of `model`, saved by torch or as safetensors.
            Nothing in the file is executed.

    Returns:
        `model`, in the mode it was in.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file holds something else, or `model` is reprogrammed. The model is untouched.

    Example:
        >>> from safetensors.torch import save_file
        >>> save_file(plain.state_dict(), "weights.safetensors")
        >>> model = load_published_(timm.create_model("resnet8_digits"), "weights.safetensors").eval()
        >>> model = reprogram_(model, NRPMConfig(lam=0.5))
    """
    file = Path(file)
    if reprogrammed_layers(model):
        raise ValueError("The model is reprogrammed: load weights into the plain model, then call reprogram_.")
    if not file.is_file():
        raise FileNotFoundError(f"{file} is no file: give a checkpoint or a state dict of this model.")
    advice = (
        "Give a checkpoint of this architecture, the authors' or one of timm's training script, or its state dict, "
        "saved by torch or as safetensors."
    )
    try:
        content = load_state_dict(str(file), weights_only=True)
    except AttributeError:  # it holds no state dict, but another plain value
        content = {}
    except Exception as error:  # each format has errors of its own
        raise ValueError(f"{file} cannot be read as weights alone ({_unreadable(error)}). {advice}") from None
    expected = _shapes(model.state_dict())
    named = published(content)
    state = content if _shapes(content) == expected else named  # timm has modules of the authors' names, too
    if _shapes(state) != expected:  # the whole state is checked before any of it is loaded
        difference = differences(_shapes(named), expected)
        raise ValueError(f"{file} holds no weights of this {type(model).__name__} ({difference}). {advice}")
    model.load_state_dict(state)
    return model


def _shapes(state: Mapping[Any, Any]) -> dict[Any, tuple[int, ...] | None]:
    """Shapes by name; None for a value that is no tensor."""
    return {key: tuple(value.shape) if isinstance(value, Tensor) else None for key, value in state.items()}


def _unreadable(error: Exception) -> str:
    """Why a file could not be read, in words, without torch's advice to read it with `weights_only=False`."""
    text = str(error)
    listed = re.search(r"Unsupported globals: (.+?)\. No automatic", text)
    if listed:
        others = sorted(set(listed[1].split(", ")) - {"argparse.Namespace"})
        shown = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
        return (
            f"it holds objects besides tensors and plain values: {shown}; where you trust it, save its state dict alone"
        )
    if isinstance(error, SafetensorError):
        return f"it is no whole file of safetensors: {text}"
    return "it is empty, cut short or no file of torch's"


def published(state: Mapping[Any, Any], model: nn.Module | None = None) -> dict[str, Any]:
    """The weights of a checkpoint of the authors under timm's names, without lambdas.

    Args:
        state: Content of the checkpoint; a state dict under timm's names keeps these.
        model: Ignored; timm passes it to such a filter.
    """
    if isinstance(state.get("net"), Mapping):
        state = state["net"]
    renamed = {}
    for key, value in state.items():
        parts = str(key).removeprefix("module.").split(".")
        if "robust_sum" not in parts:
            renamed[".".join(RENAMED.get(part, part) for part in parts)] = value
    return renamed
