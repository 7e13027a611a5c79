"""A cache of blocks on this host's disk, shared by its ranks: later epochs and attempts need not download them again.

A block's file is named after its window, number and hash, and is checked by its hash when it is read.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from trainer.data.loading.next_use import Use
from trainer.data.prepare.prepared import PreparedDataset
from trainer.storage import Storage, local_path
from trainer.storage.block_cache import FREE_SHARE, BlockCache
from trainer.storage.host_cache import host_cache, make_own
from trainer.storage.locks import locked, remove_unused

log = logging.getLogger(__name__)

NextUse = Callable[[int, int], Use]

_BYTES_PER_TOKEN = 5
_SLACK = 1 << 20


def cache_root() -> Path:
    """Returns ``$MUSTER_CACHE/blocks``, or else this user's folder in the host's temporary directory."""
    # Not the home directory: it is often on a network. A local run's workers have a temporary folder that is deleted
    # with the run.
    lasting = os.environ.get("MUSTER_LASTING_TMPDIR") or tempfile.gettempdir()
    return host_cache(Path(lasting, f"muster-{os.geteuid()}")) / "blocks"


def open_cache(storage: Storage, name: str, limit: int, root: Path | None = None) -> DiskCache | None:
    """Opens the cache of the prepared data ``name``, of at most ``limit`` bytes on this host.

    Returns None if it has no use (limit 0, or data on this host's disk or in memory), or if it cannot be opened.
    Removes caches of other data that no process uses.
    """
    if limit <= 0 or local_path(storage.url) is not None or storage.url.startswith("memory:"):
        return None
    root = root or cache_root()
    try:
        make_own(root)
        if root.parent.stat().st_uid not in (os.geteuid(), 0):
            raise PermissionError(f"{root.parent} belongs to another user; set MUSTER_CACHE to a folder of your own")
        cache = DiskCache(root / name, limit)
        for other in root.iterdir():
            if other != root / name:
                remove_unused(other)
    except OSError as error:
        log.warning("no local copies of data blocks: they are read from %s each time (%s)", storage.url, error)
        return None
    return cache


def open_caches(
    train: PreparedDataset, evaluation: PreparedDataset | None, limit: int, bytes_of_target: int = 0
) -> tuple[DiskCache | None, DiskCache | None]:
    """Opens caches of ``limit`` bytes in total. Evaluation data get the bytes that they need, up to a quarter of it.
    ``bytes_of_target``: of stored outputs."""
    small = 0
    if evaluation is not None:
        totals = evaluation.totals
        needed = _BYTES_PER_TOKEN * totals.tokens + bytes_of_target * totals.target_tokens
        small = min(limit // 4, needed + _SLACK)
    caches = open_cache(train.storage, train.fingerprint, limit - small)
    if evaluation is None or evaluation.fingerprint == train.fingerprint:
        return caches, caches
    return caches, open_cache(evaluation.storage, evaluation.fingerprint, small)


class DiskCache:
    """At most ``limit`` bytes of blocks in ``folder``, over all processes that share it. Thread-safe.

    When it is full, the block whose ``next_use(window, block)`` is furthest away is evicted. A new block that is used
    later than all blocks in the folder is not stored.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        lost = "the local cache of data blocks is given up, and training continues without it: %s"
        self.blocks, self.limit = BlockCache(folder, partial(log.warning, lost)), limit

    def close(self) -> None:
        """Releases the folder; its files stay. Without another user, `open_cache` of other data may remove it."""
        self.blocks.close()

    def get(self, window: int, block: int, sha256: str, fetch: Callable[[], bytes], next_use: NextUse) -> bytes:
        """Returns the block's bytes. Calls ``fetch`` if they are not cached, in one process of the host at a time."""

        @contextmanager
        def room(size: int) -> Iterator[bool]:
            with locked(self.blocks.folder / "lock-size"):
                yield self._make_room(size, next_use(window, block), next_use)

        found = self.blocks.get(
            f"{window}-{block}-{sha256[:32]}", fetch, lambda raw: hashlib.sha256(raw).hexdigest() == sha256, room
        )
        return fetch() if found is None else found

    def _make_room(self, size: int, own: Use, next_use: NextUse) -> bool:
        """Evicts blocks until a new one, next used at ``own``, fits; returns False if it must not be stored. The caller
        holds the lock "size"."""
        if size > self.limit:
            return False
        stored = sorted(self._stored(next_use), key=lambda block: block[0])
        total = sum(length for _, length, _ in stored) + size
        while total > self.limit:
            if not stored or stored[-1][0] <= own:
                return False
            _, length, path = stored.pop()
            Path(path).unlink(missing_ok=True)
            total -= length
        disk = shutil.disk_usage(self.blocks.folder)
        if disk.free - size < FREE_SHARE * disk.total:
            raise OSError(f"less than {FREE_SHARE:.0%} of the disk of {self.blocks.folder} would be left free")
        return True

    def _stored(self, next_use: NextUse) -> Iterator[tuple[Use, int, str]]:
        """Yields the next use, size and path of each block."""
        for entry in os.scandir(self.blocks.folder):
            parts = entry.name.split("-")
            if len(parts) == 3 and parts[0].isdigit() and parts[1].isdigit():
                with suppress(FileNotFoundError):  # a rank has removed a damaged block
                    yield next_use(int(parts[0]), int(parts[1])), entry.stat().st_size, entry.path
            elif entry.name.startswith("."):
                os.unlink(entry.path)  # partial file of a killed process: a writer would hold the lock that we hold
