"""Where a command writes: what it found to stdout, as text or as JSON, and everything else to stderr."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text


@dataclass(frozen=True)
class Terminal:
    """The two streams of a command.

    Attributes:
        json: Whether stdout gets one JSON object, and no text.
        quiet: Whether stderr gets errors and warnings alone: no progress bars, no notes.
    """

    json: bool = False
    quiet: bool = False

    @property
    def progress(self) -> bool:
        """Whether progress bars are shown: to somebody who looks, and not in a log."""
        return not self.quiet and sys.stderr.isatty()

    @property
    def can_ask(self) -> bool:
        """Whether somebody is there who sees a question and can answer."""
        return sys.stdin.isatty() and sys.stderr.isatty()

    def ask(self, title: str, items: Sequence[str], question: str) -> bool:
        """Ask people about a list, and return whether they say yes.

        Args:
            title: Line above the list.
            items: The list.
            question: Question below it, which `y` or `yes` answers.
        """
        lines = [title, *(f"  - {item}" for item in items), f"{question} [y/N] "]
        print("\n".join(lines), end="", file=sys.stderr, flush=True)
        return sys.stdin.readline().strip().lower() in ("y", "yes")

    def show(self, result: str | Table | Text) -> None:
        """Print a result for people: a string as it is, rich's tables and texts as wide as the terminal."""
        if self.json or not _speaks():
            return
        if isinstance(result, str):
            print(result)
        else:
            Console(markup=False).print(result)

    def give(self, result: Mapping[str, object]) -> None:
        """Print a result for programs; what is not JSON's own in it, such as a path, is written as text."""
        if self.json and _speaks():
            print(json.dumps(result, default=str, ensure_ascii=False))

    def note(self, text: str) -> None:
        """Tell people something beside the result."""
        if not self.quiet and _speaks():
            print(f"timm-nrpm: {text}", file=sys.stderr)


def _speaks() -> bool:
    """Whether this process is the one, of several, that writes."""
    return os.environ.get("RANK", "0") == "0"
