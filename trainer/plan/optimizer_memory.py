"""Bytes of optimizer state and of a checkpoint."""

from __future__ import annotations

from collections import Counter

from trainer.recipe import Recipe
from trainer.recipe.optimizers import OPTIMIZERS
from trainer.strategies.shards import Weight

MOMENTS = 2
WHOLE = 4  # bytes of a float32
SMALLEST_8BIT, BLOCK_8BIT = 4096, 256
"""bitsandbytes keeps float32 moments for smaller tensors; of the others, one float32 scale per block and moment."""


def state_bytes(optimizer: str, elements: int) -> int:
    """Returns the bytes of optimizer state for a tensor of ``elements`` (or a rank's part of it), without step
    counters."""
    if not OPTIMIZERS[optimizer].quantised or elements < SMALLEST_8BIT:
        return MOMENTS * WHOLE * elements
    return MOMENTS * (elements + WHOLE * -(-elements // BLOCK_8BIT))


def partition_bytes(recipe: Recipe, elements: int) -> int:
    """Returns `state_bytes`, and under DeepSpeed its optimizer's float32 copy of the trainable parameters."""
    copy = WHOLE * elements if recipe.strategy.row.zero_stage else 0
    return state_bytes(recipe.optimizer.name, elements) + copy


def checkpoint_bytes(recipe: Recipe, weights: Counter[Weight]) -> int:
    """Returns the stored bytes of weights and optimizer state, the same for each strategy, without headers and
    configuration."""
    import torch

    trained = [(w.numel, count) for w, count in weights.items() if w.trainable]
    elements = sum(n * count for n, count in trained)
    moments = sum((state_bytes(recipe.optimizer.name, n) + WHOLE) * count for n, count in trained)
    if recipe.adapter.method != "none":
        return WHOLE * elements + moments
    width: int = getattr(torch, recipe.model.dtype).itemsize
    master = WHOLE * elements if width < WHOLE else 0
    return width * elements + master + moments
