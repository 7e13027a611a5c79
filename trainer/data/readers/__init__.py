"""Readers of raw inputs, one file per kind; a kind is chosen by the object's suffix.

A reader is opened on one object. It cuts it into spans without holding it whole, and yields the rows that *start* in a
span, each with its position in the object, so that spans can be read alone and in any order.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple, Protocol, cast

from trainer.data.readers.body import Body, ObjectBody, unpacked
from trainer.data.sample import Row, RowError
from trainer.data.spec import FrozenObject, FrozenSource
from trainer.errors import InputError
from trainer.registry import Registry
from trainer.storage import locate

READERS = Registry(
    "data reader",
    {
        "jsonl": "trainer.data.readers.jsonl:JsonLinesReader",
        "json": "trainer.data.readers.json_array:open_json",
        "csv": "trainer.data.readers.csv_rows:Csv",
        "tsv": "trainer.data.readers.tsv:Tsv",
        "text": "trainer.data.readers.text:TextLines",
        "document": "trainer.data.readers.text:TextDocument",
        "parquet": "trainer.data.readers.parquet:Parquet",
        "hub": "trainer.data.readers.hub:Hub",
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
"""Suffixes of compressed objects, each with pyarrow's name of the codec; the suffix before it says what is inside."""

_WITH_HEADER = ("csv", "tsv")


class InputSlice(NamedTuple):
    """A span of one object, ``start`` to ``stop`` in the reader's own unit, and its size in bytes."""

    start: int
    stop: int
    size: int


class Reader(Protocol):
    """No larger than what preparing asks of an object: where it may be cut, its rows, and how to name a row's place."""

    def cut(self) -> Iterable[InputSlice]: ...

    def rows(self, start: int, stop: int) -> Iterator[tuple[int, Row | RowError]]: ...

    def place(self, row: int) -> str: ...


def reader_name(url: str) -> str:
    """The reader for this object's suffix; InputError when there is none."""
    suffix, codec = _suffixes(url)
    if suffix in SUFFIXES:
        return SUFFIXES[suffix]
    known = ", ".join(f".{s}" for s in SUFFIXES)
    what = f"a compressed file with {suffix!r} before its suffix" if codec else f"a file with the suffix {suffix!r}"
    raise InputError(f"{url}: no reader for {what}; those that can be read are {known}, each also with .gz or .zst")


def _suffixes(url: str) -> tuple[str, str | None]:
    """The suffix that says what the object holds, and the codec that it is compressed with."""
    parts = url.rstrip("/").rsplit("/", 1)[-1].lower().split(".")
    codec = CODECS.get(parts[-1]) if len(parts) > 1 else None
    if codec is not None:
        parts.pop()
    return parts[-1] if len(parts) > 1 else "", codec


def open_reader(source: FrozenSource, frozen: FrozenObject) -> Reader:
    """The reader of one of a source's objects. InputError for a setting of the source that means nothing to it."""
    if source.is_hub:
        return cast("Reader", READERS.load("hub")(frozen))
    name = reader_name(frozen.url)
    if source.header is not None and name not in _WITH_HEADER:
        raise InputError(f"{frozen.url}: header names the columns of CSV and TSV files, and this is none; leave it out")
    if source.sample_by != "line" and name != "text":
        raise InputError(f"{frozen.url}: sample_by is about text files (.txt), and this is none; leave it out")
    kind = READERS.load("document" if source.sample_by == "document" else name)
    options = {"header": source.header} if name in _WITH_HEADER else {}
    return cast("Reader", kind(_open_body(frozen), **options))


def rows_of(source: FrozenSource) -> Iterator[Row | RowError]:
    """Every row of a source in its order, read in this process."""
    for frozen in source.objects:
        reader = open_reader(source, frozen)
        for piece in reader.cut():
            yield from (row for _, row in reader.rows(piece.start, piece.stop))


def _open_body(frozen: FrozenObject) -> Body:
    storage, key = locate(frozen.url)
    plain = ObjectBody(storage, key, frozen.size)
    codec = _suffixes(frozen.url)[1]
    return plain if codec is None else unpacked(plain, codec, frozen.etag)
