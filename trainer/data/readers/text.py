"""Plain text: each line is a row (``sample_by: line``), or the complete file is one (``sample_by: document``). The
column is named ``text``."""

from __future__ import annotations

from collections.abc import Iterator

from trainer.data.readers import InputSlice
from trainer.data.readers.body import Body
from trainer.data.readers.lines import BOM, LineReader
from trainer.data.sample import Row, RowError
from trainer.errors import InputError

DOCUMENT_BYTES = 256 << 20


class TextLines(LineReader):
    def parse(self, line: bytes) -> Row | RowError:
        return {"text": line.removesuffix(b"\r").decode("utf-8", "surrogateescape")}


class TextDocument:
    def __init__(self, body: Body) -> None:
        self.body = body

    def cut(self) -> list[InputSlice]:
        size = self.body.clip(DOCUMENT_BYTES + 1)
        if size > DOCUMENT_BYTES:
            raise InputError(
                f"{self.body.url}: more than {DOCUMENT_BYTES >> 20} MiB in one document; split the file, or take its "
                "lines as samples (sample_by: line)"
            )
        return [InputSlice(0, size, size)] if size else []

    def rows(self, start: int, stop: int) -> Iterator[tuple[int, Row | RowError]]:
        yield start, {"text": self.body.read(start, stop).removeprefix(BOM).decode("utf-8", "surrogateescape")}

    def place(self, row: int) -> str:
        return "the document"
