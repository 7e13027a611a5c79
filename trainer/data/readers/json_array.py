"""A JSON array of objects. Spans start at elements; a row's position is its element's byte offset.

The start of an element depends on all bytes before it. So `JsonArray.cut` parses the complete array once, piece by
piece. A span can then be read on its own.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from trainer.data.readers import InputSlice
from trainer.data.readers.body import Body
from trainer.data.readers.jsonl import JsonLinesReader, row_of
from trainer.data.readers.lines import BOM, line_of
from trainer.data.sample import ROW_BYTES, TOO_LONG, Row, RowError
from trainer.errors import InputError
from trainer.parsing import JsonReader, Malformed

_READ_BYTES = 1 << 20
_SPACE = " \t\r\n"


def open_json(body: Body) -> JsonArray | JsonLinesReader:
    """Opens a file named .json: an array, or one object per line, by its first character."""
    head = body.read(0, 4096).removeprefix(BOM)
    return JsonArray(body) if head.lstrip()[:1] == b"[" else JsonLinesReader(body)


class JsonArray:
    def __init__(self, body: Body, read_bytes: int = _READ_BYTES) -> None:
        self.body, self.read_bytes = body, read_bytes

    def cut(self) -> Iterator[InputSlice]:
        start = end = None
        first = self.body.read(0, 4096).index(b"[") + 1  # `open_json` has found the bracket there
        for element in self._elements(first):
            if start is not None and element.offset - start >= self.body.span_bytes:
                yield InputSlice(start, element.offset, element.offset - start)
                start = None
            start, end = element.offset if start is None else start, element.end
        if start is not None and end is not None:
            yield InputSlice(start, end, end - start)

    def rows(self, start: int, stop: int) -> Iterator[tuple[int, Row | RowError]]:
        for element in self._elements(start):
            if element.offset >= stop:
                return
            fault = element.fault
            yield element.offset, row_of(element.value) if fault is None else RowError(f"not usable JSON ({fault})")
            if element.end >= stop:
                return

    def place(self, row: int) -> str:
        return line_of(self.body, row)

    def _elements(self, start: int) -> Iterator[Element]:
        """Yields the elements from ``start`` to the end of the array. An element or the closing bracket is at
        ``start``."""
        text = _DecodedBody(self.body, start, self.read_bytes)
        if text.peek() == "]":
            return
        while True:
            yield text.element()
            mark = text.peek()
            if mark == "]":
                return
            if mark != ",":
                raise text.fault(f"{mark!r} where ',' or ']' is expected" if mark else "the closing ']' is missing")
            text.skip()


class Element(NamedTuple):
    """A parsed element, its first byte and its end, and the reason if it must not be used."""

    offset: int
    end: int
    value: Any
    fault: str | None


class _DecodedBody:
    """The body from ``start``, decoded piece by piece. ``text[at:]`` is the text not parsed yet; it starts at byte
    ``offset``."""

    def __init__(self, body: Body, start: int, read_bytes: int) -> None:
        self.body, self.read_bytes = body, read_bytes
        self.text, self.at, self.offset = "", 0, start
        self._next, self._half = start, b""
        self._reader = JsonReader(finite=False)

    def peek(self) -> str:
        """Skips white space. Returns the next character; '' at the end of the body."""
        while True:
            while self.at < len(self.text):
                if self.text[self.at] not in _SPACE:
                    return self.text[self.at]
                self.skip()
            if not self._more(self.read_bytes):
                return ""

    def skip(self) -> None:
        self._advance(self.at + 1)

    def element(self) -> Element:
        """Parses the next element. Raises InputError if it cannot be read to its end: the next one cannot be found
        then."""
        self.peek()
        size = self.read_bytes
        while True:
            try:
                value, end = self._reader.read_at(self.text, self.at)
                # A number at the end of the text may continue in the next piece.
                if end < len(self.text) or not self._more(size):
                    start, fault = self.offset, self._reader.fault
                    self._advance(end)
                    return Element(start, self.offset, value, fault)
            except Malformed as error:
                raise self.fault(str(error)) from error
            except json.JSONDecodeError as error:
                # Only an error at the end of the text can be due to a missing piece.
                if not error.msg.startswith("Unterminated string") and error.pos < len(self.text) - 12:
                    raise self.fault(error.msg.removesuffix(" at")) from error
                if len(self.text) - self.at > ROW_BYTES:
                    raise self.fault(f"the element that starts there is {TOO_LONG}") from error
                if not self._more(size):
                    raise self.fault(error.msg.removesuffix(" at")) from error
            size = min(2 * size, ROW_BYTES)

    def fault(self, reason: str) -> InputError:
        return InputError(f"{self.body.url}, {line_of(self.body, self.offset)}: not valid JSON ({reason})")

    def _advance(self, to: int) -> None:
        passed = self.text[self.at : to]
        self.offset += len(passed) if passed.isascii() else len(passed.encode())
        self.at = to

    def _more(self, size: int) -> bool:
        raw = self.body.read(self._next, self._next + size)
        self._next += len(raw)
        try:
            new, used = codecs.utf_8_decode(self._half + raw, "strict", not raw)
        except UnicodeDecodeError as error:
            raise self.fault(f"not UTF-8: {error.reason}, some bytes further on") from error
        self._half = (self._half + raw)[used:]
        self.text, self.at = self.text[self.at :] + new, 0
        return bool(raw)
