"""SIGTERM and Ctrl-C, which wait until a step is done and saved."""

from __future__ import annotations

import signal
import threading
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interruption:
    """While entered, notes a signal instead of dying of it; `pass_on` then lets it do what it would have done.

    Python delivers signals to the main thread alone, so elsewhere it does nothing.

    Attributes:
        number: The signal that came, or 0.
    """

    def __init__(self) -> None:
        self.number = 0
        self._handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup: whoever ignores it keeps doing so
                    self._handlers[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None = None, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers.clear()
        if self.number and kind is None:  # it came too late for a step to see
            self.pass_on(signal.Signals(self.number))

    def _note(self, number: int, _: Any) -> None:
        self.number = number

    def pass_on(self, number: signal.Signals) -> None:
        """Give `number` to whoever had it before, in every process, also where another process got it."""
        self.number = 0
        self.__exit__()
        signal.raise_signal(number)
