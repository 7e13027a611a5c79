"""Readers of raw inputs, one file per kind; a kind is chosen by the object's suffix.

A reader is opened on one object. It cuts it into spans without reading it whole, and yields the rows that *start* in a
span, each with its position in the object, so that spans can be read alone and in any order.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol, cast

from trainer.data.rows import Fault, Row
from trainer.errors import InputError
from trainer.registry import Registry
from trainer.storage import Storage, locate

READERS = Registry(
    "data reader",
    {
        "jsonl": "trainer.data.readers.jsonl:JsonLines",
        "parquet": "trainer.data.readers.parquet:Parquet",
    },
)

SUFFIXES = {"jsonl": "jsonl", "ndjson": "jsonl", "json": "jsonl", "parquet": "parquet", "pq": "parquet"}


class Piece(NamedTuple):
    """A span of one object, ``start`` to ``stop`` in the reader's own unit, and its size in bytes."""

    start: int
    stop: int
    size: int


class Reader(Protocol):
    """No larger than what preparing asks of an object: where it may be cut, its rows, and how to name a row's place."""

    def __init__(self, storage: Storage, key: str, size: int) -> None: ...

    def cut(self) -> list[Piece]: ...

    def rows(self, start: int, stop: int) -> Iterator[tuple[int, Row | Fault]]: ...

    def place(self, row: int) -> str: ...


def reader_name(url: str) -> str:
    """The reader for this object's suffix; InputError when there is none."""
    name = url.rstrip("/").rsplit("/", 1)[-1]
    suffix = name.rsplit(".", 1)[-1].lower() if "." in name else ""
    if suffix not in SUFFIXES:
        known = ", ".join(f".{s}" for s in SUFFIXES)
        raise InputError(f"{url}: no reader for a file with the suffix {suffix!r}; those that can be read are {known}")
    return SUFFIXES[suffix]


def open_reader(url: str, size: int) -> Reader:
    storage, key = locate(url)
    kind = cast("type[Reader]", READERS.load(reader_name(url)))
    return kind(storage, key, size)
