"""Prepares one window: reads its spans, tokenises, and puts its objects. Runs here, in a pool, or in a Ray task."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple

from trainer.data.blocks import (
    BLOCK_BYTES,
    BadRow,
    Counts,
    WindowIndex,
    WindowMeta,
    WindowWriter,
    decode_index,
    part_of_row,
    turn_of_row,
)
from trainer.data.prepare.encode import RowEncoder
from trainer.data.prepare.freeze import check_objects
from trainer.data.prepare.split import Span
from trainer.data.readers import Reader, open_reader
from trainer.data.sample import RowError, Sample, fit
from trainer.data.spec import FrozenObject, PreparationSpec
from trainer.errors import CorruptObject, InputError
from trainer.parsing import Malformed
from trainer.storage import Storage, open_storage

BATCH_ROWS = 512
LISTED_BAD_ROWS = 20


class WindowJob(NamedTuple):
    """A window to prepare: its number, and its spans of input."""

    window: int
    spans: tuple[Span, ...]


@dataclass
class WindowEntry:
    """A window's entry in the manifest: its index's key and sha256, the counts and the warnings per source,
    and the first bad rows."""

    index: str
    sha256: str
    counts: list[Counts]
    bad_rows: list[BadRow] = field(default_factory=list)
    warnings: list[list[str]] = field(default_factory=list)


@dataclass(frozen=True)
class WindowTask:
    """A callable: ``task(job)`` prepares one window. It can be pickled, and has only the data that all windows
    share."""

    spec: PreparationSpec
    tokenizer: Any
    url: str
    block_bytes: int = BLOCK_BYTES

    def __call__(self, job: WindowJob) -> WindowEntry:
        """Prepares the window, and puts its data, then its index. An index that another writer has put first is kept.

        Raises InputError if there are more bad rows than allowed, or if an input has changed since it was frozen.
        """
        storage = open_storage(self.url)
        objects = [self.spec.sources[s.source].objects[s.object] for s in job.spans]
        try:
            key, data, index = _Window(self.spec, self.tokenizer, self.block_bytes).build(job)
        except (InputError, CorruptObject, FileNotFoundError):
            check_objects(objects)  # if an object has changed, that is the cause to report
            raise
        check_objects(sorted(set(objects)))
        storage.put_if_absent(key, data)
        if not storage.put_if_absent(index_key(job.window), index):
            index = storage.read(index_key(job.window))
        return entry_of(storage, job.window, index)


def index_key(window: int) -> str:
    return f"w{window:06d}.index"


def entry_of(storage: Storage, window: int, index: bytes) -> WindowEntry:
    meta: WindowMeta = open_index(storage, index_key(window), index).meta
    return WindowEntry(index_key(window), hashlib.sha256(index).hexdigest(), meta.counts, meta.bad_rows, meta.warnings)


def open_index(storage: Storage, key: str, raw: bytes) -> WindowIndex:
    """Decodes a window's index. Raises CorruptObject for other bytes."""
    try:
        return decode_index(raw)
    except Malformed as error:
        raise CorruptObject(
            f"{storage.uri(key)}: {error}; delete the folder {storage.url}, and run again to prepare the data again"
        ) from error


class _Window:
    """The samples, counts and bad rows of a window that is being prepared."""

    def __init__(self, spec: PreparationSpec, tokenizer: Any, block_bytes: int) -> None:
        self.spec = spec
        self.encoders = [RowEncoder(source, tokenizer, spec) for source in spec.sources]
        self.counts = [Counts() for _ in spec.sources]
        self.bad_rows: list[BadRow] = []
        self.writer = WindowWriter(block_bytes)

    def build(self, job: WindowJob) -> tuple[str, bytes, bytes]:
        for span in job.spans:
            source = self.spec.sources[span.source]
            frozen = source.objects[span.object]
            self._add_span(span, frozen, open_reader(source, frozen))
        warnings = [list(encoder.warnings) for encoder in self.encoders]
        return self.writer.finish(f"w{job.window:06d}", self.counts, self.bad_rows, warnings)

    def _add_span(self, span: Span, frozen: FrozenObject, reader: Reader) -> None:
        rows = islice(reader.rows(span.start, span.stop), span.rows)
        while batch := list(islice(rows, BATCH_ROWS)):
            for row, samples, _ in self.encoders[span.source].encode(batch):
                self.counts[span.source].rows += 1
                if isinstance(samples, RowError):
                    self._add_bad(span.source, frozen, reader, row, samples)
                elif not samples:
                    self.counts[span.source].dropped += 1
                else:
                    for sample in samples:
                        self._add_sample(span, turn_of_row(row, sample.turn) if len(samples) > 1 else row, sample)

    def _add_sample(self, span: Span, row: int, sample: Sample) -> None:
        fitted, counts = fit(sample, self.spec.sequence_length), self.counts[span.source]
        counts.dropped += not fitted
        for part, piece in enumerate(fitted):
            sides = [side for side in (piece, piece.rejected) if side is not None]
            counts.samples += 1
            counts.tokens += sum(len(side.tokens) for side in sides)
            counts.target_tokens += sum(int(side.target.sum()) for side in sides)
            counts.truncated += piece.truncated
            self.writer.add(span.source, span.object, part_of_row(row, part), piece)

    def _add_bad(self, source: int, frozen: FrozenObject, reader: Reader, row: int, fault: RowError) -> None:
        counts = self.counts[source]
        counts.bad_rows += 1
        if counts.bad_rows > self.spec.max_bad_rows:
            raise too_many_bad_rows(BadRow(frozen.url, reader.place(row), fault.reason), self.spec.max_bad_rows)
        if len(self.bad_rows) < LISTED_BAD_ROWS:
            self.bad_rows.append(BadRow(frozen.url, reader.place(row), fault.reason))


def too_many_bad_rows(bad: BadRow, allowed: int) -> InputError:
    more = f"; {allowed} bad rows per source are allowed (data.max_bad_rows), and this is one more" if allowed else ""
    return InputError(f"{bad.url}, {bad.place}: {bad.reason}{more}")
