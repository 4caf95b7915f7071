"""Results of plain models, kept by a hash of all that they depend on.

The control of a reprogrammed model is the same plain model for every lambda, and an evaluation spends a good part of
its time on it. So its outcomes are kept, batch by batch, and an evaluation of another lambda takes them from there.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor

from timm_nrpm.evaluation.judge import Judge, Places
from timm_nrpm.evaluation.outcome import Outcome
from timm_nrpm.jobs.journal import digest_of
from timm_nrpm.models.base import checksum_of

PACKAGE = Path(__file__).parents[1]


@cache
def code_sha256() -> str:
    """SHA-256 of this package's code: a result of other attacks is another result."""
    digest = hashlib.sha256()
    for path in sorted(path for kind in ("py", "cpp", "h") for path in PACKAGE.rglob(f"*.{kind}")):
        digest.update(path.relative_to(PACKAGE).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


class KeptJudge:
    """A judge whose outcomes are files in a folder, and are read from there if they were found before.

    Args:
        judge: Judge that finds what the folder does not hold.
        folder: Folder of the outcomes, which is made if need be. A file that is damaged is written anew.
        identity: Everything, as JSON, that an outcome depends on beside the images and this package's code.

    Raises:
        OSError: The folder cannot be made.
    """

    def __init__(self, judge: Judge, folder: Path, identity: Mapping[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.judge, self.folder = judge, folder
        self.identity = {**identity, "code": code_sha256()}

    def __call__(self, images: Tensor, labels: Tensor, places: Places, tell: Callable[[float, str], None]) -> Outcome:
        """Return the outcome of a group, see :meth:`Judge.__call__`."""
        path = self.path(images, labels, places)
        try:
            return Outcome.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            outcome = self.judge(images, labels, places, tell)
        partial = path.with_suffix(f".{os.getpid()}")  # several processes may evaluate the same control
        with suppress(OSError):  # a full disk costs the next evaluation time, and this one nothing
            partial.write_text(json.dumps(outcome.to_dict()) + "\n", encoding="utf-8")
            partial.replace(path)
        return outcome

    def path(self, images: Tensor, labels: Tensor, places: Places) -> Path:
        """Return the file of a group of batches."""
        return (
            self.folder / f"{checksum_of({**self.identity, 'images': digest_of(images, labels), **vars(places)})}.json"
        )
