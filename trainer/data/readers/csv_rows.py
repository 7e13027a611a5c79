"""CSV as in RFC 4180: fields may be quoted, and a quoted field may contain commas, quotes (doubled) and newlines.

The start of a record depends on all bytes before it. So `Csv.cut` parses the complete file once, piece by piece. A
row's position is its record's byte offset.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence

from trainer.data.readers import InputSlice
from trainer.data.readers.body import Body
from trainer.data.readers.lines import BOM, UTF16, check_lines, line_of
from trainer.data.readers.tsv import check_names, row_of_fields
from trainer.data.sample import ROW_BYTES, TOO_LONG, Row, RowError
from trainer.errors import InputError

_READ_BYTES = 256 << 10

csv.field_size_limit(ROW_BYTES)  # for all of the process: csv has no other setting, and its default is 128 KiB


class Csv:
    """A CSV file. ``header`` names the columns of a file without a header, whose first record is a row."""

    def __init__(self, body: Body, header: Sequence[str] | None = None) -> None:
        self.body = body
        head = body.read(0, len(BOM))
        self._start = len(BOM) if head == BOM else 0
        if head[:2] in UTF16:
            check_lines(body)
        self.names = tuple(header) if header is not None else self._read_header()
        check_names(self.names, body.url)

    def cut(self) -> Iterator[InputSlice]:
        check_lines(self.body)
        start = last = self._start
        for begin, end, _ in self._records(start):
            if begin - start >= self.body.span_bytes:
                yield InputSlice(start, begin, begin - start)
                start = begin
            last = end
        if last > start:
            yield InputSlice(start, last, last - start)

    def rows(self, start: int, stop: int) -> Iterator[tuple[int, Row | RowError]]:
        for begin, _, fields in self._records(start):
            if begin >= stop:
                return
            if isinstance(fields, RowError):
                yield begin, fields
            elif fields:
                yield begin, row_of_fields(self.names, fields)

    def place(self, row: int) -> str:
        return line_of(self.body, row)

    def _read_header(self) -> tuple[str, ...]:
        for _, end, fields in self._records(self._start):
            self._start = end
            if isinstance(fields, RowError):
                check_lines(self.body)
                raise InputError(f"{self.body.url}: the header, its first record: {fields.reason}")
            return tuple(fields)
        return ()

    def _records(self, start: int) -> Iterator[tuple[int, int, list[str] | RowError]]:
        """Yields each record from ``start`` as (first byte, end, fields). A blank line has no fields."""
        lines = _Lines(self.body, start)
        records = csv.reader(lines, strict=True)
        while True:
            begin = lines.begin = lines.at
            try:
                fields: list[str] | RowError = next(records)
            except StopIteration:
                return
            except _TooLong as error:
                fields = RowError(str(error))
            except csv.Error as error:
                fields = RowError(f"not valid CSV ({error}); quote a field that holds quotes, and double those"[:300])
            yield begin, lines.at, fields


class _TooLong(csv.Error):
    pass


class _Lines(Iterator[str]):
    """The body's lines from ``start``, with their newlines.

    ``at`` is the end of the last line returned. ``begin``, which the caller sets, is the start of the current record.
    Raises _TooLong, with ``at`` behind the current line, when the record is too long: a closing quote may be missing.
    """

    def __init__(self, body: Body, start: int) -> None:
        self.at = self.begin = start
        self._body, self._next, self._half = body, start, bytearray()
        self._ahead: Iterator[bytes] = iter(())

    def __next__(self) -> str:
        line = next(self._ahead, None)
        while line is None:
            line = self._refill()
        self.at += len(line)
        if self.at - self.begin > ROW_BYTES:
            raise _TooLong(f"the record is {TOO_LONG}")
        # Bytes that are not UTF-8 become lone surrogates. The format that reads this field reports them.
        return line.decode("utf-8", "surrogateescape")

    def _refill(self) -> bytes | None:
        """Reads the next piece. Returns its first complete line, the file's last line, or None to be called again."""
        raw = self._body.read(self._next, self._next + _READ_BYTES)
        self._next += len(raw)
        if not raw:
            last, self._half = bytes(self._half), bytearray()
            if not last:
                raise StopIteration
            return last
        first, *others = raw.split(b"\n")
        self._half += first
        if not others:
            if len(self._half) > ROW_BYTES:
                self._skip()
            return None
        *lines, half = [bytes(self._half), *others]
        self._half = bytearray(half)
        self._ahead = iter([line + b"\n" for line in lines])
        return next(self._ahead, None)

    def _skip(self) -> None:
        """Skips the rest of a line that is too long, and raises _TooLong."""
        self.at += len(self._half)
        self._half = bytearray()
        while raw := self._body.read(self._next, self._next + _READ_BYTES):
            newline = raw.find(b"\n") + 1
            self._next += newline or len(raw)
            self.at += newline or len(raw)
            if newline:
                break
        raise _TooLong(f"the line is {TOO_LONG}")
