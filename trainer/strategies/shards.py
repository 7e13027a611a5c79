"""The elements of a parameter that a rank keeps, for `Strategy.kept`: a pure function of shape, ranks and rank."""

from __future__ import annotations

import math
from typing import NamedTuple


class Weight(NamedTuple):
    """The properties of a parameter that determine its memory."""

    shape: tuple[int, ...]
    itemsize: int
    trainable: bool

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


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
