"""Pushes in the background of a run, which a slow or failed push neither stops nor delays before its end."""

from __future__ import annotations

import shutil
import tempfile
import threading
import warnings
from pathlib import Path

from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from torch import nn

from timm_nrpm.errors import PushWarning
from timm_nrpm.hub.publishing import push_to_hub
from timm_nrpm.models.saving import needs_weights, save_variant


class Publisher:
    """A thread that sends variants to the Hub while the run goes on. A newer variant replaces one that still waits.

    Args:
        folder: The folder of the run, where variants wait.
        repo_id: The repository, `owner/name`.
        model: The model of the run, which is checked for whether it can be published.
        license: The same as in :func:`timm_nrpm.push_to_hub`.

    Raises:
        ValueError: No push could succeed, since `repo_id` is not allowed or no licence is known.

    Example:
        >>> publisher = Publisher(Path("run"), "me/resnet18-nrpm", model)
        >>> publisher.offer(model, "Step 100")  # returns at once
        >>> publisher.finish()
    """

    def __init__(self, folder: Path, repo_id: str, model: nn.Module, license: str | None = None) -> None:
        self.folder, self.repo_id, self.license = folder, repo_id, license
        push_to_hub(model, repo_id, license=license, dry_run=True, cost=False)  # raises now, and not after an hour
        for stale in folder.glob("push-*"):  # left by a run that was killed
            shutil.rmtree(stale, ignore_errors=True)
        self._change = threading.Condition()
        self._waiting: tuple[Path, str] | None = None
        self._busy = self._over = False
        self._failure: str | None = None
        self._unsaved: str | None = None
        self._quiet = are_progress_bars_disabled()
        disable_progress_bars()  # they would disturb the run's own
        threading.Thread(target=self._work, name="timm_nrpm push", daemon=True).start()  # ends with the process

    def offer(self, model: nn.Module, message: str) -> None:
        """Save the model as a variant for the thread to send, and return.

        Args:
            model: The model as it is now.
            message: Title of the commit.
        """
        place = None
        try:
            place = Path(tempfile.mkdtemp(prefix="push-", dir=self.folder))
            save_variant(model, place / "variant", full=needs_weights(model))
        except Exception as error:  # safetensors raises errors of its own for a full disk
            self._fail(str(error), unsaved=True)
            if place is not None:
                shutil.rmtree(place, ignore_errors=True)
            return
        self._unsaved = None
        with self._change:
            if self._waiting is not None:
                shutil.rmtree(self._waiting[0], ignore_errors=True)
            self._waiting = place, message
            self._change.notify_all()

    def finish(self, seconds: float = 120.0) -> None:
        """Wait at most `seconds` for the pushes to end, and warn if the last variant is not on the Hub."""
        with self._change:
            self._over = True
            self._change.notify_all()
            done = self._change.wait_for(lambda: self._waiting is None and not self._busy, timeout=seconds)
        if not self._quiet:
            enable_progress_bars()
        failure = self._unsaved or self._failure if done else f"the push did not end within {seconds:g} seconds"
        if failure:
            warnings.warn(
                f"The last variant is not on the Hub: {failure.rstrip('. ')}. Push it later: timm-nrpm push --variant "
                f"{self.folder / 'variant'} {self.repo_id}",
                PushWarning,
                stacklevel=2,
            )

    def _work(self) -> None:
        """Push each variant that waits, until the run is over."""
        while True:
            with self._change:
                self._change.wait_for(lambda: self._waiting is not None or self._over)
                if self._waiting is None:
                    return
                (place, message), self._waiting, self._busy = self._waiting, None, True
            try:
                # An estimate of the cost would disturb the run: it changes the number of threads for a moment.
                push_to_hub(place / "variant", self.repo_id, license=self.license, commit_message=message, cost=False)
                self._failure = None
            except Exception as error:  # the run goes on, whatever goes wrong with a push
                self._fail(f"{type(error).__name__}: {error}")
            finally:
                shutil.rmtree(place, ignore_errors=True)
                with self._change:
                    self._busy = False
                    self._change.notify_all()

    def _fail(self, why: str, unsaved: bool = False) -> None:
        """Keep the reason of a failure, and warn of the first one in a row."""
        if self._failure is None and self._unsaved is None:
            warnings.warn(f"{self.repo_id} was not updated, and the run goes on: {why}", PushWarning, stacklevel=3)
        if unsaved:
            self._unsaved = why  # a later push of an earlier variant does not make up for it
        else:
            self._failure = why
