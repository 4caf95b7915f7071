"""What a long measurement has found so far, line by line, so that it can be killed and go on."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor


class Journal:
    """Rows of JSON in a file that is only ever added to, below one that says what they are of.

    Args:
        path: The file; None keeps rows in memory alone.
        identity: What must be the same for the rows to be taken up.

    Attributes:
        rows: By their number. A last line that was cut short is not among them.

    Raises:
        ValueError: The file holds rows of something else, or no rows at all. It is left as it is.
        OSError: It cannot be written to.

    Example:
        >>> journal = Journal("run.jsonl", {"seed": 0})
        >>> journal.add(0, {"right": 12})
        >>> Journal("run.jsonl", {"seed": 0}).rows
        {0: {'right': 12}}
    """

    def __init__(self, path: str | Path | None, identity: Mapping[str, Any]) -> None:
        self.path, self.rows, self.size = None if path is None else Path(path), dict[int, dict[str, Any]](), 0
        if self.path is None:
            return
        first = json.dumps(identity).encode() + b"\n"
        content = self.path.read_bytes() if self.path.exists() else b""
        if first.startswith(content):  # new, or stopped in its first line
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_bytes(first)
            self.size = len(first)
            return
        try:
            *lines, torn = content.split(b"\n")
            then, *rows = map(json.loads, lines)
            other = [f"{k}: {then.get(k)!r} then, {v!r} now" for k, v in json.loads(first).items() if then.get(k) != v]
            numbers = [int(row.pop("number")) for row in rows]
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path} is no journal, or was changed ({error}): give another file.") from error
        if other:
            raise ValueError(f"The run in {path} was another: {'; '.join(other)}. Give what it had, or another file.")
        if len(set(numbers)) < len(numbers):
            raise ValueError(f"{path} holds a row twice, as if two runs had shared it: give another file.")
        self.rows = dict(zip(numbers, rows, strict=True))
        self.size = len(content) - len(torn)
        os.truncate(self.path, self.size)

    def add(self, number: int, row: Mapping[str, Any]) -> None:
        """Add a row. Once this returns, it would survive a power cut."""
        line = json.dumps({"number": number, **row}).encode() + b"\n"
        self.rows[number] = json.loads(json.dumps(row))
        if self.path is None:
            return
        with self.path.open("ab") as file:
            if file.tell() != self.size:
                raise ValueError(f"{self.path} was changed meanwhile: give every run a file of its own.")
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        self.size += len(line)

    def has(self, number: int, digest: str) -> bool:
        """Whether there is that row, of the images that `digest` tells.

        Raises:
            ValueError: It is of others.
        """
        if number not in self.rows:
            return False
        if self.rows[number]["images"] != digest:
            raise ValueError(
                f"Row {number} of {self.path} is of other images or labels: give the same in the same order "
                "(shuffle=False), or another file."
            )
        return True


def digest_of(pixels: Tensor, labels: Tensor) -> str:
    """A hash of images and their labels."""
    hashed = hashlib.sha256(pixels.detach().cpu().contiguous().numpy().tobytes())
    hashed.update(labels.detach().cpu().long().numpy().tobytes())
    return hashed.hexdigest()
