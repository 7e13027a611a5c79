"""A cache of blocks of remote objects in a folder of this host's disk, shared by its ranks: each is fetched once.

A block is a file. A rename makes it visible, and it is checked whenever it is read. An OSError of the cache, such as a
full disk, is a warning, and the caller continues without the cache.
"""

from __future__ import annotations

import logging
import os
import threading
import uuid
import weakref
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path

from trainer.storage.locks import hold_folder, locked

log = logging.getLogger(__name__)

FREE_SHARE = 0.05
"""The share of the disk that caches leave free."""
_STRIPES = 64


class BlockCache:
    """Blocks in ``folder``, which is marked as in use until `close`. Thread-safe.

    After its first OSError the cache is given up; ``warn`` is called with that error, once. Raises OSError if the
    folder cannot be made."""

    def __init__(self, folder: Path, warn: Callable[[OSError], None]) -> None:
        self.folder, self.given_up = folder, False
        self._warn = warn
        self._lock = threading.Lock()
        self._release = weakref.finalize(self, os.close, hold_folder(folder))

    def close(self) -> None:
        """Releases the folder; its files stay. Without another user, `remove_unused` may remove it."""
        self._release()

    def get(
        self,
        name: str,
        fetch: Callable[[], bytes],
        intact: Callable[[bytes], bool],
        room: Callable[[int], AbstractContextManager[bool]],
    ) -> bytes | None:
        """Returns the block ``name``; None if the cache has been given up.

        A block that is not stored, or is not ``intact(bytes)``, is fetched, by one thread of one process of the host at
        a time. It is written inside ``room(size)``, which yields False if the block must not be stored, and raises
        OSError if the disk is full.
        """
        found = self._read(name, intact)
        if found is not None or self.given_up:
            return found
        with ExitStack() as held:
            with self._tolerant():  # where file locks do not work, each process fetches the block
                held.enter_context(locked(self.folder / f"lock-{zlib.crc32(name.encode()) % _STRIPES}"))
            found = self._read(name, intact)  # another process may have stored it since
            if found is not None:
                return found
            raw = fetch()
            if not self.given_up:
                with self._tolerant(), room(len(raw)) as fits:
                    if fits:
                        self._store(name, raw)
            return raw

    def _read(self, name: str, intact: Callable[[bytes], bool]) -> bytes | None:
        if self.given_up:
            return None
        path = self.folder / name
        with self._tolerant(), suppress(FileNotFoundError):
            raw = path.read_bytes()
            if intact(raw):
                return raw
            log.warning("%s is damaged and is fetched again", path)
            path.unlink()
        return None

    def _store(self, name: str, raw: bytes) -> None:
        partial = self.folder / f".{uuid.uuid4().hex}"
        try:
            partial.write_bytes(raw)
            os.replace(partial, self.folder / name)
        except OSError:
            partial.unlink(missing_ok=True)
            raise

    @contextmanager
    def _tolerant(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            with self._lock:
                warned, self.given_up = self.given_up, True
            if not warned:
                self._warn(error)
