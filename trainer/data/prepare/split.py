"""Cuts raw inputs into spans, and groups the spans into windows that can be prepared independently."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

from trainer.data.readers import open_reader
from trainer.data.readers.body import SPAN_BYTES
from trainer.data.seeding import permutation
from trainer.data.spec import FrozenSource

WINDOW_BYTES = 32 << 20


class Span(NamedTuple):
    """A span of one input object, by the indexes of source and object, in the reader's unit; ``size`` is in bytes.
    ``rows``: only so many of its rows are used; None for all."""

    source: int
    object: int
    start: int
    stop: int
    size: int
    rows: int | None = None


def cut(sources: Sequence[FrozenSource], span_bytes: int = SPAN_BYTES) -> list[Span]:
    """Returns all spans of all sources, in order.

    Line files are cut by their sizes, parquet by its footer. Files that must be parsed (JSON arrays, CSV) or unpacked
    to be cut are read once, in bounded memory.
    """
    found: list[Span] = []
    for i, source in enumerate(sources):
        readers = (open_reader(source, frozen, span_bytes) for frozen in source.objects)
        spans = (Span(i, j, s.start, s.stop, s.size) for j, reader in enumerate(readers) for s in reader.cut())
        found += _limited(spans, source)
    return found


def _limited(spans: Iterable[Span], source: FrozenSource) -> Iterator[Span]:
    """Yields the spans that hold the source's first ``limit`` rows, which are read to be counted."""
    left = source.limit
    for span in spans:
        if left is None:
            yield span
            continue
        if not left:
            return
        rows = open_reader(source, source.objects[span.object]).rows(span.start, span.stop)
        there = sum(1 for _ in islice(rows, left))
        yield span._replace(rows=there)
        left -= there


def windows(spans: Sequence[Span], key: str, window_bytes: int = WINDOW_BYTES) -> list[tuple[Span, ...]]:
    """Permutes the spans by ``key``, and groups them into windows of about ``window_bytes`` of input and similar size.

    So a window contains spans of all sources and objects, in proportion to their sizes.
    """
    order = [spans[i] for i in permutation(len(spans), "spans", key)]
    total = sum(s.size for s in spans)
    count = max(1, min(len(spans), round(total / window_bytes)))
    groups: list[list[Span]] = [[] for _ in range(count)]
    before = 0
    for span in order:
        middle = before + span.size / 2
        groups[min(int(middle * count / max(total, 1)), count - 1)].append(span)
        before += span.size
    return [tuple(g) for g in groups if g]
