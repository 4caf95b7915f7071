"""Handling of SIGTERM and Ctrl-C, which take effect once a step is done and saved."""

from __future__ import annotations

import signal
import threading
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interruption:
    """A context manager that records a signal instead of letting it end the process; `pass_on` delivers it later.

    Python delivers signals to the main thread alone, so in another thread it does nothing.

    Attributes:
        number: Number of the signal that arrived, or 0.
    """

    def __init__(self) -> None:
        self.number = 0
        self._handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:  # ignored signals stay ignored, as under nohup
                    self._handlers[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None = None, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers.clear()
        if self.number and kind is None:  # it arrived after the last step that could have seen it
            self.pass_on(signal.Signals(self.number))

    def _note(self, number: int, _: Any) -> None:
        self.number = number

    def pass_on(self, number: signal.Signals) -> None:
        """Restore the previous handlers and raise the signal `number`, in every process, whichever one received it."""
        self.number = 0
        self.__exit__()
        signal.raise_signal(number)
