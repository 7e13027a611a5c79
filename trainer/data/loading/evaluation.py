"""Evaluation batches: the prepared data in its stored order, each sample once, distributed over the ranks."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from trainer.data.loading.block_reader import MEMORY_BYTES, BlockReader
from trainer.data.loading.collate import read_batch
from trainer.data.loading.disk_cache import DiskCache
from trainer.data.loading.next_use import NextUse, Use
from trainer.data.order.pack_order import plan_in_order
from trainer.data.prepare.prepared import PreparedDataset
from trainer.data.types import Batch, MicroBatch, SampleRef

Pack = tuple[SampleRef, ...]


def eval_batches(
    prepared: PreparedDataset,
    micro_batch: int,
    rank: int,
    world_size: int,
    *,
    memory_bytes: int = MEMORY_BYTES,
    cache: DiskCache | None = None,
    singly: bool = False,
    limit: int | None = None,
) -> Iterator[Batch]:
    """Yields this rank's batches of ``micro_batch`` packs: batch k goes to rank k % world_size.

    Every rank gets the same number of batches, so that all ranks take part in the collectives of each forward pass; the
    last one of some ranks is ``Batch.empty()``. Sequence length and packing are those of the preparation. ``singly``
    puts every sample into a pack of its own. ``limit``: the maximum number of packs, over all ranks.
    """
    upcoming = NextUse(lambda _: range(prepared.count))
    reader = BlockReader(prepared, upcoming, memory_bytes=memory_bytes, cache=cache)
    mine: MicroBatch | None = None
    count = 0
    for part in _micro_batches(islice(_packs(prepared, singly), limit), micro_batch):
        upcoming.move(Use(0, part.packs[0][0].window, 0))
        if part.index % world_size == rank:
            mine = part
        count += 1
        if count % world_size == 0:
            assert mine is not None
            yield read_batch(reader, mine)
            mine = None
    if count % world_size:
        yield Batch.empty() if mine is None else read_batch(reader, mine)


def _micro_batches(packs: Iterator[tuple[Pack, int, int]], size: int) -> Iterator[MicroBatch]:
    index = 0
    while part := [p for _, p in zip(range(size), packs, strict=False)]:
        refs = tuple(refs for refs, _, _ in part)
        yield MicroBatch(index, refs, sum(t for _, t, _ in part), sum(t for _, _, t in part))
        index += 1


def _packs(prepared: PreparedDataset, singly: bool) -> Iterator[tuple[Pack, int, int]]:
    packing = prepared.spec.packing and not singly
    for window in range(prepared.count):
        plan = plan_in_order(prepared.index(window), prepared.spec.sequence_length, packing)
        for p in range(len(plan)):
            refs = tuple(SampleRef(window, s) for s in plan.pack(p))
            yield refs, int(plan.tokens[p]), int(plan.targets[p])
