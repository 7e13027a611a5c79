"""A cache of blocks on this host's disk, shared by its ranks: later epochs and attempts need not download them again.

A block is a file named after its window, number and hash. It is put in place by a rename, and checked by its hash when
it is read. An error of the cache, such as a full disk, is logged as a warning, and training continues without it.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import tempfile
import threading
import uuid
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

from trainer.data.loading.next_use import Use
from trainer.data.prepare.prepared import PreparedDataset
from trainer.storage import Storage, local_path
from trainer.storage.host_cache import host_cache, make_own
from trainer.storage.locks import hold_folder, locked, remove_unused

log = logging.getLogger(__name__)

NextUse = Callable[[int, int], Use]

FREE_SHARE = 0.05
_BYTES_PER_TOKEN = 5
_SLACK = 1 << 20
_STRIPES = 64


class _File(NamedTuple):
    path: Path
    size: int
    window: int
    block: int


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
        folder = _own(root) / name
        held = hold_folder(folder)
        for other in root.iterdir():
            if other != folder:
                remove_unused(other)
    except OSError as error:
        log.warning("no local copies of data blocks: they are read from %s each time (%s)", storage.url, error)
        return None
    return DiskCache(folder, limit, held)


def open_caches(
    train: PreparedDataset, evaluation: PreparedDataset | None, limit: int
) -> tuple[DiskCache | None, DiskCache | None]:
    """Opens caches of ``limit`` bytes in total. Evaluation data get the bytes that they need, up to a quarter of it."""
    small = 0 if evaluation is None else min(limit // 4, _BYTES_PER_TOKEN * evaluation.totals.tokens + _SLACK)
    caches = open_cache(train.storage, train.fingerprint, limit - small)
    if evaluation is None or evaluation.fingerprint == train.fingerprint:
        return caches, caches
    return caches, open_cache(evaluation.storage, evaluation.fingerprint, small)


class DiskCache:
    """At most ``limit`` bytes of blocks in ``folder``, over all processes that share it. Thread-safe.

    When it is full, the block whose ``next_use(window, block)`` is furthest away is evicted. A new block that is used
    later than all blocks in the folder is not stored.
    """

    def __init__(self, folder: Path, limit: int, held: int | None = None) -> None:
        self.folder, self.limit = folder, limit
        self.given_up = False
        self._lock = threading.Lock()
        self._end = weakref.finalize(self, os.close, held) if held is not None else None

    def close(self) -> None:
        """Releases the folder; its files stay. Without another user, `open_cache` of other data may remove it."""
        if self._end is not None:
            self._end()

    def get(self, window: int, block: int, sha256: str, fetch: Callable[[], bytes], next_use: NextUse) -> bytes:
        """Returns the block's bytes. Calls ``fetch`` if they are not cached, in one process of the host at a time."""
        name = f"{window}-{block}-{sha256[:32]}"
        try:
            found = None if self.given_up else self._read(name, sha256)
        except OSError as error:
            self._give_up(error)
            found = None
        if found is not None:
            return found
        with self._alone(name):
            return self._fetch(name, sha256, fetch, next_use)

    def _fetch(self, name: str, sha256: str, fetch: Callable[[], bytes], next_use: NextUse) -> bytes:
        if self.given_up:
            return fetch()
        found = None
        with self._tolerant():
            found = self._read(name, sha256)  # another process may have stored it since
        if found is not None:
            return found
        raw = fetch()
        with self._tolerant():
            self._store(name, raw, next_use)
        return raw

    def _read(self, name: str, sha256: str) -> bytes | None:
        path = self.folder / name
        try:
            raw = path.read_bytes()
        except FileNotFoundError:
            return None
        if hashlib.sha256(raw).hexdigest() == sha256:
            return raw
        log.warning("%s is damaged and is fetched again", path)
        path.unlink(missing_ok=True)
        return None

    def _store(self, name: str, raw: bytes, next_use: NextUse) -> None:
        with locked(self.folder / "lock-size"):
            if not self._make_room(name, len(raw), next_use):
                return
            partial = self.folder / f".{uuid.uuid4().hex}"
            try:
                partial.write_bytes(raw)
                os.replace(partial, self.folder / name)
            except OSError:
                partial.unlink(missing_ok=True)
                raise

    def _make_room(self, name: str, size: int, next_use: NextUse) -> bool:
        """Evicts blocks until the new one fits; returns False if it must not be stored. The caller holds the lock
        "size"."""
        if size > self.limit:
            return False
        files = self._files()
        total = sum(f.size for f in files) + size
        new = _parse(name)
        assert new is not None
        own = next_use(*new)
        by_use = sorted(((next_use(f.window, f.block), f) for f in files), key=lambda x: x[0])
        while total > self.limit:
            if not by_use or by_use[-1][0] <= own:
                return False
            _, last = by_use.pop()
            last.path.unlink(missing_ok=True)
            total -= last.size
        disk = shutil.disk_usage(self.folder)
        if disk.free - size < FREE_SHARE * disk.total:
            raise OSError(f"less than {FREE_SHARE:.0%} of the disk of {self.folder} would be left free")
        return True

    def _files(self) -> list[_File]:
        found = []
        for entry in os.scandir(self.folder):
            place = _parse(entry.name)
            if place:
                found.append(_File(Path(entry.path), entry.stat().st_size, *place))
            elif entry.name.startswith("."):
                os.unlink(entry.path)  # partial file of a killed process: a writer would hold the lock that we hold
        return found

    @contextmanager
    def _alone(self, name: str) -> Iterator[None]:
        """Admits one thread and one process at a time per block, provided that file locks work on this host."""
        stripe = int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) % _STRIPES
        with ExitStack() as held:
            if not self.given_up:
                with self._tolerant():
                    held.enter_context(locked(self.folder / f"lock-{stripe}"))
            yield

    @contextmanager
    def _tolerant(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        with self._lock:
            if self.given_up:
                return
            self.given_up = True
        log.warning("the local cache of data blocks is given up, and training continues without it: %s", error)


def _parse(name: str) -> tuple[int, int] | None:
    parts = name.split("-")
    if len(parts) != 3 or not (parts[0].isdigit() and parts[1].isdigit()):
        return None
    return int(parts[0]), int(parts[1])


def _own(root: Path) -> Path:
    """Creates the folder if it is missing. Raises PermissionError if another user owns it or its parent."""
    root.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    make_own(root)
    if root.parent.stat().st_uid not in (os.geteuid(), 0):
        raise PermissionError(f"{root.parent} belongs to another user; set MUSTER_CACHE to a folder of your own")
    return root
