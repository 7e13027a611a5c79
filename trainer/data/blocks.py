"""The storage format of a window: one data object of Arrow blocks, and an index that addresses every sample in it.

The data object is a sequence of self-contained Arrow IPC streams of at most ``BLOCK_BYTES``. A block is read by one
ranged read and checked by its sha256. The index is an Arrow IPC stream with a row per sample. Its metadata contains the
block table and the counts, so that planning and resuming read no tokens.
"""

from __future__ import annotations

import hashlib
import json
import mmap
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from trainer.data.sample import Sample
from trainer.data.types import Bools, Floats, Tokens, TokenTypes
from trainer.parsing import Malformed, parse_json
from trainer.records import Count, read_record

BLOCK_BYTES = 8 << 20
_META = b"window"
_PART_SHIFT = 40
"""Bits of a row number (a byte offset in at most 1 TiB). The number of a part of the row is stored above them."""
_TURN = 1 << 22
"""The number of a part from which on it is that of a message in a conversation."""

BLOCK_SCHEMA = pa.schema(
    [
        ("source", pa.int32()),
        ("object", pa.int32()),
        ("row", pa.int64()),
        ("tokens", pa.list_(pa.int32())),
        ("target", pa.list_(pa.bool_())),
    ]
)
"""The columns that every block has. Labelled samples and pairs have more: see `encode_block`."""


class BlockInfo(NamedTuple):
    """The position of a block in its window's data object, in bytes."""

    offset: Count
    length: Count
    sha256: str


class BadRow(NamedTuple):
    """A row that was skipped: its object, its place there ("line 7"), and the reason."""

    url: str
    place: str
    reason: str


@dataclass
class Counts:
    """Counts of the rows of one source and of their samples. ``truncated`` samples are kept, ``dropped`` ones are
    not."""

    rows: Count = 0
    samples: Count = 0
    tokens: Count = 0
    target_tokens: Count = 0
    truncated: Count = 0
    dropped: Count = 0
    bad_rows: Count = 0

    def add(self, other: Counts) -> None:
        for name, value in asdict(other).items():
            setattr(self, name, getattr(self, name) + value)


@dataclass
class WindowMeta:
    """The metadata of a window's index. ``counts`` and ``warnings`` have an entry per source."""

    data: str
    blocks: list[BlockInfo]
    counts: list[Counts]
    bad_rows: list[BadRow] = field(default_factory=list)
    warnings: list[list[str]] = field(default_factory=list)

    def to_bytes(self) -> bytes:
        return json.dumps(asdict(self), sort_keys=True).encode()

    @classmethod
    def from_bytes(cls, raw: bytes) -> WindowMeta:
        """Raises Malformed for bytes that are not such metadata."""
        return read_record(cls, parse_json(raw))


@dataclass(frozen=True)
class WindowIndex:
    """A window's samples as columns [samples], in their stored order."""

    meta: WindowMeta
    source: npt.NDArray[np.int32]
    object: npt.NDArray[np.int32]
    row: npt.NDArray[np.int64]
    length: npt.NDArray[np.int32]
    targets: npt.NDArray[np.int32]
    block: npt.NDArray[np.int32]
    block_row: npt.NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.row)

    def sample_id(self, sample: int) -> str:
        return sample_id(self.source[sample], self.object[sample], self.row[sample])


def sample_id(source: Any, obj: Any, row: Any) -> str:
    """Returns ``<source index>:<object index>/<byte offset or row number>``, the origin of the sample. For a long text
    that was cut into several samples, ``+1``, ``+2``, … follow for the second sample and later ones. For a conversation
    that became several samples, ``#`` and the number of the last message that the sample trains follow."""
    number, part = int(row) & ((1 << _PART_SHIFT) - 1), int(row) >> _PART_SHIFT
    if part >= _TURN:
        return f"{source}:{obj}/{number}#{part - _TURN}"
    return f"{source}:{obj}/{number}+{part}" if part else f"{source}:{obj}/{number}"


def part_of_row(row: int, part: int) -> int:
    """Returns the row number of sample number ``part`` of a row that was cut into several samples."""
    return row | part << _PART_SHIFT


def turn_of_row(row: int, turn: int) -> int:
    """Returns the row number of the sample that trains message ``turn`` last, of a row that became several samples."""
    return row | (_TURN + turn) << _PART_SHIFT


class WindowWriter:
    """Groups samples, added one by one, into blocks. Holds the window's bytes in memory until `finish` returns them."""

    def __init__(self, block_bytes: int = BLOCK_BYTES) -> None:
        self.block_bytes = block_bytes
        self._ids: list[tuple[int, int, int]] = []
        self._samples: list[Sample] = []
        self._size = 0
        self._body = bytearray()
        self._blocks: list[BlockInfo] = []
        self._index: list[tuple[int, int, int, int, int, int, int]] = []

    def add(self, source: int, obj: int, row: int, sample: Sample) -> None:
        size = _stored_bytes(sample)
        if self._samples and self._size + size > self.block_bytes:
            self._close_block()
        sides = [s for s in (sample, sample.rejected) if s is not None]
        length, targets = sum(len(s.tokens) for s in sides), sum(int(s.target.sum()) for s in sides)
        self._index.append((source, obj, row, length, targets, len(self._blocks), len(self._samples)))
        self._ids.append((source, obj, row))
        self._samples.append(sample)
        self._size += size

    def _close_block(self) -> None:
        raw = encode_block(self._ids, self._samples)
        self._blocks.append(BlockInfo(len(self._body), len(raw), hashlib.sha256(raw).hexdigest()))
        self._body += raw
        self._ids, self._samples, self._size = [], [], 0

    def finish(
        self, name: str, counts: list[Counts], bad_rows: list[BadRow], warnings: Sequence[list[str]] = ()
    ) -> tuple[str, bytes, bytes]:
        """Returns the data object's key, its bytes, and the index's bytes."""
        if self._samples:
            self._close_block()
        body = bytes(self._body)
        # The key contains the data's hash: two writers whose libraries encode the same samples into different bytes
        # must not share an object. The index names the object that it belongs to.
        key = f"{name}-{hashlib.sha256(body).hexdigest()[:16]}.data"
        return key, body, encode_index(self._index, WindowMeta(key, self._blocks, counts, bad_rows, list(warnings)))


def _stored_bytes(sample: Sample) -> int:
    """Estimates the bytes that the sample takes in a block."""
    own = 4 * len(sample.tokens) + len(sample.target) // 8 + 25
    types = 0 if sample.token_types is None else len(sample.token_types)
    return own + types + (0 if sample.rejected is None else _stored_bytes(sample.rejected))


def encode_block(ids: Sequence[tuple[int, int, int]], samples: Sequence[Sample]) -> bytes:
    """Encodes the samples into one Arrow IPC stream.

    The columns ``label``, ``token_types``, ``margin``, ``desirable``, ``rejected_tokens`` and ``rejected_target`` are
    present if the samples have these fields. All samples of a block are of one kind, since a task reads one kind.
    """
    source, obj, row = zip(*ids, strict=True)
    columns = {
        "source": pa.array(source, pa.int32()),
        "object": pa.array(obj, pa.int32()),
        "row": pa.array(row, pa.int64()),
        "tokens": _lists([s.tokens for s in samples]),
        "target": _lists([s.target for s in samples]),
    }
    assert list(columns) == BLOCK_SCHEMA.names
    return stream_bytes(pa.table(columns | _further_columns(samples)))


def _further_columns(samples: Sequence[Sample]) -> dict[str, Any]:
    columns: dict[str, Any] = {}
    if any(s.label is not None for s in samples):
        columns["label"] = pa.array([s.label for s in samples], pa.int32())
    if any(s.token_types is not None for s in samples):
        columns["token_types"] = _lists([s.token_types for s in samples])
    if any(s.margin is not None for s in samples):
        columns["margin"] = pa.array([s.margin or 0.0 for s in samples], pa.float32())
    if any(s.desirable is not None for s in samples):
        columns["desirable"] = pa.array([s.desirable for s in samples], pa.bool_())
    if any(s.rejected is not None for s in samples):
        others = [s.rejected for s in samples]
        columns["rejected_tokens"] = _lists([None if s is None else s.tokens for s in others])
        columns["rejected_target"] = _lists([None if s is None else s.target for s in others])
    return columns


def _lists(arrays: Sequence[npt.NDArray[Any] | None]) -> Any:
    whole = [a for a in arrays if a is not None]
    assert len(whole) == len(arrays), "the samples of a block differ in kind"
    offsets = pa.array(np.cumsum([0, *(len(a) for a in whole)]), pa.int32())
    return pa.ListArray.from_arrays(offsets, pa.array(np.concatenate(whole)))


@dataclass(frozen=True)
class Block:
    """A block's samples: tokens and targets are concatenated, sample i is at ``offsets[i]:offsets[i + 1]``.

    ``labels``, ``margins`` and ``desirable`` have one entry per sample, ``token_types`` one per token. ``rejected``
    contains the rejected answers, sample i's in its row i. Each of them is None if the format has no such field.
    """

    offsets: npt.NDArray[np.int32]
    tokens: Tokens
    target: Bools
    labels: npt.NDArray[np.int32] | None = None
    token_types: TokenTypes | None = None
    margins: Floats | None = None
    rejected: Block | None = None
    desirable: Bools | None = None

    @property
    def nbytes(self) -> int:
        arrays = (self.offsets, self.tokens, self.target, self.labels, self.token_types, self.margins, self.desirable)
        return sum(a.nbytes for a in arrays if a is not None) + (self.rejected.nbytes if self.rejected else 0)

    def sample(self, row: int) -> Sample:
        low, high = self.offsets[row], self.offsets[row + 1]
        return Sample(
            self.tokens[low:high],
            self.target[low:high],
            label=None if self.labels is None else int(self.labels[row]),
            token_types=None if self.token_types is None else self.token_types[low:high],
            rejected=None if self.rejected is None else self.rejected.sample(row),
            margin=None if self.margins is None else float(self.margins[row]),
            desirable=None if self.desirable is None else bool(self.desirable[row]),
        )

    def unrelated(self, row: int, sequence_length: int) -> Sample | None:
        """Returns the prompt of a sample with the answer of the next sample in the block, in a circle, that has another
        prompt, cut to ``sequence_length`` tokens; None if there is none."""
        prompt, _ = self._parts(row)
        for other in (*range(row + 1, len(self.offsets) - 1), *range(row)):
            others_prompt, answer = self._parts(other)
            if not np.array_equal(prompt, others_prompt):
                tokens = np.concatenate([prompt, answer])[:sequence_length]
                return Sample(tokens, np.arange(len(tokens)) >= len(prompt))
        return None

    def _parts(self, row: int) -> tuple[Tokens, Tokens]:
        """Returns the tokens before the first target, and those from it on."""
        low, high = self.offsets[row], self.offsets[row + 1]
        start = low + int(self.target[low:high].argmax())
        return self.tokens[low:start], self.tokens[start:high]


def _in_own_pages(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Copies the values into an anonymous mapping, which the operating system gets back when the copy is freed."""
    # A run reads blocks from start to end. malloc would keep freed ones in an arena per thread, so that memory would
    # grow with the size of the data.
    pages = mmap.mmap(-1, max(1, values.nbytes))
    copy = np.frombuffer(pages, values.dtype, len(values))
    copy[:] = values
    return copy


def decode_block(raw: bytes) -> Block:
    table = read_stream(raw)
    there = set(table.column_names)

    def flat(name: str) -> Any:
        return table.column(name).chunk(0) if name in there else None

    def values(name: str) -> Any:
        lists = flat(name)
        return None if lists is None else _in_own_pages(lists.values.to_numpy(zero_copy_only=False))

    def numbers(name: str) -> Any:
        column = flat(name)
        return None if column is None else column.to_numpy(zero_copy_only=False).copy()

    def offsets(name: str) -> Any:
        return flat(name).offsets.to_numpy().copy()

    # All arrays are copies: a view would keep all of ``raw`` in memory.
    rejected = None
    if "rejected_tokens" in there:
        rejected = Block(offsets("rejected_tokens"), values("rejected_tokens"), values("rejected_target"))
    own = offsets("tokens"), values("tokens"), values("target")
    return Block(*own, numbers("label"), values("token_types"), numbers("margin"), rejected, numbers("desirable"))


_INDEX_COLUMNS = ("source", "object", "row", "length", "targets", "block", "block_row")


def encode_index(rows: Sequence[tuple[int, ...]], meta: WindowMeta) -> bytes:
    columns = np.array(rows, dtype=np.int64).reshape(-1, len(_INDEX_COLUMNS)).T
    types = [pa.int64() if name == "row" else pa.int32() for name in _INDEX_COLUMNS]
    arrays = [pa.array(c, pa.int64()).cast(t) for c, t in zip(columns, types, strict=True)]
    table = pa.table(arrays, names=list(_INDEX_COLUMNS))
    return stream_bytes(table.replace_schema_metadata({_META: meta.to_bytes()}))


def decode_index(raw: bytes) -> WindowIndex:
    """Raises Malformed for bytes that are not an index."""
    try:
        table = read_stream(raw)
        meta = WindowMeta.from_bytes((table.schema.metadata or {})[_META])
        return WindowIndex(meta, *(table.column(name).combine_chunks().to_numpy() for name in _INDEX_COLUMNS))
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        raise Malformed(f"it is not the index of a window ({type(error).__name__}: {error})") from error


def stream_bytes(table: Any) -> bytes:
    """Encodes a table as one Arrow IPC stream with one record batch."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue().to_pybytes())


def read_stream(raw: bytes) -> Any:
    return pa.ipc.open_stream(pa.py_buffer(raw)).read_all()
