"""TSV: a line is a row, a tab ends a field, and a quote is an ordinary character, as in MRPC's files.

A file whose quoted fields contain tabs or newlines is not supported. The suffix .csv reads quoted fields, but separates
fields by commas only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from trainer.data.readers.body import Body
from trainer.data.readers.lines import BOM, LineReader, check_lines, rest_of_line
from trainer.data.sample import Row, RowError
from trainer.errors import InputError
from trainer.parsing import is_unicode


class Tsv(LineReader):
    """A TSV file. ``header`` names the columns of a file without a header, whose first line is a row."""

    def __init__(self, body: Body, header: Sequence[str] | None = None) -> None:
        super().__init__(body)
        self.has_header = header is None
        if header is None:
            line = rest_of_line(body, 0)
            if isinstance(line, RowError):
                raise InputError(f"{body.url}: the header, its first line, is {line.reason}")
            check_lines(body)
            header = fields_of(line.removeprefix(BOM))
        self.names = tuple(header)
        check_names(self.names, body.url)

    def lines(self, start: int, stop: int) -> Iterator[tuple[int, bytes | RowError]]:
        lines = super().lines(start, stop)
        return (line for line in lines if line[0] > 0) if self.has_header else lines

    def parse(self, line: bytes) -> Row | RowError:
        return row_of_fields(self.names, fields_of(line))


def fields_of(line: bytes) -> list[str]:
    # Bytes that are not UTF-8 become lone surrogates. The format that reads this field reports them.
    return line.removesuffix(b"\r").decode("utf-8", "surrogateescape").split("\t")


def row_of_fields(names: Sequence[str], fields: Sequence[str]) -> Row | RowError:
    if len(fields) == len(names):
        return dict(zip(names, fields, strict=True))
    return RowError(f"{len(fields)} fields where the header has {len(names)} ({', '.join(names)})"[:300])


def check_names(names: Sequence[str], url: str) -> None:
    """Raises InputError if two columns have the same name, or a name is not valid Unicode."""
    if not is_unicode("".join(names)):
        raise InputError(f"{url}: the header is not text in UTF-8; save the file as UTF-8")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(
            f"{url}: the header has {twice[0]!r} twice; if the file has no header line, name the columns with header"
        )
