"""JSON Lines: an object with the columns on each line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from trainer.data.readers.lines import LineReader, excerpt
from trainer.data.rows import Fault, Row
from trainer.errors import InputError


class JsonLines(LineReader):
    def lines(self, start: int, stop: int) -> Iterator[tuple[int, bytes]]:
        for offset, line in super().lines(start, stop):
            if offset == 0 and line.lstrip()[:1] == b"[":
                raise InputError(
                    f"{self.body.url}: opens with '[', which looks like a JSON array; one JSON object per line is read "
                    "here: name it .json, or convert it with jq -c '.[]' FILE"
                )
            yield offset, line

    def parse(self, line: bytes) -> Row | Fault:
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            return Fault(f"not valid JSON ({error.msg.removesuffix(' at')}, column {error.colno}): {excerpt(line)}")
        except (ValueError, RecursionError) as error:
            return Fault(f"not valid JSON ({error}): {excerpt(line)}")
        return row_of(value)


def row_of(value: Any) -> Row | Fault:
    """A parsed value as a row, which has to be an object."""
    if isinstance(value, dict):
        return value
    return Fault(f"a JSON {type(value).__name__} where an object with the columns was expected: {value!r:.60}")
