"""One request to a server over HTTP, within times that are enforced here.

A server that accepts a connection and never answers, or that sends a byte now and then, would hold a socket's own
time-out open for ever. Each request has a connection of its own: uvicorn closes idle ones after 5 s.
"""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from trainer.errors import InputError
from trainer.redact import redact
from trainer.storage.backend import Moved, NoAnswer
from trainer.storage.limit import limited

LARGEST_BYTES = 2**28
"""A larger answer is refused; a text of 100,000 tokens needs a twentieth of it."""
_SHOWN_CHARACTERS = 600
KEEPALIVE = {"TCP_KEEPIDLE": 15, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}
"""Seconds of silence before the first probe of a connection, between probes, and the probes without an answer."""


class NotAnswered(Exception):
    """The connection failed, or no complete answer came in time."""


class Answer(NamedTuple):
    status: int
    body: bytes

    @property
    def words(self) -> str:
        """The server's explanation of an error, or the beginning of what it sent."""
        text = self.body.decode("utf-8", "replace")
        with suppress(ValueError, TypeError, KeyError, RecursionError):
            text = str(json.loads(text)["error"]["message"])
        return redact(text.strip()[:_SHOWN_CHARACTERS])


@dataclass(frozen=True)
class Address:
    """The address of a server: ``http://host:port``, with a path in front of the interface's own if there is one."""

    scheme: str
    host: str
    port: int | None
    prefix: str

    @classmethod
    def of(cls, url: str) -> Address:
        """Raises InputError for anything but the address of an HTTP server."""
        with suppress(ValueError):
            parts = urlsplit(url)
            plain = not (parts.query or parts.fragment or parts.username or parts.password)
            if parts.scheme in ("http", "https") and parts.hostname and plain:
                prefix = parts.path.rstrip("/").removesuffix("/v1")
                return cls(parts.scheme, parts.hostname, parts.port, prefix)
        raise InputError(f"{redact(url)!r} is not the address of an inference server; write http://host:port")

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}{f':{self.port}' if self.port else ''}{self.prefix}"


class Upload(NamedTuple):
    """Bytes that are sent as they are. ``size``: how many; ``pieces``: called for each attempt; ``headers``: what
    describes them."""

    size: int
    pieces: Callable[[], Iterator[bytes]]
    headers: Mapping[str, str]


def exchange(
    address: Address,
    method: str,
    path: str,
    body: Any = None,
    *,
    upload: Upload | None = None,
    headers: Mapping[str, str],
    connect_s: float,
    answer_s: float,
) -> Answer:
    """Sends ``body`` as JSON, or an ``upload``. Returns the server's answer, whatever its status. Raises NotAnswered
    without a complete one: after ``connect_s`` without a connection, or ``answer_s`` after the request."""
    kind = http.client.HTTPSConnection if address.scheme == "https" else http.client.HTTPConnection
    connection = kind(address.host, address.port, timeout=connect_s)
    sent = None if body is None else json.dumps(body).encode()
    own = {"Connection": "close", **({} if sent is None else {"Content-Type": "application/json"})}
    if upload is not None:
        own |= {"Content-Length": str(upload.size), **upload.headers}

    connected: list[socket.socket] = []  # the connection forgets its socket once an answer has begun

    def ask(moved: Moved) -> Answer:
        connection.connect()
        connected.append(connection.sock)
        _notice_dead_hosts(connection.sock)
        connection.sock.settimeout(answer_s)
        content = sent if upload is None else _moving(upload.pieces(), moved)
        # A server that refuses an upload answers before it has read it, and may then close the connection.
        refused_early = () if upload is None else (BrokenPipeError, ConnectionResetError)
        with suppress(*refused_early):
            connection.request(method, address.prefix + path, content, {**own, **headers})
        moved()
        response = connection.getresponse()
        return Answer(response.status, response.read(LARGEST_BYTES))

    try:
        answer = limited(ask, connect_s + answer_s)
    except NoAnswer:
        raise NotAnswered(f"no complete answer within {answer_s:g} s") from None
    except TimeoutError:
        waited, within_s = ("answer", answer_s) if connected else ("connection", connect_s)
        raise NotAnswered(f"no {waited} within {within_s:g} s") from None
    except (OSError, http.client.HTTPException) as error:
        raise NotAnswered(f"{type(error).__name__}: {error}") from error
    finally:
        for held in connected:
            with suppress(OSError, ValueError):  # wakes the thread that may still be waiting for it
                held.shutdown(socket.SHUT_RDWR)
        connection.close()
    if len(answer.body) == LARGEST_BYTES:
        raise NotAnswered(f"an answer of {LARGEST_BYTES} bytes or more")
    return answer


def _moving(pieces: Iterator[bytes], moved: Moved) -> Iterator[bytes]:
    for piece in pieces:
        moved()
        yield piece


def _notice_dead_hosts(connection: socket.socket) -> None:
    """A host without power answers nothing: without probes, a request to it would wait for its whole time."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEPALIVE.items():
        if hasattr(socket, name):  # not on every system
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
