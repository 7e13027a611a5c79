"""A summary of prepared data: lengths, packs and how full they are. Reads one window's index at a time, no tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from trainer.data.loading.stream import epoch_packs, plan_settings
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
    """Sample lengths in tokens, and the packs of the first epoch.

    ``fill`` is the share of the packs' capacity that contains tokens; None without packing. ``sampled`` is (windows
    read, all windows); None if all were read, else ``packs`` is extrapolated from those read.
    """

    bins: list[Bin]
    median: int
    p95: int
    longest: int
    packs: int
    fill: float | None
    sampled: tuple[int, int] | None = None


def summarise(prepared: PreparedDataset, seed: int, weights: Sequence[float], most: int | None = None) -> Summary:
    """Summarises all windows, or at most ``most`` evenly spaced ones."""
    spec = prepared.spec
    settings = plan_settings(prepared, seed, spec.sequence_length, spec.packing, weights)
    histogram = np.zeros(1, np.int64)
    packs = tokens = 0
    chosen = list(range(prepared.count))
    if most is not None and prepared.count > most:
        chosen = [i * (prepared.count - 1) // max(1, most - 1) for i in range(most)]
    for window in chosen:
        index = prepared.index(window)
        counts = np.bincount(index.length, minlength=len(histogram))
        counts[: len(histogram)] += histogram
        histogram = counts
        more = epoch_packs(index, settings, epoch=0)
        packs, tokens = packs + more.packs, tokens + more.tokens
    return Summary(
        bins(histogram),
        _quantile(histogram, 0.5),
        _quantile(histogram, 0.95),
        len(histogram) - 1,
        round(packs * prepared.count / max(1, len(chosen))),
        tokens / (packs * settings.sequence_length) if settings.packing and packs else None,
        (len(chosen), prepared.count) if len(chosen) < prepared.count else None,
    )


def bins(histogram: Ints, count: int = BINS) -> list[Bin]:
    """Groups ``histogram``, where ``histogram[n]`` samples have n tokens, into up to ``count`` bins of equal width from
    the shortest to the longest sample."""
    there = np.flatnonzero(histogram)
    if not len(there):
        return []
    low, high = int(there[0]), int(there[-1])
    width = -(-(high - low + 1) // count)
    starts = range(low, high + 1, width)
    return [Bin(s, min(s + width - 1, high), int(histogram[s : s + width].sum())) for s in starts]


def _quantile(histogram: Ints, share: float) -> int:
    """Returns the smallest length that ``share`` of the samples do not exceed."""
    reached = np.cumsum(histogram)
    return int(np.searchsorted(reached, share * reached[-1])) if reached[-1] else 0
