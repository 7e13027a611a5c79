"""Files of lines. Spans are byte ranges, and a line belongs to the span in which it starts. A row's position is its
line's byte offset."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

from trainer.data.readers import InputSlice
from trainer.data.readers.body import Body
from trainer.data.sample import ROW_BYTES, TOO_LONG, Row, RowError
from trainer.errors import InputError

BOM = b"\xef\xbb\xbf"
UTF16 = (b"\xff\xfe", b"\xfe\xff")
_LOOK_AHEAD, _FURTHEST_AHEAD = 64 << 10, 8 << 20
_EXCERPT = 60


class LineReader(ABC):
    """Reads lines. A subclass implements `parse`, which converts a line to a row. Blank lines are skipped."""

    def __init__(self, body: Body) -> None:
        self.body = body

    @abstractmethod
    def parse(self, line: bytes) -> Row | RowError:
        """Converts one line, without its newline, to a row."""

    def cut(self) -> Iterator[InputSlice]:
        check_lines(self.body)
        start = 0
        while (stop := self.body.clip(start + self.body.span_bytes)) > start:
            yield InputSlice(start, stop, stop - start)
            start = stop

    def rows(self, start: int, stop: int) -> Iterator[tuple[int, Row | RowError]]:
        for offset, line in self.lines(start, stop):
            yield offset, line if isinstance(line, RowError) else self.parse(line)

    def lines(self, start: int, stop: int) -> Iterator[tuple[int, bytes | RowError]]:
        """Yields the lines that start in [start, stop), each with its offset. The last one is read to its end, beyond
        ``stop``; it is a RowError if it is too long."""
        first = max(start - 1, 0)
        text = self.body.read(first, stop)
        at = 0 if start == 0 else text.find(b"\n") + 1
        if start > 0 and at == 0:
            return
        *whole, last = text[at:].split(b"\n")
        for line in whole:
            if fault_or_line := self._line(first + at, line):
                yield first + at, fault_or_line
            at += len(line) + 1
        if last:
            rest = rest_of_line(self.body, stop)
            line_or_fault = rest if isinstance(rest, RowError) else self._line(first + at, last + rest)
            if line_or_fault:
                yield first + at, line_or_fault

    def _line(self, offset: int, line: bytes) -> bytes | RowError | None:
        """Returns None for a blank line."""
        if not line.strip():
            return None
        if len(line) > ROW_BYTES:
            return RowError(TOO_LONG)
        return line.removeprefix(BOM) if offset == 0 else line

    def place(self, row: int) -> str:
        return line_of(self.body, row)


def check_lines(body: Body) -> None:
    """Raises InputError for a file whose beginning is UTF-16, or whose lines end with a carriage return alone."""
    head = body.read(0, _LOOK_AHEAD)
    if head[:2] in UTF16 or head[:200].count(b"\0") > len(head[:200]) // 4:
        raise InputError(
            f"{body.url}: this is UTF-16 text, and UTF-8 is read; convert it: iconv -f UTF-16 -t UTF-8 FILE"
        )
    if b"\n" not in head and b"\r" in head.rstrip(b"\r"):
        raise InputError(
            f"{body.url}: its lines end with a carriage return (CR) alone, as on old Macintoshes, and line feeds are "
            "expected; convert it: tr '\\r' '\\n' < FILE"
        )


def rest_of_line(body: Body, position: int) -> bytes | RowError:
    """Returns the bytes from ``position`` to the next newline; a RowError if they are more than a row may have."""
    # Pieces grow, since a line may be longer than a span.
    rest, ahead = b"", _LOOK_AHEAD
    while piece := body.read(position, position + ahead):
        newline = piece.find(b"\n")
        if newline >= 0:
            return rest + piece[:newline]
        rest, position, ahead = rest + piece, position + len(piece), min(ahead * 2, _FURTHEST_AHEAD)
        if len(rest) > ROW_BYTES:
            return RowError(TOO_LONG)
    return rest


def line_of(body: Body, offset: int) -> str:
    """Returns the line number of a byte offset. Slow, for error messages only: it counts all newlines before it."""
    count, step = 1, 8 << 20
    for start in range(0, offset, step):
        count += body.read(start, min(start + step, offset)).count(b"\n")
    return f"line {count}"


def excerpt(line: bytes) -> str:
    text = line.decode("utf-8", "replace").strip()
    return text if len(text) <= _EXCERPT else text[:_EXCERPT] + "…"
