"""An HTTP service next to an inference server that takes adapters, so that the server needs no shared folder.

| request | does |
|---|---|
| ``GET /muster`` | returns the server's port and state (`HostState`) |
| ``PUT /adapters/NAME`` | stores an adapter; ``Muster-Files`` has the name and size of each file in the body |
| ``DELETE /adapters/NAME`` | removes it |

Every request needs the server's key. An adapter is complete or absent: its files come in one request, into a hidden
folder that gets its name once all bytes have arrived.
"""

from __future__ import annotations

import errno
import hmac
import json
import os
import re
import shutil
import socket
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from trainer.inference.exchange import Address

STATE, ADAPTERS, FILES = "/muster", "/adapters/", "Muster-Files"
MARK = "muster"
"""A key of every answer, by which a client knows a receiver."""
MOST_BYTES = 2**35
NEWEST = 16
"""Adapters that are kept; older ones belong to attempts that have ended without removing them."""
HEADERS_S, SILENCE_S, UPLOAD_S = 30.0, 60.0, 3600.0
LINGER_S = 10.0
_PIECE_BYTES = 2**20
_SAFE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
# No other file is read as an adapter without running code that it contains.
_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}\.(safetensors|json)")


class Refused(Exception):
    """A request that is not served. ``status``: of the answer."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class AdapterFolder:
    """The adapters that were sent to this host. Thread-safe."""

    def __init__(self, folder: Path, most_bytes: int = MOST_BYTES, newest: int = NEWEST) -> None:
        self.folder, self._most_bytes, self._newest = folder.absolute(), most_bytes, newest
        self.folder.mkdir(parents=True, exist_ok=True)
        self._changing = threading.Lock()

    def store(self, name: str, files: Sequence[tuple[str, int]], read: Callable[[int], bytes]) -> Path:
        """Stores the files, whose bytes ``read(most)`` returns one after the other (empty at the end); returns the
        adapter's folder. An adapter of that name that is there already stays: a name stands for one set of weights."""
        target = self._path(name)
        self._check(files)
        part = Path(tempfile.mkdtemp(prefix=".part-", dir=self.folder))
        try:
            for file, size in files:
                _copy(part / file, size, read)
            with self._changing:
                if not target.exists():
                    part.rename(target)
                there = [path for path in self.folder.iterdir() if not path.name.startswith(".")]
                there.sort(key=lambda path: path.stat().st_mtime)
                for old in there[: -self._newest]:
                    shutil.rmtree(old, ignore_errors=True)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise Refused(507, f"{self._where()} has no room for the adapter {name}: {error.strerror}") from error
            raise
        finally:
            shutil.rmtree(part, ignore_errors=True)
        return target

    def remove(self, name: str) -> None:
        with self._changing:
            shutil.rmtree(self._path(name), ignore_errors=True)

    def _path(self, name: str) -> Path:
        if not _SAFE.fullmatch(name):
            raise Refused(400, f"{name[:100]!r} is no name of an adapter: letters, digits, dots, - and _ only")
        return self.folder / name

    def _check(self, files: Sequence[tuple[str, int]]) -> None:
        names = [name for name, _ in files]
        if not names or len(set(names)) < len(names):
            raise Refused(400, "an adapter has one file or more, each once")
        if wrong := [name for name in names if not _FILE.fullmatch(name)]:
            raise Refused(400, f"{wrong[0][:100]!r} is no file of an adapter: NAME.safetensors or NAME.json")
        size, free = sum(size for _, size in files), shutil.disk_usage(self.folder).free
        if size > self._most_bytes:
            raise Refused(413, f"the adapter has {size} bytes, and {self._most_bytes} are the most")
        if size > free:
            raise Refused(507, f"{self._where()} has {free} bytes free, and the adapter has {size}")

    def _where(self) -> str:
        return f"{self.folder} on {os.uname().nodename}"


def _copy(path: Path, size: int, read: Callable[[int], bytes]) -> None:
    with path.open("xb") as file:
        while size:
            piece = read(min(size, _PIECE_BYTES))
            if not piece:
                raise Refused(400, f"{path.name} ended {size} bytes too early")
            file.write(piece)
            size -= len(piece)


class AdapterReceiver:
    """The service, in threads of this process, from `start` to `close`. ``state`` returns what ``GET /muster`` says."""

    def __init__(
        self, host: str, port: int, api_key: str, adapters: AdapterFolder, state: Callable[[], Mapping[str, Any]]
    ) -> None:
        receiver = self

        class Handler(_Handler):
            of = receiver

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
            request_queue_size = 128

            def handle_error(self, request: Any, client_address: Any) -> None:
                """Logs nothing: a client may go away at any time."""

        self.api_key, self.adapters, self.state = api_key, adapters, state
        self._host = own_address() if host in ("0.0.0.0", "::") else host
        self._server = Server((host, port), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.1,), daemon=True, name="receiver")

    @property
    def address(self) -> str:
        return str(Address("http", self._host, int(self._server.server_address[1]), ""))

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        if self._thread.is_alive():
            self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    of: AdapterReceiver
    timeout = SILENCE_S
    _limiter: threading.Timer | None = None
    _left = 0

    def setup(self) -> None:
        super().setup()
        self._limit(HEADERS_S)

    def finish(self) -> None:
        if self._limiter is not None:
            self._limiter.cancel()
        super().finish()

    def do_GET(self) -> None:
        self._serve(self._get)

    def do_PUT(self) -> None:
        self._serve(self._put)

    def do_DELETE(self) -> None:
        self._serve(self._delete)

    def log_message(self, format: str, *args: Any) -> None:
        """Paths are logged nowhere."""

    def _limit(self, seconds: float) -> None:
        """Ends the connection after so many seconds, however slowly bytes come."""
        if self._limiter is not None:
            self._limiter.cancel()
        self._limiter = threading.Timer(seconds, self._cut)
        self._limiter.daemon = True
        self._limiter.start()

    def _cut(self) -> None:
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def _serve(self, answer: Callable[[], Mapping[str, Any]]) -> None:
        try:
            self._left = max(0, int(self.headers.get("Content-Length") or 0))
            if not hmac.compare_digest(
                self.headers.get("Authorization", "").encode(), f"Bearer {self.of.api_key}".encode()
            ):
                raise Refused(401, "the key is missing or wrong")
            status, value = 200, dict(answer())
        except Refused as refused:
            status, value = refused.status, _message(str(refused))
        except ValueError as error:
            status, value = 400, _message(f"the request cannot be read: {error}")
        except TimeoutError:
            status, value = 408, _message(f"nothing came for {SILENCE_S:.0f} s")
        except OSError as error:
            status, value = 500, _message(f"{type(error).__name__}: {error}")
        self._send(status, {MARK: 1, **value})

    def _get(self) -> Mapping[str, Any]:
        if self.path != STATE:
            raise Refused(404, f"there is no {self.path[:100]}")
        return self.of.state()

    def _put(self) -> Mapping[str, Any]:
        files = _files(self.headers.get(FILES, ""))
        if sum(size for _, size in files) != self._left:
            raise Refused(400, f"the body has {self._left} bytes, and {FILES} has others")
        self._limit(UPLOAD_S)
        return {"folder": str(self.of.adapters.store(self._name(), files, self._read))}

    def _delete(self) -> Mapping[str, Any]:
        self.of.adapters.remove(self._name())
        return {}

    def _name(self) -> str:
        if not self.path.startswith(ADAPTERS):
            raise Refused(404, f"there is no {self.path[:100]}")
        return self.path.removeprefix(ADAPTERS)

    def _read(self, most: int) -> bytes:
        piece: bytes = self.rfile.read1(min(most, self._left))
        self._left -= len(piece)
        return piece

    def _send(self, status: int, value: Mapping[str, Any]) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
        self.wfile.flush()
        # A connection that is closed with unread bytes is reset, and the answer may be lost with it.
        self._limit(LINGER_S)
        while self._left and self._read(_PIECE_BYTES):
            pass


def _files(text: str) -> list[tuple[str, int]]:
    """Raises Refused for anything but a list of names and sizes."""
    with suppress(ValueError, TypeError, RecursionError):
        files = [(name, size) for name, size in json.loads(text)]
        if all(isinstance(name, str) and type(size) is int and size >= 0 for name, size in files):
            return files
    raise Refused(400, f"{FILES} is no list of names and sizes")


def _message(text: str) -> dict[str, Any]:
    return {"error": {"message": text}}


def own_address() -> str:
    """Returns the address by which other hosts reach this one; that of the loopback without a network."""
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # sends nothing: only the route is looked up
        return str(probe.getsockname()[0])
    return "127.0.0.1"
