"""The bytes that a reader reads: an object's own, by ranged reads, or the decompressed bytes of a compressed object.

A compressed object can only be read from its beginning. It is decompressed into a temporary file, up to the highest
position that was requested, and read by ranges from there. So memory stays bounded, and a process that returns to an
object need not decompress it again.
"""

from __future__ import annotations

import io
import tempfile
import threading
from collections import OrderedDict
from typing import Any, Protocol

import pyarrow as pa

from trainer.errors import InputError
from trainer.storage import Storage

SPAN_BYTES = 2 << 20
UNPACKED_SPAN_BYTES = 16 << 20
"""The span of a compressed object. It is larger, since each process that reads a span unpacks all bytes before it."""

UNPACKED_BYTES = 8 << 30
"""Disk space for the unpacked objects that a process keeps, the last used ones. A larger one is kept on its own."""

_CHUNK = 1 << 20


class Body(Protocol):
    """Bytes that can be read by ranges. ``url`` names them in messages; ``span_bytes`` is the size of a span."""

    url: str
    span_bytes: int

    def clip(self, position: int) -> int:
        """Returns the smaller of the position and the body's size. A compressed body is unpacked up to that
        position."""
        ...

    def read(self, start: int, stop: int) -> bytes:
        """Returns bytes [start, stop), fewer only at the end of the body."""
        ...


class ObjectBody:
    def __init__(self, storage: Storage, key: str, size: int, span_bytes: int = SPAN_BYTES) -> None:
        self.url, self.size, self.span_bytes = f"{storage.url}/{key}", size, span_bytes
        self._storage, self._key = storage, key

    def clip(self, position: int) -> int:
        return min(position, self.size)

    def read(self, start: int, stop: int) -> bytes:
        return self._storage.read_range(self._key, min(start, self.size), self.clip(stop))


class UnpackedBody:
    """A compressed body, unpacked into an unnamed temporary file. Thread-safe."""

    def __init__(self, packed: Body, codec: str, span_bytes: int = UNPACKED_SPAN_BYTES) -> None:
        self.url, self.size, self.span_bytes = packed.url, 0, span_bytes
        raw = io.BufferedReader(RangedFile(packed), _CHUNK)
        self._stream = pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), codec)
        self._file = tempfile.TemporaryFile(prefix="muster-unpacked-")  # noqa: SIM115 (open as long as this object)
        self._whole = False
        self._lock = threading.Lock()

    def clip(self, position: int) -> int:
        with self._lock:
            self._file.seek(0, io.SEEK_END)
            while self.size < position and not self._whole:
                self._unpack()
            return min(position, self.size)

    def read(self, start: int, stop: int) -> bytes:
        stop = self.clip(stop)
        with self._lock:
            self._file.seek(start)
            return self._file.read(max(stop - start, 0))

    def _unpack(self) -> None:
        try:
            chunk = self._stream.read(_CHUNK)
        except OSError as error:
            raise InputError(f"{self.url}: cannot be unpacked, {self.size} bytes in ({error})") from error
        self._file.write(chunk)
        self.size += len(chunk)
        self._whole = not chunk


class RangedFile(io.RawIOBase):
    """A body as a seekable file. Each read is a ranged read."""

    def __init__(self, body: Body) -> None:
        self._body, self._at = body, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at}.get(whence)
        self._at = (self._body.clip(1 << 62) if base is None else base) + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        body = self._body.read(self._at, self._at + len(buffer))
        buffer[: len(body)] = body
        self._at += len(body)
        return len(body)


_kept: OrderedDict[tuple[str, str], UnpackedBody] = OrderedDict()
_kept_lock = threading.Lock()


def unpacked(packed: Body, codec: str, etag: str) -> Body:
    """Returns the unpacked body; the same object again while this process keeps it. Thread-safe."""
    key = (packed.url, etag)
    with _kept_lock:
        body = _kept.pop(key, None) or UnpackedBody(packed, codec)
        while _kept and sum(b.size for b in (body, *_kept.values())) > UNPACKED_BYTES:
            _kept.popitem(last=False)  # its file is deleted with the last reader that uses it
        _kept[key] = body
    return body
