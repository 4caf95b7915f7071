"""Requests to the Hub: with a limit, a word about a long wait, and an end where there is no network.

The Hub's client waits for ever on some failures, and tries again for most of a minute where there is no network.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import ssl
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from typing import Any, TypeVar

from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import are_progress_bars_disabled, get_session, tqdm

Result = TypeVar("Result")

HTTP: Any = import_module(HTTPError.__module__.partition(".")[0])
"""The HTTP library of the Hub's client, whose errors its functions raise: httpx, or httpx2 in its later versions."""

PATIENCE = 60.0
"""Seconds without a sign of the server after which a request has failed; TIMM_NRPM_TIMEOUT gives another number."""

CONNECT = 10.0
"""Seconds that a connection may take."""

SILENCE = 2.0
"""Seconds of waiting after which it is said what for."""

NO_ROUTE = (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN, errno.EHOSTDOWN)
"""What the operating system says of a network that is not there."""

logger = logging.getLogger("timm_nrpm")


class NoNetwork(OfflineModeIsEnabled):
    """No connection could be made, and trying again at once would not help.

    The client takes what is in its cache after an error of this kind, as in its offline mode.
    """


def why_no_network(error: BaseException) -> str | None:
    """Why no connection could be made: an unknown name, a refusal, no route; None for any other error."""
    if not isinstance(error, (HTTP.ConnectError, HTTP.ConnectTimeout)):
        return None
    reason: BaseException | None = error
    while reason is not None:
        if isinstance(reason, HTTP.ConnectTimeout):
            return f"no connection within {CONNECT:g} seconds"
        refused = isinstance(reason, (socket.gaierror, ConnectionRefusedError, ssl.SSLCertVerificationError))
        if refused or (isinstance(reason, OSError) and reason.errno in NO_ROUTE):
            return str(getattr(reason, "strerror", None) or reason)
        reason = reason.__cause__ or reason.__context__
    return None


def network_error_of(error: BaseException | None) -> NoNetwork | None:
    """The missing network behind an error, if that is why."""
    while error is not None and not isinstance(error, NoNetwork):
        error = error.__cause__ or error.__context__
    return error


def limit() -> float:
    """Seconds without a sign of the server after which a request has failed."""
    given = os.environ.get("TIMM_NRPM_TIMEOUT", str(PATIENCE))
    try:
        return float(given)
    except ValueError as error:
        raise ValueError(f"TIMM_NRPM_TIMEOUT={given!r} is no number of seconds.") from error


_lock = threading.Lock()
_patient: list[Any] = []
_changed: list[tuple[Any, Any]] = []


@contextmanager
def patience() -> Iterator[None]:
    """No request waits for ever, or for long without a word, and none is tried again where there is no network.

    The client that all of the Hub's functions share has no limit of its own. They may make a new one, which has a limit
    from the next request of ours.
    """
    client = get_session()
    with _lock:
        _patient.append(client)
        if "send" not in vars(client):
            _changed.append((client, client.timeout))
            client.send = partial(_send, client.send)  # type: ignore[method-assign]
        client.timeout = limit()
    try:
        yield
    finally:
        with _lock:
            _patient.pop()
            while not _patient and _changed:  # the last to leave puts back what was there at first
                client, before = _changed.pop()
                client.timeout = before
                del client.send


def _send(send: Callable[..., Result], request: Any, **options: Any) -> Result:
    """What the client sends: with a limit on connecting, a word about a long wait, and one error without network."""
    limits = request.extensions.get("timeout")
    if limits:
        limits["connect"] = min(limits.get("connect") or CONNECT, CONNECT)
    host = request.url.host
    timer = threading.Timer(SILENCE, say, [f"Waiting for an answer of {host} ..."])
    timer.daemon = True
    if request.method != "PUT":  # an upload, which has a progress bar
        timer.start()
    try:
        return send(request, **options)
    except Exception as error:
        why = why_no_network(error)
        if why is None:
            raise
        raise NoNetwork(f"{host} cannot be reached: {why}") from None
    finally:
        timer.cancel()


def say(text: str) -> None:
    """Tell whoever sits at the terminal what is waited for; elsewhere it is logged."""
    if sys.stderr is not None and sys.stderr.isatty() and not are_progress_bars_disabled():
        tqdm.write(text, file=sys.stderr)  # beside a progress bar
    else:
        logger.info(text)
