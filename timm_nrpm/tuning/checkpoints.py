"""Checkpoints of a run: safetensors and JSON, each written completely or not at all.

step-00000120/state.safetensors     parameters that train, buffers, the optimizer's state
step-00000120/state.json            step, settings, history; sha256 of the other file and of itself
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from timm_nrpm.errors import CheckpointWarning
from timm_nrpm.models.base import checksum_of
from timm_nrpm.models.downloads import sha256_of
from timm_nrpm.models.reprogramming import uncalibrate_
from timm_nrpm.models.saving import DRAFT
from timm_nrpm.models.tensors import write_tensors

STATE, TENSORS = "state.json", "state.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read.

    Attributes:
        path: Its folder.
        tensors: Its tensors by name.
        content: Its JSON values by name.
    """

    path: Path
    tensors: dict[str, Tensor]
    content: dict[str, Any]


class Checkpoints:
    """The last `keep` checkpoints of a run, in a folder.

    Args:
        folder: The folder, created by the first checkpoint.
        keep: Number of checkpoints that stay.

    Example:
        >>> checkpoints = Checkpoints(Path("run/checkpoints"), keep=3)
        >>> checkpoints.save(120, {"lam": torch.tensor(0.5)}, {"step": 120})
        PosixPath('run/checkpoints/step-00000120')
        >>> checkpoints.last().content["step"]
        120
    """

    def __init__(self, folder: Path, keep: int = 3) -> None:
        self.folder, self.keep = folder, keep

    def paths(self) -> list[Path]:
        """Paths of the checkpoints, the oldest first."""
        return sorted(self.folder.glob("step-*"))

    def save(self, step: int, tensors: Mapping[str, Tensor], content: Mapping[str, Any]) -> Path:
        """Write a checkpoint, then remove all but the last `keep`.

        Returns:
            Path of the checkpoint.

        Raises:
            OSError: The checkpoint could not be written; the earlier ones are intact.
        """
        path = self.folder / f"step-{step:08d}"
        while path.exists():  # an earlier one of this step stays until the new one is written
            path = path.with_name(f"{path.name}+")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for stale in self.folder.glob(f"{DRAFT}*"):  # left by a process that was killed
                shutil.rmtree(stale, ignore_errors=True)
            draft = Path(tempfile.mkdtemp(prefix=DRAFT, dir=self.folder))
            try:
                write_tensors(tensors, draft / TENSORS)
                state = {**content, "sha256_of_tensors": sha256_of(draft / TENSORS)}
                (draft / STATE).write_text(json.dumps({**state, "sha256": checksum_of(state)}))
                for file in (draft / TENSORS, draft / STATE, draft):
                    _to_disk(file)
                os.replace(draft, path)
                _to_disk(self.folder)
            finally:
                shutil.rmtree(draft, ignore_errors=True)
        except Exception as error:  # safetensors raises errors of its own for a full disk
            last = self.paths()
            raise OSError(
                f"The checkpoint of step {step} could not be written to {self.folder} ({error}). "
                + (
                    f"The last good one is {last[-1].name}: make room, then resume."
                    if last
                    else "There is no earlier one."
                )
            ) from error
        paths = self.paths()
        here = paths.index(path)
        # The run resumed from an earlier step, so checkpoints of later steps are broken.
        for old in (*paths[: max(0, here + 1 - self.keep)], *paths[here + 1 :]):
            shutil.rmtree(old, ignore_errors=True)
        return path

    def last(self) -> Checkpoint | None:
        """The last intact checkpoint, or None; a broken one is skipped with a warning."""
        for path in reversed(self.paths()):
            try:
                return self.read(path.name)
            except Exception as error:
                warnings.warn(
                    f"The checkpoint {path} is broken ({error}): the one before it is taken.",
                    CheckpointWarning,
                    stacklevel=2,
                )
        return None

    def read(self, name: str) -> Checkpoint:
        """The checkpoint of that name. If it is not intact, an exception of any type is raised."""
        path = self.folder / name
        content = json.loads((path / STATE).read_text())
        if content.pop("sha256", None) != checksum_of(content):
            raise ValueError(f"{STATE} is cut short or was changed")
        if sha256_of(path / TENSORS) != content["sha256_of_tensors"]:
            raise ValueError(f"{TENSORS} is cut short or was changed")
        return Checkpoint(path, load_file(path / TENSORS), content)


def collect(model: nn.Module, wrapped: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Everything that training changes: parameters that train, buffers, those that calibration fitted among them, and
    the optimizer's state.

    Args:
        model: The reprogrammed model.
        wrapped: The module around the model, as accelerate prepared it.
        optimizer: The optimizer without accelerate's wrapper.

    Returns:
        Tensors and plain values by name.
    """
    trained = get_model_state_dict(wrapped, options=_options(trained=True))
    moments = get_optimizer_state_dict(wrapped, optimizer, options=_options(flat=True))
    return {f"model.{k}": v for k, v in trained.items()} | {f"optimizer.{k}": v for k, v in moments.items()}


def install_(model: nn.Module, wrapped: nn.Module, optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Restore, in place, the state that :func:`collect` returned."""
    trained, moments = (
        {k.removeprefix(start): v for k, v in state.items() if k.startswith(start)}
        for start in ("model.", "optimizer.")
    )
    uncalibrate_(model)  # the layers add what they find in the state
    set_model_state_dict(wrapped, trained, options=_options(trained=True))
    set_optimizer_state_dict(wrapped, optimizer, moments, options=_options(flat=True))


def _options(*, flat: bool = False, trained: bool = False) -> StateDictOptions:
    return StateDictOptions(
        strict=not trained,
        ignore_frozen_params=trained,
        flatten_optimizer_state_dict=flat,
    )


def _to_disk(path: Path) -> None:
    """Wait until a file, or the names in a folder, would survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
