"""Parquet: spans are ranges of rows inside one row group, a row is its number in the object, from 0.

Footer and column chunks are read by ranged reads; a row group larger than a span is cut by rows, and then decoded once
per span.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from itertools import pairwise

import pyarrow as pa
import pyarrow.parquet as pq

from trainer.data.readers import Piece
from trainer.data.readers.body import Body, RangedFile
from trainer.data.rows import Fault, Row
from trainer.errors import InputError

SPAN_BYTES = 32 << 20
_BATCH_ROWS = 1024


class Parquet:
    def __init__(self, body: Body, span_bytes: int = SPAN_BYTES) -> None:
        self.url, self.span_bytes = body.url, span_bytes
        raw = io.BufferedReader(RangedFile(body), 1 << 20)
        try:
            self.file = pq.ParquetFile(pa.PythonFile(raw, mode="r"))
        except pa.ArrowInvalid as error:
            raise InputError(f"{self.url}: not a readable parquet file ({error})") from error

    def cut(self) -> list[Piece]:
        pieces: list[Piece] = []
        for group, first, count in self._groups():
            size = self.file.metadata.row_group(group).total_byte_size
            parts = max(1, min(count, -(-size // self.span_bytes)))
            edges = [first + count * i // parts for i in range(parts + 1)]
            pieces += [Piece(a, b, size // parts) for a, b in pairwise(edges)]
        return pieces

    def rows(self, start: int, stop: int) -> Iterator[tuple[int, Row | Fault]]:
        for group, first, count in self._groups():
            if first < stop and start < first + count:
                yield from self._rows_of(group, first, start, stop)

    def _rows_of(self, group: int, first: int, start: int, stop: int) -> Iterator[tuple[int, Row | Fault]]:
        at = first
        try:
            for batch in self.file.iter_batches(_BATCH_ROWS, row_groups=[group]):
                low, high = max(start - at, 0), min(stop - at, batch.num_rows)
                if low < high:
                    yield from enumerate(batch.slice(low, high - low).to_pylist(), at + low)
                at += batch.num_rows
                if at >= stop:
                    return
        except pa.ArrowException as error:
            raise InputError(f"{self.url}: row group {group} cannot be read ({error})") from error

    def _groups(self) -> Iterator[tuple[int, int, int]]:
        first = 0
        for group in range(self.file.metadata.num_row_groups):
            count = self.file.metadata.row_group(group).num_rows
            yield group, first, count
            first += count

    def place(self, row: int) -> str:
        return f"row {row + 1}"
