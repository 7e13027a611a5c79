"""Parquet: spans are ranges of rows in one row group. A row's position is its number in the object, from 0.

Footer and column chunks are read by ranged reads. A row group larger than a span is cut by rows, and is then decoded
once per span.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq

from trainer.data.readers import InputSlice
from trainer.data.readers.body import Body, RangedFile
from trainer.data.sample import ROW_BYTES, TOO_LONG, Row, RowError
from trainer.errors import InputError

SPAN_BYTES = 32 << 20
_BATCH_ROWS = 1024


def plain_rows(batch: Any) -> list[Row | RowError]:
    """Returns the rows of an Arrow table or batch; a RowError for a row that is too large, or whose values Python
    cannot represent (text that is not UTF-8, a date after the year 9999)."""
    if batch.nbytes <= ROW_BYTES:
        try:
            return list(batch.to_pylist())
        except (ValueError, OverflowError, pa.ArrowException):
            pass  # one of the rows is bad: convert them one by one
    return [_plain_row(batch.slice(i, 1)) for i in range(batch.num_rows)]


def _plain_row(row: Any) -> Row | RowError:
    if row.nbytes > ROW_BYTES:
        return RowError(TOO_LONG)
    try:
        (found,) = row.to_pylist()
    except (ValueError, OverflowError, pa.ArrowException) as error:
        return RowError(f"its values cannot be read ({_first_line(error)})")
    return cast("Row", found)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


class Parquet:
    def __init__(self, body: Body, span_bytes: int = SPAN_BYTES) -> None:
        self.url, self.span_bytes = body.url, span_bytes
        raw = io.BufferedReader(RangedFile(body), 1 << 20)
        try:
            self.file = pq.ParquetFile(pa.PythonFile(raw, mode="r"))
            names = self.file.schema_arrow.names
        except (pa.ArrowException, OSError, ValueError) as error:
            raise InputError(f"{self.url}: not a readable parquet file ({_first_line(error)})") from error
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise InputError(f"{self.url}: two of its columns are named {twice[0]!r}; rename or remove one")

    def cut(self) -> list[InputSlice]:
        pieces: list[InputSlice] = []
        for group, first, count in self._groups():
            size = self.file.metadata.row_group(group).total_byte_size
            parts = max(1, min(count, -(-size // self.span_bytes)))
            edges = [first + count * i // parts for i in range(parts + 1)]
            pieces += [InputSlice(a, b, size // parts) for a, b in pairwise(edges)]
        return pieces

    def rows(self, start: int, stop: int) -> Iterator[tuple[int, Row | RowError]]:
        for group, first, count in self._groups():
            if first < stop and start < first + count:
                yield from self._rows_of(group, first, start, stop)

    def _rows_of(self, group: int, first: int, start: int, stop: int) -> Iterator[tuple[int, Row | RowError]]:
        at, meta = first, self.file.metadata.row_group(group)
        # Fewer rows at a time if they are large: all of a batch is in memory.
        count = max(1, min(_BATCH_ROWS, ROW_BYTES * meta.num_rows // max(meta.total_byte_size, 1)))
        batches = self.file.iter_batches(count, row_groups=[group])
        while at < stop:
            try:
                batch = next(batches, None)
            except (pa.ArrowException, OSError) as error:
                raise InputError(f"{self.url}: row group {group} cannot be read ({_first_line(error)})") from error
            if batch is None:
                return
            low, high = max(start - at, 0), min(stop - at, batch.num_rows)
            if low < high:
                yield from enumerate(plain_rows(batch.slice(low, high - low)), at + low)
            at += batch.num_rows

    def _groups(self) -> Iterator[tuple[int, int, int]]:
        first = 0
        for group in range(self.file.metadata.num_row_groups):
            count = self.file.metadata.row_group(group).num_rows
            yield group, first, count
            first += count

    def place(self, row: int) -> str:
        return f"row {row + 1}"
