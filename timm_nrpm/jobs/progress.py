"""Progress bars. They go to stderr, so that what a command prints can be read by another program."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn

CONSOLE = Console(stderr=True)
"""The console on which progress bars are drawn."""

HIDDEN = Console(quiet=True)
"""The console of bars that are not shown."""


def console_of(shown: bool) -> Console:
    """The console on which a bar is drawn, which writes nothing if it is not shown."""
    # Before Rich 14.3, a disabled bar ends with a line break where stderr is no terminal.
    return CONSOLE if shown else HIDDEN


def progress_bar(shown: bool, *, counted: bool = False) -> Progress:
    """A bar with a description and the time left.

    Args:
        shown: Whether the bar is drawn at all.
        counted: Whether the bar shows how many of how many are done, which suits tasks that advance by whole numbers.
    """
    count: tuple[ProgressColumn, ...] = (MofNCompleteColumn(),) if counted else ()
    columns = (TextColumn("{task.description}"), BarColumn(), *count, TimeRemainingColumn())
    return Progress(*columns, console=console_of(shown), disable=not shown)
