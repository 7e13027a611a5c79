"""What a rank keeps of a parameter, for `Strategy.kept`, and sends for it, for `Strategy.sent`: pure functions."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from trainer.recipe import Recipe


class Weight(NamedTuple):
    """The properties of a parameter that determine its memory. ``in_layer``: it is in a block that FSDP2 gathers by
    itself, not in the root."""

    shape: tuple[int, ...]
    itemsize: int
    trainable: bool
    in_layer: bool = True

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


class Kept(NamedTuple):
    """Elements of one parameter on one rank between steps; ``padding``: allocated with ``parameter``, never used."""

    parameter: int
    gradient: int
    optimizer: int
    padding: int = 0


class Sent(NamedTuple):
    """Bytes that a rank sends for one parameter in one step: to the ranks of its replica, and to other replicas."""

    inside: int = 0
    across: int = 0


def gathered_itemsize(weight: Weight, recipe: Recipe) -> int:
    """Returns the bytes per element in which a parameter is gathered: full fine-tuning casts it to the recipe's
    dtype."""
    full = recipe.adapter.method == "none"
    return int(getattr(torch, recipe.model.dtype).itemsize) if full else weight.itemsize


def reduced_to_all(size: int, ranks: int) -> int:
    """Returns what each rank sends of ``size`` bytes when a ring reduces them to all ranks."""
    return 2 * size * (ranks - 1) // ranks


def chunk_rows(rows: int, ranks: int, rank: int) -> int:
    """Returns the rows of piece ``rank`` of ``torch.chunk(…, ranks)``."""
    size = -(-rows // ranks)
    return max(0, min(size, rows - rank * size))
