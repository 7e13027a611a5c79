"""A cache on this host's disk of weight files in object storage, in blocks: the host's ranks fetch each byte once.

A block is a file with a checksum at its end; a rename makes it visible. One process at a time fetches it. Any OSError
of the cache (usually a full disk) is a warning: the load continues with ranged reads that bypass the cache.
"""

from __future__ import annotations

import logging
import os
import shutil
import threading
import uuid
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from trainer.model.files.fetch import cache_folder
from trainer.storage.host_cache import make_own
from trainer.storage.locks import hold_folder, locked, remove_unused

log = logging.getLogger(__name__)

BLOCK = 4 * 2**20
KEPT_FREE_SHARE, KEPT_FREE_BYTES = 0.05, 10 * 2**30
"""The space that is left free on the disk: the smaller of the two."""
_STRIPES = 64
_CHECKSUM = 4

Fetch = Callable[[int, int], bytes]


class BlockCache:
    """The blocks of one model version's files in ``folder``, shared by all processes of the host. Thread-safe."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.given_up = False
        self._lock = threading.Lock()
        self._held: int | None = None
        with self._tolerant():
            make_own(folder.parent)
            self._held = hold_folder(folder)
            os.utime(folder)  # `make_room` removes the folder with the oldest mtime first

    def close(self) -> None:
        """Releases the folder. Its blocks stay until another model needs the space."""
        if self._held is not None:
            os.close(self._held)
            self._held = None

    def want(self, file: str, index: int, size: int, fetch: Fetch) -> None:
        """Fetches the block if this host does not have it; a block that is present is not read."""
        with suppress(OSError):
            stored = (self.folder / f"{file}.{index}").stat().st_size
            if stored == min(size, (index + 1) * BLOCK) - index * BLOCK + _CHECKSUM:
                return
        self.get(file, index, size, fetch)

    def get(self, file: str, index: int, size: int, fetch: Fetch) -> bytes | None:
        """Returns block ``index`` of a file of ``size`` bytes; None when the cache has been given up.

        ``fetch(start, stop)`` is called when no process of this host has stored the block."""
        if self.given_up:
            return None
        start = index * BLOCK
        stop = min(size, start + BLOCK)
        path = self.folder / f"{file}.{index}"
        found = None
        with self._tolerant():
            found = _read(path, stop - start)
        if found is not None or self.given_up:
            return found
        with self._alone(path.name):
            return self._fetched(path, start, stop, fetch)

    def _fetched(self, path: Path, start: int, stop: int, fetch: Fetch) -> bytes:
        with self._tolerant():
            found = _read(path, stop - start)  # another process may have been first
            if found is not None:
                return found
        raw = fetch(start, stop)
        with self._tolerant():
            self._store(path, raw)
        return raw

    def _store(self, path: Path, raw: bytes) -> None:
        if self.given_up:
            return
        make_room(self.folder, len(raw))
        partial = path.with_name(f".{uuid.uuid4().hex}")
        try:
            with open(partial, "wb") as file:
                file.write(raw)
                file.write(zlib.crc32(raw).to_bytes(_CHECKSUM, "little"))
            os.replace(partial, path)
        except OSError:
            partial.unlink(missing_ok=True)
            raise

    @contextmanager
    def _alone(self, name: str) -> Iterator[None]:
        """Holds the block's lock: one thread of one process at a time. No effect where file locks do not work."""
        with ExitStack() as held:
            with self._tolerant():
                held.enter_context(locked(self.folder / f"lock-{zlib.crc32(name.encode()) % _STRIPES}"))
            yield

    @contextmanager
    def _tolerant(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            with self._lock:
                warned, self.given_up = self.given_up, True
            if not warned:
                log.warning(
                    "the weights cannot be cached in %s (%s), so each rank reads its own from their source; set "
                    "MUSTER_CACHE to a writable folder with free space",
                    self.folder,
                    error,
                )


def weights_root() -> Path:
    return cache_folder() / "weights"


def make_room(folder: Path, size: int) -> None:
    """Removes the blocks of unused models, least recently used first; raises OSError when that is not enough."""
    if _has_room(folder, size):
        return
    for other in sorted((f for f in folder.parent.iterdir() if f != folder and f.is_dir()), key=_last_used):
        remove_unused(other)
        if _has_room(folder, size):
            return
    raise OSError(f"less than {KEPT_FREE_SHARE:.0%} of the disk of {folder} would be left free")


def _has_room(folder: Path, size: int) -> bool:
    disk = shutil.disk_usage(folder)
    return disk.free - size >= min(KEPT_FREE_SHARE * disk.total, KEPT_FREE_BYTES)


def _last_used(folder: Path) -> float:
    try:
        return folder.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _read(path: Path, size: int) -> bytes | None:
    """Returns the block's bytes, None when it is not stored. A damaged block is deleted."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return None
    body, checksum = raw[:-_CHECKSUM], raw[-_CHECKSUM:]
    if len(body) == size and zlib.crc32(body).to_bytes(_CHECKSUM, "little") == checksum:
        return body
    log.warning("%s is damaged and is fetched again", path)
    path.unlink(missing_ok=True)
    return None
