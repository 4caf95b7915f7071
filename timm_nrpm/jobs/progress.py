"""Progress bars. They go to stderr, so that what a command prints can be read by another program."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from threading import Event, Thread
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn

CONSOLE = Console(stderr=True)
"""The console on which progress bars are drawn."""

HIDDEN = Console(quiet=True)
"""The console of bars that are not shown."""

EVERY = 60.0
"""Seconds between two lines of a bar whose console is a file, where nothing can be drawn over."""

Item = TypeVar("Item")


class Bars(Progress):
    """Bars that a terminal draws, and of which a file gets a line each minute.

    Args:
        columns: What a bar consists of.
        shown: Whether the bars are drawn at all.
    """

    def __init__(self, *columns: ProgressColumn, shown: bool) -> None:
        # Before Rich 14.3, a disabled bar ends with a line break where stderr is no terminal.
        super().__init__(*columns, console=CONSOLE if shown else HIDDEN, disable=not shown)
        self._ended = Event()
        self._writer: Thread | None = None

    def start(self) -> None:
        super().start()
        in_a_file = not (self.console.is_terminal or self.console.is_jupyter)
        if in_a_file and not self.disable and self._writer is None:
            self._ended.clear()
            self._writer = Thread(target=self._write, name="bars in a file", daemon=True)
            self._writer.start()

    def stop(self) -> None:
        self._ended.set()
        if self._writer is not None:
            self._writer.join()
            self._writer = None
        super().stop()

    def _write(self) -> None:
        while not self._ended.wait(EVERY):
            self.console.print(self.get_renderable())


def progress_bar(shown: bool, *, counted: bool = False) -> Bars:
    """A bar with a description and the time left.

    Args:
        shown: Whether the bar is drawn at all.
        counted: Whether the bar shows how many of how many are done, which suits tasks that advance by whole numbers.
    """
    count: tuple[ProgressColumn, ...] = (MofNCompleteColumn(),) if counted else ()
    return Bars(TextColumn("{task.description}"), BarColumn(), *count, TimeRemainingColumn(), shown=shown)


def track(items: Iterable[Item], what: str, total: int | None, shown: bool) -> Iterator[Item]:
    """Give items one by one, with a bar.

    Args:
        items: The items.
        what: What is done with them, such as "Adapting".
        total: Number of items, or None if it is not known.
        shown: Whether the bar is drawn at all.
    """
    with progress_bar(shown) as bar:
        yield from bar.track(items, total, description=what)
