"""From sample references to the arrays of a micro-batch. Legend: B packs, L tokens of the longest pack."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from trainer.data.reader import BlockReader, Sample
from trainer.data.types import Batch, MicroBatch


def read_batch(reader: BlockReader, micro_batch: MicroBatch) -> Batch:
    refs = [ref for pack in micro_batch.packs for ref in pack]
    samples = iter(reader.samples(refs))
    packs = [[next(samples) for _ in pack] for pack in micro_batch.packs]
    return collate(micro_batch.index, packs, [reader.prepared.index(w).sample_id(s) for w, s in refs])


def collate(index: int, packs: Sequence[Sequence[Sample]], sample_ids: list[str]) -> Batch:
    """Packs side by side, padded to the longest. Positions restart with each sample, and every pad is at position 0:
    block-diagonal attention, which is derived from the positions, then lets no pad see anything."""
    length = max(sum(len(tokens) for tokens, _ in pack) for pack in packs)
    batch = Batch(
        index,
        np.zeros((len(packs), length), np.int64),
        np.zeros((len(packs), length), np.int64),
        np.zeros((len(packs), length), np.bool_),
        sample_ids,
    )
    for row, pack in enumerate(packs):
        at = 0
        for tokens, target in pack:
            end = at + len(tokens)
            batch.input_ids[row, at:end] = tokens
            batch.position_ids[row, at:end] = np.arange(len(tokens))
            batch.targets[row, at:end] = target
            at = end
        batch.tokens += at
    batch.target_tokens = int(batch.targets.sum())
    return batch
