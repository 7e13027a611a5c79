"""A micro-batch that no data have made, to try a task's loss and to measure its memory."""

from __future__ import annotations

from typing import Any

import numpy as np

from trainer.data.types import Batch, Bools, Ints
from trainer.recipe import Recipe
from trainer.recipe.tasks import TASKS


def made_up_batch(recipe: Recipe, samples: int, input_ids: Ints, position_ids: Ints, targets: Bools) -> Batch:
    """Returns ``samples`` times the same row, of arrays [L], with what the recipe's task reads besides."""
    row = TASKS[recipe.task]
    pairs = samples if row.of_pairs else 0

    def rows(array: Any) -> Any:
        return np.tile(array, (samples + pairs, 1))

    batch = Batch(
        index=0,
        input_ids=rows(input_ids),
        position_ids=rows(position_ids),
        targets=rows(targets),
        sample_ids=["made up"] * samples,
        tokens=(samples + pairs) * len(input_ids),
        target_tokens=(samples + pairs) * int(targets.sum()),
        labels=np.zeros(samples, np.int64),
        pairs=pairs,
        margins=np.zeros(pairs, np.float32),
        sources=np.zeros(samples, np.int64),
        target_sources=np.zeros((samples + pairs) * int(targets.sum()), np.int64),
    )
    if row.unpairs:
        batch.desirable = np.arange(samples) % 2 == 0
        batch.unrelated = Batch(0, batch.input_ids, batch.position_ids, batch.targets, batch.sample_ids)
    if row.stores_reference:
        batch.outputs = {"reference": np.zeros(2 * samples, np.float32)}
    return batch
