"""Follows the rows of a run: gives each row once, and reads only the parts that have grown."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

from trainer.run.jsonl import parse_lines
from trainer.storage import Storage, in_parallel

T = TypeVar("T")
_PARALLEL_READS = 8


class JsonLinesTail(Generic[T]):
    """Follows the JSON Lines below a folder (``metrics``), which `trainer.run.jsonl.JsonLinesWriter` writes. Parts only
    grow, so a part of the same size has no new rows. Not thread-safe."""

    def __init__(self, storage: Storage, prefix: str, read: Callable[[Any], T], *, newest: int | None = None) -> None:
        """``read``: as in `trainer.run.jsonl.parse_lines`. ``newest``: how many of the parts that exist at the first
        call are read, for a quick start; None: all."""
        self._storage = storage
        self._prefix = prefix
        self._from_row = read
        self._newest = newest
        self._read: dict[str, tuple[int, int]] = {}  # per part: its size, and how many of its bytes were parsed

    def new(self) -> list[T]:
        """Returns the rows that were added since the last call, by attempt, writer and order of writing. Raises storage
        errors; then the next call returns the same rows."""
        found = [o for o in self._storage.list(self._prefix) if o.key.endswith(".jsonl")]
        if not self._read and self._newest is not None:
            self._read = {o.key: (o.size, o.size) for o in found[: -self._newest]}
        grown = [o.key for o in found if o.size != self._read.get(o.key, (-1, 0))[0]]
        if not grown:
            return []

        def read(key: str) -> bytes:
            try:
                return self._storage.read(key)
            except FileNotFoundError:  # deleted since it was listed
                return b""

        bodies = in_parallel(read, grown, _PARALLEL_READS)
        rows: list[T] = []
        for key, body in zip(grown, bodies, strict=True):
            end = body.rfind(b"\n") + 1
            rows += parse_lines(self._storage, key, body[self._read.get(key, (0, 0))[1] : end], self._from_row)
            self._read[key] = (len(body), end)
        return rows
