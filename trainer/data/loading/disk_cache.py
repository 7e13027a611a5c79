"""Blocks on this host's own disk, shared by its ranks, so that an epoch or an attempt later they need not travel again.

A block is a file named after its window, number and hash, made whole by a rename and checked by its hash when it is
read. Whatever goes wrong here, a full disk above all, is a warning: training goes on without.
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
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from trainer.data.loading.next_use import Use
from trainer.data.prepare.prepared import PreparedDataset
from trainer.storage import Storage, local_path
from trainer.storage.host_cache import host_cache, make_own
from trainer.storage.locks import hold_folder, lock_file, remove_unused

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
    """``$MUSTER_CACHE/blocks``, or a folder of this user's among the host's temporary ones: home directories are often
    on a network."""
    # A local run's workers have a temporary folder that goes with the run.
    lasting = os.environ.get("MUSTER_LASTING_TMPDIR") or tempfile.gettempdir()
    return host_cache(Path(lasting, f"muster-{os.geteuid()}")) / "blocks"


def open_cache(storage: Storage, name: str, limit: int, root: Path | None = None) -> DiskCache | None:
    """The cache of the prepared data ``name``, of at most ``limit`` bytes on this host; None where it would be of no
    use: limit 0, or data that lie on this host or in memory. Caches of other data that no process uses are removed."""
    if limit <= 0 or local_path(storage.url) is not None or storage.url.startswith("memory:"):
        return None
    root = root or cache_root()
    try:
        folder = _own(root) / name
        held = hold_folder(folder)
        _remove_unused(root, folder)
    except OSError as error:
        log.warning("no local copies of data blocks, they are read from %s each time: %s", storage.url, error)
        return None
    return DiskCache(folder, limit, held)


def open_caches(
    train: PreparedDataset, evaluation: PreparedDataset | None, limit: int
) -> tuple[DiskCache | None, DiskCache | None]:
    """Caches that take ``limit`` bytes together: evaluation data get what they need, up to a quarter."""
    small = 0 if evaluation is None else min(limit // 4, _BYTES_PER_TOKEN * evaluation.totals.tokens + _SLACK)
    caches = open_cache(train.storage, train.fingerprint, limit - small)
    if evaluation is None or evaluation.fingerprint == train.fingerprint:
        return caches, caches
    return caches, open_cache(evaluation.storage, evaluation.fingerprint, small)


class DiskCache:
    """At most ``limit`` bytes of blocks in ``folder``, over all processes that share it. Thread-safe.

    What is used latest, as ``next_use(window, block)`` knows, goes first; a block used later than all that is there is
    not kept.
    """

    def __init__(self, folder: Path, limit: int, held: int | None = None) -> None:
        self.folder, self.limit = folder, limit
        self.given_up = False
        self._lock = threading.Lock()
        self._end = weakref.finalize(self, os.close, held) if held is not None else None

    def close(self) -> None:
        """The folder is no longer in use by this object; its files stay."""
        if self._end is not None:
            self._end()

    def get(self, window: int, block: int, sha256: str, fetch: Callable[[], bytes], next_use: NextUse) -> bytes:
        """The block's bytes; ``fetch`` is called when they are not here, by one process of the host at a time."""
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
            found = self._read(name, sha256)  # another process may have been first
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
        with self._locked("size"):
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
        """Whether the block is to be kept. Called with the lock on the folder's size."""
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
                os.unlink(entry.path)  # half a file of a process that was killed: who writes one holds our lock
        return found

    @contextmanager
    def _alone(self, name: str) -> Iterator[None]:
        """One thread and one process at a time per block, as far as the host's locks work."""
        stripe = int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) % _STRIPES
        descriptor = None
        if not self.given_up:
            with self._tolerant():
                descriptor = lock_file(self.folder / f"lock-{stripe}")
        try:
            yield
        finally:
            if descriptor is not None:
                os.close(descriptor)

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        descriptor = lock_file(self.folder / f"lock-{name}")
        try:
            yield
        finally:
            os.close(descriptor)

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
        log.warning("local copies of data blocks are given up, training goes on without them: %s", error)


def _parse(name: str) -> tuple[int, int] | None:
    parts = name.split("-")
    if len(parts) != 3 or not (parts[0].isdigit() and parts[1].isdigit()):
        return None
    return int(parts[0]), int(parts[1])


def _own(root: Path) -> Path:
    """The folder, made if absent; PermissionError when another user could look into it."""
    root.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    make_own(root)
    if root.parent.stat().st_uid not in (os.geteuid(), 0):
        raise PermissionError(f"{root.parent} belongs to another user; set MUSTER_CACHE to a folder of your own")
    return root


def _remove_unused(root: Path, own: Path) -> None:
    for folder in root.iterdir():
        if folder != own:
            remove_unused(folder)
