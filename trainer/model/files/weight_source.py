"""Reads ranges of weight files from a folder of this host, or from object storage through the host's block cache.

Nothing is mapped into memory: mapped pages would count as this process's memory, up to 140 GB for a large model.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from trainer.errors import CorruptObject, InputError
from trainer.model.files.weight_cache import BLOCK, open_weight_cache, weights_root
from trainer.storage import ObjectInfo, Storage, local_path, open_storage

_AHEAD = 4
_PART = 16 * 2**20


class WeightSource:
    """The files of one model. Thread-safe.

    ``bytes_read``: the bytes requested. ``bytes_fetched``: the bytes that this process read from the disk or object
    storage, without the blocks that were in the host's cache."""

    def __init__(self, location: str) -> None:
        self.storage: Storage = open_storage(location)
        self.location = location
        self.files = {o.key: o for o in self.storage.list() if "/" not in o.key}
        self.bytes_read = self.bytes_fetched = 0
        self._lock = threading.Lock()
        self._folder = local_path(self.storage.url)
        self._descriptors: dict[str, int] = {}
        listing = json.dumps([self.storage.url, sorted((o.key, o.size, o.etag) for o in self.files.values())])
        version = hashlib.sha256(listing.encode()).hexdigest()[:32]
        self._cache = None if self._folder is not None else open_weight_cache(weights_root() / version)
        self._pool = ThreadPoolExecutor(_AHEAD, thread_name_prefix="weights")
        self._last: tuple[str, int, memoryview] | None = None

    def size(self, file: str) -> int:
        return self.files[file].size

    def read(self, file: str, start: int, stop: int) -> bytes:
        raw = bytearray(stop - start)
        self.read_into(file, start, memoryview(raw))
        return bytes(raw)

    def read_into(self, file: str, start: int, view: memoryview) -> None:
        """Fills ``view`` (of bytes) from ``start``; raises CorruptObject when the file ends too early."""
        stop = start + len(view)
        if stop > self.size(file):
            raise CorruptObject(f"{self.storage.uri(file)} ends before byte {stop}; copy the model again")
        with self._lock:
            self.bytes_read += len(view)
        if self._folder is not None:
            self._from_disk(file, start, view)
        else:
            self._from_blocks(file, start, stop, view)

    def ahead(self, ranges: Iterable[tuple[str, int, int]]) -> None:
        """Prefetches ranges that will be read in this order, several blocks at a time. No effect for a folder."""
        if self._cache is None:
            return
        blocks = dict.fromkeys(
            (file, index) for file, start, stop in ranges for index in range(start // BLOCK, -(-stop // BLOCK))
        )
        for file, index in blocks:
            self._pool.submit(self._prefetch, file, index)

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
        if self._cache:
            self._cache.close()
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()
        self._last = None

    def check_unchanged(self, used: Iterable[str]) -> None:
        """Raises InputError when a file was replaced while it was read, and the tensors may mix two models."""
        now: Mapping[str, ObjectInfo] = {o.key: o for o in self.storage.list() if "/" not in o.key}
        for file in used:
            if file not in now or (now[file].size, now[file].etag) != (self.files[file].size, self.files[file].etag):
                raise InputError(f"{self.storage.uri(file)} changed while it was read; run the same command again")

    def _from_disk(self, file: str, start: int, view: memoryview) -> None:
        assert self._folder is not None
        with self._lock:
            if file not in self._descriptors:
                self._descriptors[file] = os.open(Path(self._folder, file), os.O_RDONLY | os.O_CLOEXEC)
            descriptor = self._descriptors[file]
        done = 0
        while done < len(view):
            got = os.preadv(descriptor, [view[done : done + _PART]], start + done)
            if got == 0:
                raise CorruptObject(f"{self.storage.uri(file)} ends at byte {start + done}; copy the model again")
            done += got
        self._count(len(view))

    def _from_blocks(self, file: str, start: int, stop: int, view: memoryview) -> None:
        at = start
        while at < stop:
            index = at // BLOCK
            end = min(stop, (index + 1) * BLOCK)
            block = self._block(file, index)
            if block is None:  # without a cache, fetch the requested bytes only
                end = min(stop, at + _PART)
                view[at - start : end - start] = self._fetch(file, at, end)
            else:
                view[at - start : end - start] = block[at - index * BLOCK : end - index * BLOCK]
            at = end

    def _block(self, file: str, index: int) -> memoryview | None:
        last = self._last
        if last and last[:2] == (file, index):
            return last[2]
        if self._cache is None:
            return None
        block = self._cache.get(file, index, self.size(file), lambda a, b: self._fetch(file, a, b))
        self._last = (file, index, block) if block is not None else None
        return block

    def _prefetch(self, file: str, index: int) -> None:
        assert self._cache is not None
        with suppress(Exception):  # raised again when the block is read
            self._cache.want(file, index, self.size(file), lambda a, b: self._fetch(file, a, b))

    def _fetch(self, file: str, start: int, stop: int) -> bytes:
        raw = self.storage.read_range(file, start, stop)
        self._count(len(raw))
        return raw

    def _count(self, size: int) -> None:
        with self._lock:
            self.bytes_fetched += size
