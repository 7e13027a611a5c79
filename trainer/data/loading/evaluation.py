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
from trainer.data.types import Batch, MicroBatch, Pack


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
    packs = islice(_packs(prepared, singly), limit)
    while part := list(islice(packs, micro_batch)):
        upcoming.move(Use(0, part[0].samples[0].window, 0))
        if count % world_size == rank:
            mine = MicroBatch.of(count, part)
        count += 1
        if count % world_size == 0:
            assert mine is not None
            yield read_batch(reader, mine)
            mine = None
    if count % world_size:
        yield Batch.empty() if mine is None else read_batch(reader, mine)


def _packs(prepared: PreparedDataset, singly: bool) -> Iterator[Pack]:
    packing = prepared.spec.packing and not singly
    for window in range(prepared.count):
        plan = plan_in_order(prepared.index(window), prepared.spec.sequence_length, packing)
        yield from plan.packs(window, 0, len(plan))
