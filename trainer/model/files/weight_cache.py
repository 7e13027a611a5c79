"""The cache on this host's disk of weight files in object storage: the host's ranks fetch each byte once.

A block's file ends with a checksum. Without the cache, the load continues with ranged reads that bypass it.
"""

from __future__ import annotations

import logging
import os
import shutil
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from trainer.model.files.fetch import cache_folder
from trainer.storage.block_cache import FREE_SHARE, BlockCache
from trainer.storage.host_cache import make_own
from trainer.storage.locks import remove_unused

log = logging.getLogger(__name__)

BLOCK = 4 * 2**20
FREE_BYTES = 10 * 2**30
"""The space that is left free on the disk is this, or `FREE_SHARE` of a smaller disk."""
_CHECKSUM = 4

Fetch = Callable[[int, int], bytes]


def weights_root() -> Path:
    return cache_folder() / "weights"


def open_weight_cache(folder: Path) -> WeightCache | None:
    """Opens the cache; returns None, with a warning, if that is not possible."""
    try:
        make_own(folder.parent)
        return WeightCache(folder)
    except OSError as error:
        _warn(folder, error)
        return None


class WeightCache:
    """The blocks of one model version's files in ``folder``, shared by all processes of the host. Thread-safe."""

    def __init__(self, folder: Path) -> None:
        self.blocks = BlockCache(folder, lambda error: _warn(folder, error))
        os.utime(folder)  # `make_room` removes the folder with the oldest mtime first

    def close(self) -> None:
        """Releases the folder. Its blocks stay until another model needs the space."""
        self.blocks.close()

    def want(self, file: str, index: int, size: int, fetch: Fetch) -> None:
        """Fetches the block if this host does not have it; a block that is present is not read."""
        with suppress(OSError):
            stored = (self.blocks.folder / f"{file}.{index}").stat().st_size
            if stored == min(size, (index + 1) * BLOCK) - index * BLOCK + _CHECKSUM:
                return
        self.get(file, index, size, fetch)

    def get(self, file: str, index: int, size: int, fetch: Fetch) -> memoryview | None:
        """Returns block ``index`` of a file of ``size`` bytes; None when the cache has been given up.

        ``fetch(start, stop)`` is called when no process of this host has stored the block."""
        start = index * BLOCK
        stop = min(size, start + BLOCK)

        def fetched() -> bytes:
            raw = fetch(start, stop)
            return raw + _checksum(raw)

        def intact(raw: bytes) -> bool:
            body = memoryview(raw)[:-_CHECKSUM]
            return len(body) == stop - start and _checksum(body) == raw[-_CHECKSUM:]

        @contextmanager
        def room(size: int) -> Iterator[bool]:
            make_room(self.blocks.folder, size)
            yield True

        found = self.blocks.get(f"{file}.{index}", fetched, intact, room)
        return None if found is None else memoryview(found)[:-_CHECKSUM]


def _warn(folder: Path, error: OSError) -> None:
    log.warning(
        "the weights cannot be cached in %s (%s), so each rank reads its own from their source; set MUSTER_CACHE to a "
        "writable folder with free space",
        folder,
        error,
    )


def _checksum(raw: bytes | memoryview) -> bytes:
    return zlib.crc32(raw).to_bytes(_CHECKSUM, "little")


def make_room(folder: Path, size: int) -> None:
    """Removes the blocks of unused models, least recently used first; raises OSError when that is not enough."""
    if _has_room(folder, size):
        return
    for other in sorted((f for f in folder.parent.iterdir() if f != folder and f.is_dir()), key=_last_used):
        remove_unused(other)
        if _has_room(folder, size):
            return
    raise OSError(f"less than {FREE_SHARE:.0%} of the disk of {folder} would be left free")


def _has_room(folder: Path, size: int) -> bool:
    disk = shutil.disk_usage(folder)
    return disk.free - size >= min(FREE_SHARE * disk.total, FREE_BYTES)


def _last_used(folder: Path) -> float:
    try:
        return folder.stat().st_mtime
    except FileNotFoundError:
        return 0.0
