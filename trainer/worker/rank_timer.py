"""Times each rank's local work in a step, to find stragglers.

All ranks finish a step at the same time, because its last backward exchanges gradients. The work before that is local:
waiting for data, forward passes, and backward passes without an exchange. Strategies that gather layers in the forward
(fsdp, ZeRO-3) also wait for each other there and show a straggler less clearly.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

import torch

MOST_RANKS = 64
"""With at most this many ranks, a step's record has the seconds of each; with more, only the slowest."""


class RankTimer:
    """A stopwatch: `start` and `stop` alternate, and `take` returns the seconds between them. On a GPU the times are
    CUDA events, because its work runs asynchronously: call `take` only after a synchronisation."""

    def __init__(self, device: torch.device, clock: Callable[[], float] = time.monotonic) -> None:
        self._gpu, self._clock = device.type == "cuda", clock
        self._began: Any = None
        self._spans: list[tuple[Any, Any]] = []

    def start(self) -> None:
        if self._began is None:
            self._began = self._now()

    def stop(self) -> None:
        if self._began is not None:
            self._spans.append((self._began, self._now()))
            self._began = None

    def take(self) -> float:
        spans, self._spans = self._spans, []
        if self._gpu:
            return float(sum(began.elapsed_time(ended) for began, ended in spans)) / 1000
        return float(sum(ended - began for began, ended in spans))

    def _now(self) -> Any:
        if not self._gpu:
            return self._clock()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def of_this_rank(value: float, rank: int, ranks: int) -> list[float]:
    """One-hot [ranks]: ``value`` at this rank, so that a sum all-reduce acts as an all-gather."""
    return [value if one == rank else 0.0 for one in range(ranks)]


def rank_record(seconds: Sequence[float], held: Sequence[float]) -> dict[str, Any]:
    """Returns fields of `trainer.run.metrics.StepMetrics` from each rank's local ``seconds`` and the bytes of memory it
    ``held``."""
    slowest = max(range(len(seconds)), key=seconds.__getitem__)
    largest = max(range(len(held)), key=held.__getitem__)
    told: dict[str, Any] = {"slowest_rank": slowest, "slowest_rank_s": seconds[slowest], "mean_rank_s": fmean(seconds)}
    told |= {"memory_bytes": int(held[largest]), "memory_rank": largest}
    return {**told, "rank_s": [round(s, 5) for s in seconds]} if len(seconds) <= MOST_RANKS else told
