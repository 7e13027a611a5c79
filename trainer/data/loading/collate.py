"""Builds the arrays of a micro-batch from sample references. Legend: B packs, L tokens of the longest pack."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from trainer.data.loading.block_reader import BlockReader
from trainer.data.sample import Sample
from trainer.data.types import Batch, MicroBatch


def read_batch(reader: BlockReader, micro_batch: MicroBatch) -> Batch:
    refs = [ref for pack in micro_batch.packs for ref in pack]
    samples = iter(reader.samples(refs))
    packs = [[next(samples) for _ in pack] for pack in micro_batch.packs]
    indexes = {window: reader.prepared.index(window) for window in {ref.window for ref in refs}}
    sample_ids = [indexes[window].sample_id(sample) for window, sample in refs]
    return collate(micro_batch.index, packs, sample_ids, [int(indexes[w].source[sample]) for w, sample in refs])


def collate(
    index: int, packs: Sequence[Sequence[Sample]], sample_ids: list[str], sources: Sequence[int] | None = None
) -> Batch:
    """Pads the packs to the longest one, and stacks them into arrays [B, L]. Pairs: one row per answer, see `Batch`.
    ``sources``: of each sample; by default the first one."""
    samples = [sample for pack in packs for sample in pack]
    rejected = [sample.rejected for sample in samples if sample.rejected is not None]
    rows = [*packs, *([sample] for sample in rejected)]
    length = max(sum(len(sample.tokens) for sample in pack) for pack in rows)
    outputs = [sample.outputs for sample in samples if sample.outputs is not None]
    batch = Batch(
        index,
        np.zeros((len(rows), length), np.int64),
        np.zeros((len(rows), length), np.int64),
        np.zeros((len(rows), length), np.bool_),
        sample_ids,
        labels=np.array([s.label for s in samples if s.label is not None], np.int64),
        token_types=np.zeros((len(rows), length), np.int64)
        if any(s.token_types is not None for s in samples)
        else None,
        pairs=len(rejected),
        margins=np.array([s.margin or 0.0 for s in samples if s.rejected is not None], np.float32),
        desirable=np.array([s.desirable for s in samples if s.desirable is not None], np.bool_),
        outputs={name: np.concatenate([o[name] for o in outputs]) for name in (outputs[0] if outputs else ())},
    )
    unrelated = [[s.unrelated] for s in samples if s.unrelated is not None]
    if unrelated:
        batch.unrelated = collate(index, unrelated, sample_ids)
    for row, pack in enumerate(rows):
        batch.tokens += _fill_row(batch, row, pack)
    batch.target_tokens = int(batch.targets.sum())
    batch.sources = np.zeros(len(samples), np.int64) if sources is None else np.array(sources, np.int64)
    # The rejected answers are rows after all chosen ones, and each of them is from its pair's source.
    answers = [*samples, *rejected]
    counts = [int(sample.target.sum()) for sample in answers]
    batch.target_sources = np.resize(batch.sources, len(answers)).repeat(counts)
    return batch


def _fill_row(batch: Batch, row: int, pack: Sequence[Sample]) -> int:
    """Writes a pack into a row. Returns the number of its tokens."""
    # Positions restart with each sample, and every pad keeps position 0. Block-diagonal attention is derived from the
    # positions, so that no pad attends to a token.
    at = 0
    for sample in pack:
        end = at + len(sample.tokens)
        batch.input_ids[row, at:end] = sample.tokens
        batch.position_ids[row, at:end] = np.arange(end - at)
        batch.targets[row, at:end] = sample.target
        if batch.token_types is not None and sample.token_types is not None:
            batch.token_types[row, at:end] = sample.token_types
        at = end
    return at
