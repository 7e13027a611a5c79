"""Stores that fail on purpose: one in memory, behind `Storage`; one in front of a real S3 server, behind HTTP."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from trainer.storage import ObjectInfo, Retry, Storage
from trainer.storage.backend import Entries, Listing, Moved, Transient


class Died(BaseException):
    """The process was killed here: no handler of the code under test may stop it."""


class FaultyBackend:
    """Objects in a dict. ``before`` and ``after`` are called with (verb, path) around each operation; what they raise
    is what the caller sees, with the effect not yet, or already, there."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.reconnects = 0
        self.before: Callable[[str, str], None] = lambda verb, path: None
        self.after: Callable[[str, str], None] = lambda verb, path: None
        self._lock = threading.Lock()

    @contextmanager
    def _operation(self, verb: str, path: str) -> Iterator[None]:
        self.before(verb, path)
        with self._lock:
            yield
        self.after(verb, path)

    def read(self, path: str) -> bytes:
        with self._operation("read", path):
            return self._get(path)

    def read_range(self, path: str, start: int, stop: int) -> bytes:
        with self._operation("read", path):
            return self._get(path)[start:stop]

    def write(self, path: str, data: bytes) -> None:
        with self._operation("put", path):
            self.objects[path] = data

    def create(self, path: str, data: bytes) -> None:
        with self._operation("put", path):
            if path in self.objects:
                raise FileExistsError(path)
            self.objects[path] = data

    def upload(self, path: str, source: str, moved: Moved) -> None:
        with open(source, "rb") as file:
            self.write(path, file.read())

    def list(self, path: str, moved: Moved) -> Listing:
        with self._operation("list", path):
            lead = path + "/"
            found = [(p[len(lead) :], d) for p, d in self.objects.items() if p.startswith(lead)]
            return [ObjectInfo(key, len(data), f"{hash(data):x}", 0.0) for key, data in found]

    def entries(self, path: str) -> Entries:
        found = self.list(path, lambda: None)
        folders = {info.key.split("/")[0] for info in found if "/" in info.key}
        return Entries([info for info in found if "/" not in info.key], sorted(folders))

    def info(self, path: str) -> ObjectInfo | None:
        with self._operation("read", path):
            return ObjectInfo(path, len(self.objects[path]), "tag", 0.0) if path in self.objects else None

    def delete(self, path: str) -> None:
        with self._operation("delete", path):
            self.objects.pop(path, None)

    def abort_uploads(self, path: str, stale: Callable[[str], bool]) -> int:
        with self._operation("list", path):
            return 0

    def remove_empty_folders(self, path: str) -> None: ...

    def reconnect(self) -> None:
        self.reconnects += 1

    def _get(self, path: str) -> bytes:
        if path not in self.objects:
            raise FileNotFoundError(path)
        return self.objects[path]


def faulty(deadline_s: float = 120.0) -> tuple[Storage, FaultyBackend]:
    """A storage over a `FaultyBackend`, whose retries cost no time."""
    backend, now = FaultyBackend(), [0.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    return Storage("faulty://run", backend, Retry(deadline_s, clock=lambda: now[0], sleep=sleep)), backend


def times(count: int, error: BaseException, verb: str = "") -> Callable[[str, str], None]:
    """A hook that raises ``error`` for the first ``count`` operations (of ``verb``)."""
    left = [count]

    def hook(operation: str, path: str) -> None:
        if left[0] and operation.startswith(verb):
            left[0] -= 1
            raise error

    return hook


def unreachable(verb: str, path: str) -> None:
    raise Transient("connection refused")


def unreadable(monkeypatch: pytest.MonkeyPatch, folder: Path, number: int, times: int = 10**6) -> None:
    """Looking into ``folder`` fails with this errno, as without permission or while a file server is away."""
    scandir, left = os.scandir, itertools.repeat(None, times)

    def look(path: Any = ".") -> Any:
        if os.fspath(path) == str(folder) and next(left, ...) is None:
            raise OSError(number, os.strerror(number), str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", look)


class FlakyServer:
    """Forwards HTTP to ``target``, except for the next ``left`` requests of ``method``, which meet ``fault``:

    503        answered so, not forwarded          reset      connection reset, not forwarded
    lost       forwarded, then reset               truncated  forwarded, the reply cut in the middle of its body
    hang       taken, and never answered, not even with the "100 Continue" that a PUT waits for before it sends its body
    """

    def __init__(self, target: str) -> None:
        self.fault, self.method, self.left = "", "", 0
        self.target = urlsplit(target).netloc
        self.lock = threading.Lock()
        self.met = 0
        self.closed = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self._thread.start()

    def inject(self, fault: str, method: str, count: int = 1) -> None:
        with self.lock:
            self.fault, self.method, self.left, self.met = fault, method, count, 0

    def close(self) -> None:
        self.closed.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _next_fault(self, method: str) -> str:
        with self.lock:
            if not self.left or method != self.method:
                return ""
            self.left -= 1
            self.met += 1
            return self.fault

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        flaky = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_one_request(self) -> None:
                with contextlib.suppress(ConnectionError):
                    super().handle_one_request()

            def log_message(self, format: str, *args: Any) -> None:
                pass

            def handle_expect_100(self) -> bool:
                if flaky.fault == "hang" and flaky._next_fault(self.command):
                    flaky.closed.wait()
                    return False
                return super().handle_expect_100()

            def _serve(self) -> None:
                fault = flaky._next_fault(self.command)
                if fault == "hang":
                    flaky.closed.wait()
                    return
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                if fault == "503":
                    self.send_response(503)
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                elif fault == "reset":
                    self._reset()
                else:
                    self._forward(body, fault)

            def _forward(self, body: bytes, fault: str) -> None:
                upstream = http.client.HTTPConnection(flaky.target, timeout=30)
                upstream.request(self.command, self.path, body, dict(self.headers.items()))
                reply = upstream.getresponse()
                data = reply.read()
                if fault == "lost":
                    self._reset()
                    return
                self.send_response_only(reply.status)
                for name, value in reply.getheaders():
                    if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                        self.send_header(name, value)
                size = reply.getheader("Content-Length") if self.command == "HEAD" else str(len(data))
                self.send_header("Content-Length", size or "0")
                self.end_headers()
                self.wfile.write(data[: len(data) // 2] if fault == "truncated" else data)
                self.close_connection = self.close_connection or fault == "truncated"

            def _reset(self) -> None:
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()
                self.close_connection = True

            do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _serve

        return Handler
