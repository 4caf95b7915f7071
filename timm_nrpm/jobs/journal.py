"""The results of a long measurement, written line by line, so that it can be killed and resumed."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor


class Journal:
    """An append-only file of JSON rows, below a first line that says what was measured.

    Args:
        path: Path of the file; None keeps the rows in memory alone.
        identity: Settings of the measurement. The rows of an existing file are taken over if its settings are equal,
            where one that is None is like one that is not there.

    Attributes:
        rows: The rows by their number, without a last line that was cut short.

    Raises:
        ValueError: The file holds rows of another measurement, or is no journal. It is left unchanged.
        OSError: The file cannot be written.

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
        header = json.dumps(identity).encode() + b"\n"
        content = self.path.read_bytes() if self.path.exists() else b""
        if header.startswith(content):  # a new file, or one whose first line was cut short
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_bytes(header)
            self.size = len(header)
            return
        try:
            *lines, torn = content.split(b"\n")
            old, *rows = map(json.loads, lines)
            now = json.loads(header)
            changes = [f"{k}: {old.get(k)!r} then, {now.get(k)!r} now" for k in now | old if old.get(k) != now.get(k)]
            numbers = [int(row.pop("number")) for row in rows]
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path} is no journal, or was changed ({error}): give another file.") from error
        if changes:
            raise ValueError(f"{path} holds another run ({'; '.join(changes)}): give its settings, or another file.")
        if len(set(numbers)) < len(numbers):
            raise ValueError(f"{path} holds a row twice, as if two runs had shared it: give another file.")
        self.rows = dict(zip(numbers, rows, strict=True))
        self.size = len(content) - len(torn)
        os.truncate(self.path, self.size)

    def add(self, number: int, row: Mapping[str, Any]) -> None:
        """Append a row. Once this returns, the row survives a power cut."""
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
        """Whether there is a row `number`, of the images whose :func:`digest_of` is `digest`.

        Raises:
            ValueError: The row is of other images or labels.
        """
        if number not in self.rows:
            return False
        if self.rows[number]["images"] != digest:
            raise ValueError(
                f"Row {number} of {self.path} is of other images or labels: give the same ones in the same "
                "order (shuffle=False), or another file."
            )
        return True


def digest_of(pixels: Tensor, labels: Tensor) -> str:
    """The SHA-256 of images and their labels, in hexadecimal."""
    hashed = hashlib.sha256(pixels.detach().cpu().contiguous().numpy().tobytes())
    hashed.update(labels.detach().cpu().long().numpy().tobytes())
    return hashed.hexdigest()
