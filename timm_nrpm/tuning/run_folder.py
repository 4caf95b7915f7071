"""The folder of a run: written by one process, read by all.

checkpoints/    the states from which the run can resume
history.json    the numbers of every step
curves.png      a picture of the history
variant/        the tuned model, for `from_pretrained`
push-*/         variants that wait to be sent to the Hub
logs/           the logs of the trackers
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from timm_nrpm.evaluation.history import History
from timm_nrpm.figures.history import draw_history
from timm_nrpm.hub.background import Publisher
from timm_nrpm.models.saving import DRAFT, needs_weights, save_variant
from timm_nrpm.tuning.checkpoints import Checkpoint, Checkpoints


class RunFolder:
    """The folder of a run. All processes call every method; if it fails in the main process, it fails in all of them.

    Args:
        path: Path of the folder, which is created if it does not exist.
        keep: Number of checkpoints that stay.
        resume: Whether a run in the folder may go on.
        accelerator: The Accelerator of the run.

    Raises:
        OSError: The folder cannot be written to.
        ValueError: The folder holds a run, and `resume` is False.
    """

    def __init__(self, path: str, keep: int, resume: bool, accelerator: Accelerator) -> None:
        self.path, self.accelerator = Path(path), accelerator
        self.publisher: Publisher | None = None
        self.rehearsed = False
        self.checkpoints = Checkpoints(self.path / "checkpoints", keep)

        def claim() -> None:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryFile(dir=self.path):  # raises now, and not after an hour
                    pass
            except OSError as error:
                raise OSError(f"output={path!r} cannot be written to ({error}): give another folder.") from error
            if self.checkpoints.paths() and not resume:
                raise ValueError(f"{path} holds a run: go on with it by resume=True, or give another output.")

        self._on_main(claim)

    def publish(self, model: nn.Module, repo_id: str, license: str | None) -> None:
        """Send a variant to the Hub with every checkpoint from now on, from the main process.

        Raises:
            ValueError: No push could succeed, since `repo_id` is not allowed or no licence is known.
        """

        def start() -> None:
            self.publisher = Publisher(self.path, repo_id, model, license)

        self._on_main(start)

    def save(
        self,
        step: int,
        state: Mapping[str, Any],
        content: Mapping[str, Any],
        history: History,
        model: nn.Module,
    ) -> None:
        """Write a checkpoint and the history so far and, if the run is published, offer the variant to be sent.

        Args:
            step: Number of steps taken.
            state: Tensors and plain values by name, see :func:`timm_nrpm.tuning.checkpoints.collect`.
            content: More values for the checkpoint's JSON.
            history: The history so far.
            model: The model as it is now.
        """
        tensors = {k: v for k, v in state.items() if isinstance(v, Tensor)}
        values = {k: v for k, v in state.items() if k not in tensors}

        def write() -> None:
            if not self.rehearsed:
                self._rehearse(model)
            self.checkpoints.save(step, tensors, {**content, "values": values, "history": history.to_dict()})
            history.save(self.path / "history.json")
            if self.publisher is not None:
                self.publisher.offer(model, f"Step {step}")

        self._on_main(write)

    def last(self, identity: Mapping[str, Any]) -> Checkpoint | None:
        """The last intact checkpoint, if there is one.

        Raises:
            ValueError: The checkpoint is of a run with another identity than `identity`.
        """

        def find() -> str | None:
            checkpoint = self.checkpoints.last()
            return None if checkpoint is None else checkpoint.path.name

        name = self._on_main(find)
        if name is None:
            return None
        saved = self.checkpoints.read(name)
        then = saved.content["run"]
        keys = [key for key in {**then, **identity} if then.get(key) != identity.get(key)]
        if keys:
            changes = "; ".join(f"{key}: {then.get(key)!r} then, {identity.get(key)!r} now" for key in keys)
            raise ValueError(f"The run in {self.path} had other settings: {changes}. Give the same, or another output.")
        return saved

    def finish(self, model: nn.Module, history: History) -> None:
        """Write the history, its picture and the variant, without the weights if they are those of the base."""

        def write() -> None:
            history.save(self.path / "history.json")
            try:
                draw_history(history, self.path / "curves.png")
            except ImportError as error:
                warnings.warn(f"No picture: {error}", stacklevel=6)
            try:
                save_variant(model, self.path / "variant", full=needs_weights(model))
            except ValueError as error:  # the tuned model stays in memory, and the call succeeds
                warnings.warn(
                    f"No variant was written, and only the memory and the last checkpoint hold the weights: {error} "
                    "Save model.state_dict() before you end the process.",
                    stacklevel=6,
                )
            if self.publisher is not None:
                self.publisher.finish()

        self._on_main(write)

    def _rehearse(self, model: nn.Module) -> None:
        """Write a variant and delete it, to warn at the first checkpoint if none can be written at the end."""
        self.rehearsed = True
        with tempfile.TemporaryDirectory(prefix=DRAFT, dir=self.path) as folder:
            try:
                save_variant(model, Path(folder) / "variant", full=needs_weights(model))
            except ValueError as error:
                warnings.warn(f"This run will leave checkpoints, but no variant at its end: {error}", stacklevel=7)

    def _on_main(self, work: Callable[[], str | None]) -> str | None:
        """The result of `work` in the main process. If it fails there, every process raises instead of waiting."""
        outcome: list[str | None] = [None, None, None]
        if self.accelerator.is_main_process:
            try:
                outcome[0] = work()
            except Exception as error:  # safetensors raises errors of its own for a full disk
                outcome[1:] = ["ValueError" if isinstance(error, ValueError) else "OSError", str(error)]
        broadcast_object_list(outcome)
        if outcome[1]:
            raise (OSError if outcome[1] == "OSError" else ValueError)(outcome[2])
        return outcome[0]
