"""Decoded blocks in memory: those of the window that is being read and of the next one, within a limit.

A block is looked up in memory, then on this host's disk, then in the storage. It is fetched once even if several
threads request it.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace

from trainer.data.blocks import Block, decode_block
from trainer.data.loading.disk_cache import DiskCache
from trainer.data.loading.next_use import NextUse
from trainer.data.loading.outputs_reader import OutputsReader
from trainer.data.outputs import Part
from trainer.data.prepare.prepared import PreparedDataset
from trainer.data.sample import Sample
from trainer.data.types import SampleRef
from trainer.errors import InputError, MusterError
from trainer.storage import in_parallel

log = logging.getLogger(__name__)

MEMORY_BYTES = 256 << 20
"""More than two windows of ordinary text need (32 MiB of input each, about 5 bytes per token): a window's packs use all
its blocks."""

READERS = 4
"""Blocks that are fetched in parallel."""

Key = tuple[int, int]


class BlockReader:
    """Decoded blocks of prepared data. Thread-safe; concurrent requests for a block share one fetch.

    Above ``memory_bytes`` the block whose next use is furthest away is evicted. Blocks of other windows than the
    current and the next one are not held: they are read again from the disk or the storage.
    """

    def __init__(
        self,
        prepared: PreparedDataset,
        upcoming: NextUse,
        *,
        memory_bytes: int = MEMORY_BYTES,
        readers: int = READERS,
        cache: DiskCache | None = None,
    ) -> None:
        self.prepared, self.upcoming, self.memory_bytes = prepared, upcoming, memory_bytes
        self.readers, self.cache = readers, cache
        self._blocks: dict[Key, Block] = {}
        self._flights: dict[Key, Future[Block]] = {}
        self.held_bytes = 0
        self._lock = threading.Lock()
        self._outputs = self._outputs_reader()

    def samples(self, refs: Sequence[SampleRef]) -> list[Sample]:
        """Returns the samples in the order of ``refs``. Fetches the blocks that are not in memory in parallel."""
        # The samples' arrays are views. Their blocks stay in memory while they are used, even above the limit; a
        # micro-batch uses the blocks of one or two windows at most.
        indexes = {window: self.prepared.index(window) for window in {ref.window for ref in refs}}
        rows: dict[Key, list[tuple[int, int]]] = {}
        for at, (window, sample) in enumerate(refs):
            index = indexes[window]
            rows.setdefault((window, int(index.block[sample])), []).append((at, int(index.block_row[sample])))
        found: dict[int, Sample] = {}

        def take(key: Key) -> None:
            block = self.block(*key)
            for at, row in rows[key]:
                found[at] = self._sample(block, row)

        with self._lock:
            absent = [key for key in rows if key not in self._blocks]
        in_parallel(take, [key for key in rows if key not in absent], 1)
        in_parallel(take, absent, self.readers)
        if self._outputs is None:
            return [found[at] for at in range(len(refs))]
        return [replace(found[at], outputs=outputs) for at, outputs in enumerate(self._outputs.of(refs))]

    def _sample(self, block: Block, row: int) -> Sample:
        sample = block.sample(row)
        if sample.desirable is None:
            return sample
        unrelated = block.unrelated(row, self.prepared.spec.sequence_length)
        if unrelated is None:
            raise InputError(
                f"task {self.prepared.spec.task} compares each prompt's answer with answers to other prompts, and "
                f"{len(block.offsets) - 1} samples that are stored together have the same prompt; add rows with others"
            )
        return replace(sample, unrelated=unrelated)

    def block(self, window: int, block: int) -> Block:
        key = (window, block)
        with self._lock:
            if key in self._blocks:
                return self._blocks[key]
            flight = self._flights.get(key)
            mine: Future[Block] = Future()
            if flight is None:
                self._flights[key] = mine
        return flight.result() if flight is not None else self._fetch(key, mine)

    def warm(self, window: int) -> None:
        """Fetches a window's blocks before their use; without a disk cache, only while memory has room for them.

        Errors are only logged: the thread that needs the block raises them.
        """
        try:
            for number, info in enumerate(self.prepared.index(window).meta.blocks):
                if self.cache is None and self.held_bytes + 2 * info.length > self.memory_bytes:
                    return
                self.block(window, number)
        except (MusterError, OSError) as error:
            log.debug("window %d could not be read ahead: %s", window, error)

    def _fetch(self, key: Key, flight: Future[Block]) -> Block:
        try:
            sha256 = self.prepared.index(key[0]).meta.blocks[key[1]].sha256
            block = decode_block(self._cached(*key, sha256, lambda: self.prepared.block_bytes(*key)))
        except BaseException as error:
            with self._lock:
                del self._flights[key]
            flight.set_exception(error)
            raise
        with self._lock:
            del self._flights[key]
            self._blocks[key] = block
            self.held_bytes += block.nbytes
            for other in sorted(self._blocks, key=lambda k: self.upcoming.next_use(*k), reverse=True):
                if self.held_bytes > self.memory_bytes or not self.upcoming.soon(other[0]):
                    self.held_bytes -= self._blocks.pop(other).nbytes
        flight.set_result(block)
        return block

    def _cached(self, window: int, block: int, sha256: str, read: Callable[[], bytes]) -> bytes:
        """Returns bytes of this hash that belong to a block, from this host's disk if they are there."""
        if self.cache is None:
            return read()
        return self.cache.get(window, block, sha256, read, self.upcoming.next_use)

    def _outputs_reader(self) -> OutputsReader | None:
        stored = self.prepared.outputs
        if stored is None:
            return None

        def read(part: Part) -> bytes:
            return self._cached(part.window, part.block, stored.sha256(part), lambda: stored.bytes_of(part))

        return OutputsReader(self.prepared, stored, read, self.memory_bytes // 4, self.readers)
