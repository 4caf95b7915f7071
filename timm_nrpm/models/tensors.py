"""Tensors in safetensors files, whatever their layout in memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor


def write_tensors(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Write tensors to a safetensors file, which holds each of them contiguously and in memory of its own.

    Args:
        tensors: Tensors by name, on any device and in any memory format; views, expanded tensors and shared memory are
            allowed. The tensors are not changed.
        file: Path of the file; an existing file is replaced.

    Example:
        >>> weight = torch.randn(4, 6)
        >>> write_tensors({"weight": weight.t(), "tied": weight}, Path("weights.safetensors"))
    """
    written: dict[str, Tensor] = {}
    places: set[int] = set()
    for name, tensor in tensors.items():
        value = tensor.detach().cpu().contiguous()
        place = value.untyped_storage().data_ptr()
        written[name] = value.clone() if place in places else value  # safetensors refuses shared memory
        places.add(place)
    save_file(written, file)


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """How one state differs from another, in words; empty if it does not.

    Args:
        found: Shapes by name of the given state; None for a value that is no tensor.
        wanted: Shapes by name of the state that is needed.

    Example:
        >>> differences({"fc.bias": (3,)}, {"fc.bias": (4,), "fc.weight": (4, 2)})
        '1 missing, like fc.weight; 1 of another shape, like fc.bias'
    """
    lists = {
        "missing": sorted(wanted.keys() - found.keys()),
        "not in the model": sorted(map(str, found.keys() - wanted.keys())),
        "of another shape": [key for key in wanted if key in found and found[key] != wanted[key]],
    }
    return "; ".join(f"{len(keys)} {kind}, like {keys[0]}" for kind, keys in lists.items() if keys)
