"""The rows of a run as they come: each once, however often one looks, and only what has grown is read."""

from __future__ import annotations

from typing import Any

from trainer.run.jsonl import parse_rows
from trainer.storage import Storage, in_parallel

_PARALLEL_READS = 8


class JsonLinesTail:
    """Follows the JSON Lines below a folder (``metrics``), which others write by `trainer.run.jsonl.JsonLinesWriter`.
    Parts only grow, so that a part of the same size holds nothing new. Not thread-safe."""

    def __init__(self, storage: Storage, prefix: str, *, newest: int | None = None) -> None:
        """``newest``: of the parts that are there at the first call, only so many are read, for a quick begin."""
        self._storage = storage
        self._prefix = prefix
        self._newest = newest
        self._read: dict[str, tuple[int, int]] = {}  # of each part: its bytes, and the bytes that were taken from it

    def new(self) -> list[dict[str, Any]]:
        """Rows that came since the last call, by attempt, writer and order of writing. Where a read fails nothing is
        taken, and the next call gives the same rows again. Raises storage errors."""
        found = [o for o in self._storage.list(self._prefix) if o.key.endswith(".jsonl")]
        if not self._read and self._newest is not None:
            self._read = {o.key: (o.size, o.size) for o in found[: -self._newest]}
        grown = [o.key for o in found if o.size != self._read.get(o.key, (-1, 0))[0]]
        if not grown:
            return []
        bodies = in_parallel(self._body, grown, _PARALLEL_READS)
        rows = []
        for key, body in zip(grown, bodies, strict=True):
            end = body.rfind(b"\n") + 1
            rows += parse_rows(self._storage, key, body[self._read.get(key, (0, 0))[1] : end])
            self._read[key] = (len(body), end)
        return rows

    def _body(self, key: str) -> bytes:
        try:
            return self._storage.read(key)
        except FileNotFoundError:  # deleted since it was listed
            return b""
