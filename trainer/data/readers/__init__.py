"""Readers of raw inputs, one file per kind. The object's suffix selects the kind.

A reader is opened on one object. It cuts the object into spans without holding all of it in memory, and yields the rows
that *start* in a span, each with its position in the object. So spans can be read independently and in any order.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import NamedTuple, Protocol, cast

from trainer.data.readers.body import SPAN_BYTES, Body, ObjectBody, unpacked
from trainer.data.sample import Row, RowError
from trainer.data.spec import FrozenObject, FrozenSource
from trainer.errors import InputError
from trainer.registry import Choice, Registry
from trainer.storage import locate

READERS = Registry(
    "data reader",
    {
        "jsonl": Choice("trainer.data.readers.jsonl:JsonLinesReader"),
        "json": Choice("trainer.data.readers.json_array:open_json"),
        "csv": Choice("trainer.data.readers.csv_rows:Csv"),
        "tsv": Choice("trainer.data.readers.tsv:Tsv"),
        "text": Choice("trainer.data.readers.text:TextLines"),
        "document": Choice("trainer.data.readers.text:TextDocument"),
        "parquet": Choice("trainer.data.readers.parquet:Parquet"),
        "hub": Choice("trainer.data.readers.hub:Hub"),
    },
)

SUFFIXES = {
    "jsonl": "jsonl",
    "ndjson": "jsonl",
    "json": "json",
    "csv": "csv",
    "tsv": "tsv",
    "tab": "tsv",
    "txt": "text",
    "text": "text",
    "parquet": "parquet",
    "pq": "parquet",
}

CODECS = {"gz": "gzip", "gzip": "gzip", "zst": "zstd", "zstd": "zstd"}
"""Suffixes of compressed objects, with pyarrow's names of the codecs. The suffix before it is that of the contents."""

_WITH_HEADER = ("csv", "tsv")


class InputSlice(NamedTuple):
    """A span of one object, [``start``, ``stop``) in the reader's own unit, and its size in bytes."""

    start: int
    stop: int
    size: int


class Reader(Protocol):
    """The operations that preparation needs: cut an object into spans, read a span's rows, and name a row's place.

    Positions are in the reader's own unit: bytes, or rows.
    """

    def cut(self) -> Iterable[InputSlice]: ...

    def rows(self, start: int, stop: int) -> Iterator[tuple[int, Row | RowError]]: ...

    def place(self, row: int) -> str: ...


def reader_name(url: str) -> str:
    """Returns the name of the reader for the object's suffix. Raises InputError if there is none."""
    suffix, codec = _suffixes(url)
    if suffix in SUFFIXES:
        return SUFFIXES[suffix]
    known = ", ".join(f".{s}" for s in SUFFIXES)
    what = f"a compressed file with {suffix!r} before its suffix" if codec else f"a file with the suffix {suffix!r}"
    raise InputError(f"{url}: no reader for {what}; the supported suffixes are {known}, each also with .gz or .zst")


def _suffixes(url: str) -> tuple[str, str | None]:
    """Returns the suffix of the contents (lower case, "" without one), and the codec of a compressed object."""
    parts = url.rstrip("/").rsplit("/", 1)[-1].lower().split(".")
    codec = CODECS.get(parts[-1]) if len(parts) > 1 else None
    if codec is not None:
        parts.pop()
    return parts[-1] if len(parts) > 1 else "", codec


def open_reader(source: FrozenSource, frozen: FrozenObject, span_bytes: int = SPAN_BYTES) -> Reader:
    """Opens the reader of one of a source's objects. ``span_bytes``: for files whose spans are ranges of bytes. Raises
    InputError for a setting that has no effect on its kind."""
    if source.is_hub:
        return cast("Reader", READERS.load("hub")(frozen))
    name = reader_name(frozen.url)
    if source.header is not None and name not in _WITH_HEADER:
        raise InputError(f"{frozen.url}: header names the columns of CSV and TSV files, and this is none; leave it out")
    if source.sample_by != "line" and name != "text":
        raise InputError(f"{frozen.url}: sample_by is about text files (.txt), and this is none; leave it out")
    kind = READERS.load("document" if source.sample_by == "document" else name)
    options = {"header": source.header} if name in _WITH_HEADER else {}
    storage, key = locate(frozen.url)
    body: Body = ObjectBody(storage, key, frozen.size, span_bytes)
    codec = _suffixes(frozen.url)[1]
    if codec is not None:
        body = unpacked(body, codec, frozen.etag)
    return cast("Reader", kind(body, **options))


def rows_of(source: FrozenSource) -> Iterator[Row | RowError]:
    """Yields every row of a source in order, up to its limit, read in this process."""
    readers = (open_reader(source, frozen) for frozen in source.objects)
    rows = (row for reader in readers for piece in reader.cut() for _, row in reader.rows(piece.start, piece.stop))
    return islice(rows, source.limit)
