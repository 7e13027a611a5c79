"""Where raw inputs are cut, and how the pieces are grouped into windows that can be prepared alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from trainer.data.readers import open_reader
from trainer.data.seeding import permutation
from trainer.data.spec import FrozenSource

WINDOW_BYTES = 32 << 20


class Span(NamedTuple):
    """A piece of one input object, by the indexes of its source and object, in its reader's unit; ``size`` in bytes."""

    source: int
    object: int
    start: int
    stop: int
    size: int


def cut(sources: Sequence[FrozenSource]) -> list[Span]:
    """All spans of all sources, in their order. Line files are cut by their sizes alone; parquet by its footer; what
    has to be parsed to be cut (JSON arrays, CSV) or unpacked is read once, in bounded memory."""
    return [
        Span(i, j, piece.start, piece.stop, piece.size)
        for i, source in enumerate(sources)
        for j, frozen in enumerate(source.objects)
        for piece in open_reader(source, frozen).cut()
    ]


def windows(spans: Sequence[Span], key: str, window_bytes: int = WINDOW_BYTES) -> list[tuple[Span, ...]]:
    """The spans, permuted by ``key``, in windows of about ``window_bytes`` of input and of nearly equal size.

    A window so holds pieces of all sources and objects, in their proportions.
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
