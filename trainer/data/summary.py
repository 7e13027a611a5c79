"""What prepared data come to: lengths, packs and how full they are. Needs a window's index at a time, no token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from trainer.data.loading.stream import epoch_packs, plan_settings
from trainer.data.order.pack_order import PlanSettings
from trainer.data.prepare.prepared import PreparedDataset
from trainer.data.types import Ints

BINS = 12


class Bin(NamedTuple):
    """Samples of ``low`` to ``high`` tokens, both included."""

    low: int
    high: int
    samples: int


@dataclass(frozen=True)
class Summary:
    """``fill`` is the share of the first epoch's packs that holds tokens, None without packing. ``sampled``:
    windows that were looked at, and of how many, where not all were; ``packs`` is then worked out from theirs."""

    bins: list[Bin]
    median: int
    p95: int
    longest: int
    packs: int
    fill: float | None
    sampled: tuple[int, int] | None = None


def summarise(prepared: PreparedDataset, seed: int, weights: Sequence[float], most: int | None = None) -> Summary:
    """Of all windows, or of the ``most`` that are spread evenly."""
    spec = prepared.spec
    settings = plan_settings(prepared, seed, spec.sequence_length, spec.packing, weights)
    histogram = np.zeros(1, np.int64)
    packs = tokens = 0
    chosen = _spread(prepared.count, most)
    for window in chosen:
        index = prepared.index(window)
        histogram = _add(histogram, np.bincount(index.length))
        more = epoch_packs(index, settings, epoch=0)
        packs, tokens = packs + more.packs, tokens + more.tokens
    return Summary(
        bins(histogram),
        _quantile(histogram, 0.5),
        _quantile(histogram, 0.95),
        len(histogram) - 1,
        round(packs * prepared.count / max(1, len(chosen))),
        _fill(settings, packs, tokens),
        (len(chosen), prepared.count) if len(chosen) < prepared.count else None,
    )


def _spread(count: int, most: int | None) -> list[int]:
    if most is None or count <= most:
        return list(range(count))
    return [i * (count - 1) // max(1, most - 1) for i in range(most)]


def _fill(settings: PlanSettings, packs: int, tokens: int) -> float | None:
    return tokens / (packs * settings.sequence_length) if settings.packing and packs else None


def _add(a: Ints, b: Ints) -> Ints:
    total = np.zeros(max(len(a), len(b)), np.int64)
    total[: len(a)] += a
    total[: len(b)] += b
    return total


def bins(histogram: Ints, count: int = BINS) -> list[Bin]:
    """``histogram[n]`` samples of n tokens, in up to ``count`` bins of equal width from the shortest to the longest."""
    there = np.flatnonzero(histogram)
    if not len(there):
        return []
    low, high = int(there[0]), int(there[-1])
    width = -(-(high - low + 1) // count)
    starts = range(low, high + 1, width)
    return [Bin(s, min(s + width - 1, high), int(histogram[s : s + width].sum())) for s in starts]


def _quantile(histogram: Ints, share: float) -> int:
    """The smallest length that ``share`` of the samples do not exceed."""
    reached = np.cumsum(histogram)
    return int(np.searchsorted(reached, share * reached[-1])) if reached[-1] else 0
