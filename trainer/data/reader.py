"""Blocks in memory: the last ones used, up to a number of bytes, each fetched once however many threads want it."""

from __future__ import annotations

import threading
from collections import OrderedDict
from concurrent.futures import Future

from trainer.data.blocks import Block, decode_block
from trainer.data.prepared import Prepared

CACHE_BYTES = 256 << 20
"""More than a window of ordinary text takes (32 MiB of input, at most 5 bytes for each of its bytes), since a window's
packs draw on all its blocks."""

Key = tuple[int, int]


class BlockReader:
    """Decoded blocks of prepared data; thread-safe, single-flight, least recently used out first."""

    def __init__(self, prepared: Prepared, cache_bytes: int = CACHE_BYTES) -> None:
        self.prepared, self.cache_bytes = prepared, cache_bytes
        self._blocks: OrderedDict[Key, Block] = OrderedDict()
        self._flights: dict[Key, Future[Block]] = {}
        self._held_bytes = 0
        self._lock = threading.Lock()

    @property
    def held_bytes(self) -> int:
        return self._held_bytes

    def block(self, window: int, block: int) -> Block:
        key = (window, block)
        with self._lock:
            if key in self._blocks:
                self._blocks.move_to_end(key)
                return self._blocks[key]
            flight = self._flights.get(key)
            mine: Future[Block] = Future()
            if flight is None:
                self._flights[key] = mine
        return flight.result() if flight is not None else self._fetch(key, mine)

    def _fetch(self, key: Key, flight: Future[Block]) -> Block:
        try:
            block = decode_block(self.prepared.block_bytes(*key))
        except BaseException as error:
            with self._lock:
                del self._flights[key]
            flight.set_exception(error)
            raise
        with self._lock:
            del self._flights[key]
            self._keep(key, block)
        flight.set_result(block)
        return block

    def _keep(self, key: Key, block: Block) -> None:
        self._blocks[key] = block
        self._held_bytes += block.nbytes
        while self._held_bytes > self.cache_bytes and len(self._blocks) > 1:
            _, old = self._blocks.popitem(last=False)
            self._held_bytes -= old.nbytes
