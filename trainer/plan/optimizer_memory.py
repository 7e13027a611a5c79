"""Bytes of optimizer state and of a checkpoint."""

from __future__ import annotations

from collections import Counter

from trainer.recipe import Recipe
from trainer.strategies.shards import Weight

WHOLE = 4  # bytes of a float32


def state_bytes(recipe: Recipe, weight: Weight, elements: int) -> int:
    """Returns the bytes of optimizer state for ``elements`` of a parameter, without step counters. For an optimizer of
    the user's own, they are those of AdamW."""
    return recipe.optimizer.row.state_bytes(weight.shape, elements, in_layer=weight.in_layer)


def partition_bytes(recipe: Recipe, weight: Weight, elements: int) -> int:
    """Returns `state_bytes`, and under DeepSpeed its optimizer's float32 copy of the trainable parameters."""
    copy = WHOLE * elements if recipe.strategy.row.zero_stage else 0
    return state_bytes(recipe, weight, elements) + copy


def checkpoint_bytes(recipe: Recipe, weights: Counter[Weight]) -> int:
    """Returns the stored bytes of weights and optimizer state, the same for each strategy, without headers and
    configuration."""
    import torch

    trained = [(w, count) for w, count in weights.items() if w.trainable]
    elements = sum(w.numel * count for w, count in trained)
    moments = sum((state_bytes(recipe, w, w.numel) + WHOLE) * count for w, count in trained)
    averages = WHOLE * elements if recipe.optimizer.row.averages else 0  # stored beside the weights of training
    if recipe.adapter.method != "none":
        return WHOLE * elements + averages + moments
    width: int = getattr(torch, recipe.model.dtype).itemsize
    master = averages or (WHOLE * elements if width < WHOLE else 0)
    return width * elements + master + moments
