"""JSON Lines: spans are byte ranges, a line belongs to the span in which it starts, a row is its line's byte offset."""

from __future__ import annotations

import json
from collections.abc import Iterator

from trainer.data.readers import Piece
from trainer.data.rows import Fault, Row
from trainer.errors import InputError
from trainer.storage import Storage

SPAN_BYTES = 2 << 20
_LOOK_AHEAD = 64 << 10
_BOM = b"\xef\xbb\xbf"


class JsonLines:
    def __init__(self, storage: Storage, key: str, size: int, span_bytes: int = SPAN_BYTES) -> None:
        self.storage, self.key, self.size, self.span_bytes = storage, key, size, span_bytes

    def cut(self) -> list[Piece]:
        starts = range(0, self.size, self.span_bytes)
        return [Piece(s, min(s + self.span_bytes, self.size), min(self.span_bytes, self.size - s)) for s in starts]

    def rows(self, start: int, stop: int) -> Iterator[tuple[int, Row | Fault]]:
        """Rows of the lines that start in [start, stop); the last one is read to its end, blank lines are left out."""
        first = max(start - 1, 0)
        body = self.storage.read_range(self.key, first, stop)
        at = 0 if start == 0 else body.find(b"\n") + 1
        if start > 0 and at == 0:
            return
        body += self._rest_of_line(stop) if not body.endswith(b"\n") else b""
        if first == 0:
            self._refuse_array(body)
        while at < len(body):
            end = body.find(b"\n", at)
            end = len(body) if end < 0 else end
            line = body[at:end]
            if line.strip():
                yield first + at, parse_line(line.removeprefix(_BOM) if first + at == 0 else line)
            at = end + 1

    def _rest_of_line(self, position: int) -> bytes:
        """From ``position`` up to the next newline, read in growing pieces: a line may be longer than a span."""
        rest, ahead = b"", _LOOK_AHEAD
        while position < self.size:
            piece = self.storage.read_range(self.key, position, min(position + ahead, self.size))
            newline = piece.find(b"\n")
            if newline >= 0:
                return rest + piece[:newline]
            rest, position, ahead = rest + piece, position + len(piece), ahead * 2
        return rest

    def _refuse_array(self, body: bytes) -> None:
        if body.removeprefix(_BOM).lstrip()[:1] == b"[":
            raise InputError(
                f"{self.storage.url}/{self.key}: opens with '[', which looks like a JSON array; one JSON object per "
                "line is read here: convert it with jq -c '.[]' FILE"
            )

    def place(self, row: int) -> str:
        """The line number of a byte offset, found by counting the newlines before it: for error messages only."""
        count, step = 1, 8 << 20
        for start in range(0, row, step):
            count += self.storage.read_range(self.key, start, min(start + step, row)).count(b"\n")
        return f"line {count}"


def parse_line(line: bytes) -> Row | Fault:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        return Fault(f"not valid JSON ({error.msg.removesuffix(' at')}, column {error.colno}): {_excerpt(line)}")
    except (ValueError, RecursionError) as error:
        return Fault(f"not valid JSON ({error}): {_excerpt(line)}")
    if not isinstance(value, dict):
        return Fault(f"a JSON {type(value).__name__} where an object with the columns was expected: {_excerpt(line)}")
    return value


def _excerpt(line: bytes, width: int = 60) -> str:
    text = line.decode("utf-8", "replace").strip()
    return text if len(text) <= width else text[:width] + "…"
