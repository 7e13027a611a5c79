"""How a window is stored: one data object of Arrow blocks, and an index that addresses every sample in it.

The data object is a row of self-contained Arrow IPC streams of at most ``BLOCK_BYTES``; a block is read by one ranged
read and checked by its sha256. The index is an Arrow IPC stream with a row per sample; its metadata holds the block
table and the counts, so that planning and resuming never touch a token.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from trainer.data.rows import Encoded
from trainer.data.types import Bools, Tokens

BLOCK_BYTES = 8 << 20
_META = b"window"

BLOCK_SCHEMA = pa.schema(
    [
        ("source", pa.int32()),
        ("object", pa.int32()),
        ("row", pa.int64()),
        ("tokens", pa.list_(pa.int32())),
        ("target", pa.list_(pa.bool_())),
    ]
)


class BlockInfo(NamedTuple):
    """Where a block lies in its window's data object."""

    offset: int
    length: int
    sha256: str


class BadRow(NamedTuple):
    """A row that was passed over: its object, its place there ("line 7"), and why."""

    url: str
    place: str
    reason: str


@dataclass
class Counts:
    """What preparing made of the rows of one source. ``truncated`` samples are kept, ``dropped`` ones are not."""

    rows: int = 0
    samples: int = 0
    tokens: int = 0
    target_tokens: int = 0
    truncated: int = 0
    dropped: int = 0
    bad_rows: int = 0

    def add(self, other: Counts) -> None:
        for name, value in asdict(other).items():
            setattr(self, name, getattr(self, name) + value)


@dataclass
class WindowMeta:
    """The metadata of a window's index. ``counts`` has an entry per source."""

    data: str
    blocks: list[BlockInfo]
    counts: list[Counts]
    bad_rows: list[BadRow] = field(default_factory=list)

    def to_bytes(self) -> bytes:
        return json.dumps(asdict(self), sort_keys=True).encode()

    @classmethod
    def from_bytes(cls, raw: bytes) -> WindowMeta:
        d = json.loads(raw)
        return cls(
            d["data"],
            [BlockInfo(*b) for b in d["blocks"]],
            [Counts(**c) for c in d["counts"]],
            [BadRow(*b) for b in d["bad_rows"]],
        )


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
    """``<source index>:<object index>/<byte offset or row number>``: where the sample came from."""
    return f"{source}:{obj}/{row}"


class WindowWriter:
    """Takes samples one by one and cuts them into blocks; holds the window's bytes until they are put."""

    def __init__(self, block_bytes: int = BLOCK_BYTES) -> None:
        self.block_bytes = block_bytes
        self._ids: list[tuple[int, int, int]] = []
        self._samples: list[Encoded] = []
        self._size = 0
        self._body = bytearray()
        self._blocks: list[BlockInfo] = []
        self._index: list[tuple[int, int, int, int, int, int, int]] = []

    def add(self, source: int, obj: int, row: int, sample: Encoded) -> None:
        size = 4 * len(sample.tokens) + len(sample.target) // 8 + 25
        if self._samples and self._size + size > self.block_bytes:
            self._close_block()
        length, targets = len(sample.tokens), int(sample.target.sum())
        self._index.append((source, obj, row, length, targets, len(self._blocks), len(self._samples)))
        self._ids.append((source, obj, row))
        self._samples.append(sample)
        self._size += size

    def _close_block(self) -> None:
        raw = encode_block(self._ids, self._samples)
        self._blocks.append(BlockInfo(len(self._body), len(raw), hashlib.sha256(raw).hexdigest()))
        self._body += raw
        self._ids, self._samples, self._size = [], [], 0

    def finish(self, name: str, counts: list[Counts], bad_rows: list[BadRow]) -> tuple[str, bytes, bytes]:
        """The data object's key, its bytes, and the index. The key carries the data's hash: two writers whose libraries
        write other bytes for the same samples do not meet in one object, and the index says which it means."""
        if self._samples:
            self._close_block()
        body = bytes(self._body)
        key = f"{name}-{hashlib.sha256(body).hexdigest()[:16]}.data"
        return key, body, encode_index(self._index, WindowMeta(key, self._blocks, counts, bad_rows))


def encode_block(ids: Sequence[tuple[int, int, int]], samples: Sequence[Encoded]) -> bytes:
    offsets = pa.array(np.cumsum([0, *(len(s.tokens) for s in samples)]), pa.int32())
    source, obj, row = zip(*ids, strict=True)
    columns = [
        pa.array(source, pa.int32()),
        pa.array(obj, pa.int32()),
        pa.array(row, pa.int64()),
        pa.ListArray.from_arrays(offsets, pa.array(np.concatenate([s.tokens for s in samples]))),
        pa.ListArray.from_arrays(offsets, pa.array(np.concatenate([s.target for s in samples]))),
    ]
    return stream_bytes(pa.table(columns, schema=BLOCK_SCHEMA))


@dataclass(frozen=True)
class Block:
    """A block's samples: tokens and target lie one after the other, sample i at ``offsets[i]:offsets[i + 1]``."""

    offsets: npt.NDArray[np.int32]
    tokens: Tokens
    target: Bools

    @property
    def nbytes(self) -> int:
        return self.offsets.nbytes + self.tokens.nbytes + self.target.nbytes

    def sample(self, row: int) -> tuple[Tokens, Bools]:
        low, high = self.offsets[row], self.offsets[row + 1]
        return self.tokens[low:high], self.target[low:high]


def decode_block(raw: bytes) -> Block:
    table = read_stream(raw)
    tokens, target = (table.column(name).chunk(0) for name in ("tokens", "target"))
    return Block(tokens.offsets.to_numpy(), tokens.values.to_numpy(), target.values.to_numpy(zero_copy_only=False))


_INDEX_COLUMNS = ("source", "object", "row", "length", "targets", "block", "block_row")


def encode_index(rows: Sequence[tuple[int, ...]], meta: WindowMeta) -> bytes:
    columns = np.array(rows, dtype=np.int64).reshape(-1, len(_INDEX_COLUMNS)).T
    types = [pa.int64() if name == "row" else pa.int32() for name in _INDEX_COLUMNS]
    arrays = [pa.array(c, pa.int64()).cast(t) for c, t in zip(columns, types, strict=True)]
    table = pa.table(arrays, names=list(_INDEX_COLUMNS))
    return stream_bytes(table.replace_schema_metadata({_META: meta.to_bytes()}))


def decode_index(raw: bytes) -> WindowIndex:
    table = read_stream(raw)
    meta = WindowMeta.from_bytes(table.schema.metadata[_META])
    return WindowIndex(meta, *(table.column(name).combine_chunks().to_numpy() for name in _INDEX_COLUMNS))


def stream_bytes(table: Any) -> bytes:
    """A table as one Arrow IPC stream with one record batch."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue().to_pybytes())


def read_stream(raw: bytes) -> Any:
    return pa.ipc.open_stream(pa.py_buffer(raw)).read_all()
