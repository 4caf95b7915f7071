"""Requests to the Hub that have a time limit, announce a long wait, and fail at once if there is no network.

The Hub's client waits forever after some failures, and tries again for most of a minute if there is no network.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import ssl
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent import futures
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
"""Seconds without data from the server after which a request fails; the variable TIMM_NRPM_TIMEOUT overrides it."""

CONTACT = 5.0
"""Seconds within which a server must accept a connection, and answer the first question that this process asks it."""

REMEMBERED = 10.0
"""Seconds for which a server that let that time pass is not asked again, so that nobody waits anew for each file."""

OFFLINE = "HF_HUB_OFFLINE=1 in the environment reads the cache alone, without the network"
"""Advice on working offline, as a part of messages."""

SILENCE = 2.0
"""Seconds of waiting after which a message names the server."""

NO_ROUTE = (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN, errno.EHOSTDOWN)
"""Error numbers by which the operating system reports that there is no network."""

logger = logging.getLogger("timm_nrpm")


class NoNetwork(OfflineModeIsEnabled):
    """No connection could be made, and trying again at once would not help.

    After an error of this class the client reads from its cache, as in its offline mode.
    """


class NoAnswer(Exception):
    """A server does not answer the first question that it is asked; the message says for how long."""


def why_no_network(error: BaseException) -> str | None:
    """Why a server is out of reach (unknown host, refusal, no route, or silence); None for any other error."""
    if isinstance(error, NoAnswer):
        return str(error)
    if not isinstance(error, (HTTP.ConnectError, HTTP.ConnectTimeout)):
        return None
    reason: BaseException | None = error
    while reason is not None:
        if isinstance(reason, HTTP.ConnectTimeout):
            return f"no connection within {CONTACT:g} seconds"
        refused = isinstance(reason, (socket.gaierror, ConnectionRefusedError, ssl.SSLCertVerificationError))
        if refused or (isinstance(reason, OSError) and reason.errno in NO_ROUTE):
            return str(getattr(reason, "strerror", None) or reason)
        reason = reason.__cause__ or reason.__context__
    return None


def network_error_of(error: BaseException | None) -> NoNetwork | None:
    """The :class:`NoNetwork` that caused an error, directly or through other errors; None if there is none."""
    while error is not None and not isinstance(error, NoNetwork):
        error = error.__cause__ or error.__context__
    return error


def limit() -> float:
    """Time limit of a request in seconds: TIMM_NRPM_TIMEOUT, or else `PATIENCE`."""
    given = os.environ.get("TIMM_NRPM_TIMEOUT", str(PATIENCE))
    try:
        return float(given)
    except ValueError as error:
        raise ValueError(f"TIMM_NRPM_TIMEOUT={given!r} is no number of seconds.") from error


_lock = threading.Lock()
_patient: list[Any] = []
_changed: list[tuple[Any, Any]] = []
_answered: set[bytes] = set()
_silent_since: dict[bytes, float] = {}
_unreachable: dict[bytes, tuple[float, str]] = {}


@contextmanager
def patience() -> Iterator[None]:
    """Give the Hub's requests a time limit, announce long waits, and stop retries if there is no network.

    The client that all functions of the Hub's library share has no time limit of its own. The library may replace that
    client, and the new one gets a limit when this context is next entered.
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
            while not _patient and _changed:  # the last context to end restores the clients
                client, before = _changed.pop()
                client.timeout = before
                del client.send


def _send(send: Callable[..., Any], request: Any, **options: Any) -> Any:
    """Send a request with a limit on connecting, a message about a long wait, and one error for a missing network."""
    limits, host, server = request.extensions.get("timeout"), request.url.host, request.url.netloc
    if limits:
        limits["connect"] = min(limits.get("connect") or CONTACT, CONTACT)
    start, (until, message) = time.monotonic(), _unreachable.get(server, (0.0, ""))
    if start < until:
        raise NoNetwork(message)
    silent = _silence_before(server, start)
    timer = threading.Timer(SILENCE, say, [f"Waiting for an answer from {host} ..."])
    timer.daemon = True
    if request.method != "PUT":  # which is an upload with a progress bar
        timer.start()
    first = server not in _answered and request.method in ("GET", "HEAD")  # others may send for longer than that
    try:
        response = _first_answer(send, request, options, silent) if first else send(request, **options)
        _answered.add(server)
        _silent_since.pop(server, None)
        return response
    except Exception as error:
        # The client asks some questions with a shorter limit of its own and goes on without an answer.
        if first and isinstance(error, HTTP.ReadTimeout):
            _silent_since.setdefault(server, start)
        else:
            _silent_since.pop(server, None)
        reason = why_no_network(error)
        if reason is None:
            raise
        message = f"{host} cannot be reached: {reason}"
        if silent + time.monotonic() - start > SILENCE:
            _unreachable[server] = time.monotonic() + REMEMBERED, message
        raise NoNetwork(message) from None
    finally:
        timer.cancel()


def _silence_before(server: bytes, now: float) -> float:
    """Seconds since a server did not answer its first question; 0 if it was asked nothing, or long ago."""
    silent = now - _silent_since.get(server, now)
    if silent > REMEMBERED:
        _silent_since.pop(server, None)
        return 0.0
    return silent


def _first_answer(send: Callable[..., Any], request: Any, options: Mapping[str, Any], silent: float) -> Any:
    """Send a request, and return its response if the head of that arrives in time; its body may take longer.

    The request is sent by another thread, since the look-up of a name has no time limit of its own. The time
    limit counts the `silent` seconds for which an earlier question waited in vain, and leaves one second at least.

    Raises:
        NoAnswer: It does not arrive in time.
    """
    answer: futures.Future[Any] = futures.Future()

    def ask() -> None:
        try:
            answer.set_result(send(request, **{**options, "stream": True}))
        except BaseException as error:
            answer.set_exception(error)

    seconds = limit() if "TIMM_NRPM_TIMEOUT" in os.environ else CONTACT
    threading.Thread(target=ask, daemon=True).start()
    futures.wait([answer], max(seconds - silent, min(seconds, 1.0)))
    if not answer.done():
        raise NoAnswer(f"no answer within {seconds:g} seconds (TIMM_NRPM_TIMEOUT={PATIENCE:g} waits longer)")
    response = answer.result()
    if not options.get("stream"):
        response.read()
    return response


def say(text: str) -> None:
    """Print a message if standard error is a terminal, and log it otherwise."""
    if sys.stderr is not None and sys.stderr.isatty() and not are_progress_bars_disabled():
        tqdm.write(text, file=sys.stderr)  # beside a progress bar
    else:
        logger.info(text)
