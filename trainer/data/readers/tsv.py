"""TSV: a line is a row, a tab ends a field, and a quote is a character like any other, as in MRPC's files.

What has quoted fields, with tabs or newlines in them, is a CSV file by another name: the suffix .csv takes it with its
commas only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from trainer.data.readers.body import Body
from trainer.data.readers.lines import BOM, LineReader, rest_of_line
from trainer.data.sample import Row, RowError
from trainer.errors import InputError
from trainer.parsing import is_unicode


class Tsv(LineReader):
    """``header`` names the columns of a file whose first line is a row already."""

    def __init__(self, body: Body, header: Sequence[str] | None = None, span_bytes: int | None = None) -> None:
        super().__init__(body, span_bytes)
        self.has_header = header is None
        self.names = tuple(header) if header is not None else self._read_header()
        check_names(self.names, body.url)

    def _read_header(self) -> tuple[str, ...]:
        line = rest_of_line(self.body, 0)
        if isinstance(line, RowError):
            raise InputError(f"{self.body.url}: the header, its first line, is {line.reason}")
        return tuple(fields_of(line.removeprefix(BOM)))

    def lines(self, start: int, stop: int) -> Iterator[tuple[int, bytes | RowError]]:
        lines = super().lines(start, stop)
        return (line for line in lines if line[0] > 0) if self.has_header else lines

    def parse(self, line: bytes) -> Row | RowError:
        return row_of_fields(self.names, fields_of(line))


def fields_of(line: bytes) -> list[str]:
    # What is no UTF-8 becomes a lone surrogate, which the format that wants this field finds and names.
    return line.removesuffix(b"\r").decode("utf-8", "surrogateescape").split("\t")


def row_of_fields(names: Sequence[str], fields: Sequence[str]) -> Row | RowError:
    if len(fields) == len(names):
        return dict(zip(names, fields, strict=True))
    return RowError(f"{len(fields)} fields where the header has {len(names)} ({', '.join(names)})"[:300])


def check_names(names: Sequence[str], url: str) -> None:
    """Raises InputError where a column could not be told from another one, or not be named."""
    if not is_unicode("".join(names)):
        raise InputError(f"{url}: the header is not text in UTF-8; save the file as UTF-8")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(
            f"{url}: the header has {twice[0]!r} twice; if the first line is a row already, name the columns by header"
        )
