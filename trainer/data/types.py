"""The types that the data path passes to the training loop.

Legend: B packs in a micro-batch, L tokens of its longest pack.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from trainer.errors import CorruptObject
from trainer.parsing import Malformed
from trainer.records import Count, read_record

Ints = npt.NDArray[np.int64]
Tokens = npt.NDArray[np.int32]
Bools = npt.NDArray[np.bool_]
TokenTypes = npt.NDArray[np.int8]
Floats = npt.NDArray[np.float32]

EMPTY_LENGTH = 8


class SampleRef(NamedTuple):
    """A sample of the prepared data: its window, and its row in that window's index."""

    window: int
    sample: int


@dataclass(frozen=True)
class Cursor:
    """A position in a run's data: everything that a resumed run needs, about 300 bytes of JSON.

    ``window`` counts within the epoch's order. ``pack`` is the next pack within that window's plan. ``chain`` is the
    hash of all plans up to and including this window's. ``samples`` counts the samples consumed since the run started.
    """

    fingerprint: str
    seed: int
    epoch: Count
    window: Count
    pack: Count
    chain: str
    samples: Count

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Any) -> Cursor:
        """Reads the cursor of a commit record. Raises CorruptObject if a field is missing, unknown or of another
        type."""
        try:
            return read_record(cls, data, exact=True)
        except Malformed as error:
            raise CorruptObject(f"the data cursor {data!r:.300} is not valid: {error}") from error


class Pack(NamedTuple):
    """Samples that are trained as one sequence, and their tokens."""

    samples: tuple[SampleRef, ...]
    tokens: int
    target_tokens: int


@dataclass(frozen=True)
class MicroBatch:
    """The packs of one forward pass. ``index`` counts within the global step, and does not depend on the number of
    ranks."""

    index: int
    packs: tuple[tuple[SampleRef, ...], ...]
    tokens: int
    target_tokens: int

    @classmethod
    def of(cls, index: int, packs: Sequence[Pack]) -> MicroBatch:
        refs = tuple(pack.samples for pack in packs)
        return cls(index, refs, sum(pack.tokens for pack in packs), sum(pack.target_tokens for pack in packs))

    @property
    def samples(self) -> int:
        return sum(len(pack) for pack in self.packs)


@dataclass(frozen=True)
class StepPlan:
    """One global step: its micro-batches, its totals over all ranks, and the cursors before its first pack and after
    its last."""

    epoch: int
    start: Cursor
    micro_batches: tuple[MicroBatch, ...]
    tokens: int
    target_tokens: int
    samples: int
    next: Cursor

    def rounds(self, world_size: int) -> int:
        """Returns the forward passes that each rank runs in this step. A rank with fewer micro-batches than others runs
        ``Batch.empty()`` in the last one."""
        return -(-len(self.micro_batches) // world_size)

    def of_rank(self, rank: int, world_size: int) -> tuple[MicroBatch, ...]:
        return self.micro_batches[rank::world_size]


@dataclass
class Batch:
    """A micro-batch as numpy arrays.

    ``input_ids`` int64 [B, L], 0 at pads. ``position_ids`` int64 [B, L] restart at 0 with each sample and are 0 at
    every pad, so that each pad is a segment of its own. ``targets`` bool [B, L], True at the tokens that are to be
    predicted (never the first of a sample, never a pad). ``tokens`` and ``target_tokens`` do not count pads.

    ``sources`` int64 [samples] has the entry of ``data.train`` (in an evaluation of ``data.eval``) that each sample is
    from, in the order of ``sample_ids``. ``target_sources`` int64 [target_tokens] has it for each target, row by row.

    Classification: ``labels`` int64 [samples], in the order of ``sample_ids``. That is also the order of the True
    elements of ``targets``, row by row: each marks the last token of its sample. ``token_types`` int64 [B, L], all 0
    for a single text.

    Preference: ``pairs`` is the number of pairs, and B = 2 · pairs. The chosen answer of pair i is row i, the rejected
    one is row ``pairs + i``. ``margins`` float32 [pairs], 0 where the data has none.

    Answers that are good or bad: ``desirable`` bool [samples]; ``unrelated`` has each prompt with an answer to another
    prompt, in the order of the samples.

    ``outputs``: what a frozen model computed for the samples (`trainer.data.outputs`), those of all samples joined
    along the first axis.
    """

    index: int
    input_ids: Ints
    position_ids: Ints
    targets: Bools
    sample_ids: list[str] = field(default_factory=list)
    tokens: int = 0
    target_tokens: int = 0
    labels: Ints = field(default_factory=lambda: np.zeros(0, np.int64))
    token_types: Ints | None = None
    pairs: int = 0
    margins: Floats = field(default_factory=lambda: np.zeros(0, np.float32))
    desirable: Bools = field(default_factory=lambda: np.zeros(0, np.bool_))
    unrelated: Batch | None = None
    outputs: dict[str, npt.NDArray[Any]] = field(default_factory=dict)
    sources: Ints = field(default_factory=lambda: np.zeros(0, np.int64))
    target_sources: Ints = field(default_factory=lambda: np.zeros(0, np.int64))

    @property
    def samples(self) -> int:
        return len(self.sample_ids)

    @classmethod
    def empty(cls) -> Batch:
        """The zero-weight batch of a rank without data, with which it takes part in the others' collectives: [1, 8], no
        target, index -1."""
        zeros = np.zeros((1, EMPTY_LENGTH), np.int64)
        return cls(-1, zeros, zeros.copy(), np.zeros((1, EMPTY_LENGTH), np.bool_))


@dataclass
class RankStep:
    """A step of one rank: the global plan, and the micro-batches k with k % world_size == rank, in order."""

    plan: StepPlan
    batches: list[Batch]
