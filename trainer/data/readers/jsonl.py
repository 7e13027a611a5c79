"""JSON Lines: each line is an object with the columns."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from trainer.data.readers.body import Body
from trainer.data.readers.lines import LineReader, excerpt
from trainer.data.sample import Row, RowError
from trainer.errors import InputError
from trainer.parsing import JsonReader, Malformed, is_unicode


class JsonLinesReader(LineReader):
    def __init__(self, body: Body) -> None:
        super().__init__(body)
        self._reader = JsonReader(finite=False)

    def lines(self, start: int, stop: int) -> Iterator[tuple[int, bytes | RowError]]:
        for offset, line in super().lines(start, stop):
            if offset == 0 and isinstance(line, bytes) and line.lstrip()[:1] == b"[":
                raise InputError(
                    f"{self.body.url}: starts with '[', which looks like a JSON array, and this suffix is for one JSON "
                    "object per line; name it .json, or convert it with jq -c '.[]' FILE"
                )
            yield offset, line

    def parse(self, line: bytes) -> Row | RowError:
        try:
            value = self._reader.read(line)
        except Malformed as error:
            return RowError(f"not valid JSON ({error}): {excerpt(line)}")
        return row_of(value)


def row_of(value: Any) -> Row | RowError:
    """Returns a parsed value as a row; a RowError if it is not an object, or a key is not valid Unicode."""
    if not isinstance(value, dict):
        return RowError(f"a JSON {type(value).__name__} where an object with the columns was expected: {value!r:.60}")
    if not is_unicode("".join(value)):
        return RowError("the name of a column holds half of a surrogate pair, which is no text")
    return value
