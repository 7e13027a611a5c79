"""The elements of each parameter that a rank keeps, a pure function of shape, number of ranks and rank.

FSDP2 splits the first dimension as ``torch.chunk`` does, so that the last ranks may get fewer rows or none, and
allocates the largest chunk on every rank. ZeRO-3 splits the flattened parameter into equal slices; the last are padded.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch


class Weight(NamedTuple):
    """The properties of a parameter that determine its memory."""

    shape: tuple[int, ...]
    itemsize: int
    trainable: bool

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def weights_of(model: torch.nn.Module) -> Counter[Weight]:
    """Counts the model's parameters by these properties; tied ones count once. A deep model has few different ones."""
    return Counter(Weight(tuple(p.shape), p.element_size(), p.requires_grad) for p in model.parameters())


class Kept(NamedTuple):
    """Elements of one parameter on one rank between steps; ``padding``: allocated with ``parameter``, never used."""

    parameter: int
    gradient: int
    optimizer: int
    padding: int = 0


def chunk_rows(rows: int, ranks: int, rank: int) -> int:
    """Returns the rows of piece ``rank`` of ``torch.chunk(…, ranks)``."""
    size = -(-rows // ranks)
    return max(0, min(size, rows - rank * size))


def _whole(weight: Weight, ranks: int, rank: int) -> Kept:
    return Kept(weight.numel, weight.numel, weight.numel)


def _first_dimension(weight: Weight, ranks: int, rank: int) -> Kept:
    rows, rest = weight.shape[0], math.prod(weight.shape[1:])
    mine = chunk_rows(rows, ranks, rank) * rest
    return Kept(mine, mine, mine, chunk_rows(rows, ranks, 0) * rest - mine)


def _flat_states(weight: Weight, ranks: int, rank: int) -> Kept:
    share = -(-weight.numel // ranks)
    return Kept(weight.numel, share, share)


def _flat(weight: Weight, ranks: int, rank: int) -> Kept:
    share = -(-weight.numel // ranks)
    return Kept(share, share, share)


CUTS: dict[str, Callable[[Weight, int, int], Kept]] = {
    "ddp": _whole,
    "fsdp": _first_dimension,
    "zero2": _flat_states,
    "zero3": _flat,
}
"""The elements that a rank keeps, by ``strategy.kind``."""


@dataclass(frozen=True)
class Share:
    """Bytes that one rank keeps of a model, on the device or the host. ``padding`` is allocated and never used."""

    frozen: int
    trainable: int
    gradient: int
    optimizer: int
    padding: int


def share(
    kind: str, weights: Counter[Weight], ranks: int, rank: int, *, gradient_size: int, state: Callable[[int], int]
) -> Share:
    """Sums a rank's bytes. ``gradient_size``: bytes per gradient element; ``state(elements)``: bytes of optimizer
    state."""
    cut = CUTS[kind]
    sums: Counter[str] = Counter()
    for weight, count in weights.items():
        kept = cut(weight, ranks, rank)
        sums["trainable" if weight.trainable else "frozen"] += count * kept.parameter * weight.itemsize
        sums["padding"] += count * kept.padding * weight.itemsize
        if weight.trainable:
            sums["gradient"] += count * kept.gradient * gradient_size
            sums["optimizer"] += count * state(kept.optimizer)
    return Share(sums["frozen"], sums["trainable"], sums["gradient"], sums["optimizer"], sums["padding"])
