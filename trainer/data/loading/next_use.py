"""The next use of a block. The plan fixes all later reads, so that a cache can evict the block that is needed last."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from trainer.data.order.pack_order import WindowPlan
from trainer.data.types import Ints


class Use(NamedTuple):
    """A position in the run's order. Tuples compare in that order."""

    epoch: int
    window: int
    pack: int


class NextUse:
    """The next use of each block, from the current position. Thread-safe.

    ``order(epoch)`` returns the windows of an epoch in their order. In the window that is being read, a block's next
    use is the next pack with one of its samples. In any other window it is the window's turn in this epoch or the next.
    """

    def __init__(self, order: Callable[[int], Sequence[int]]) -> None:
        self._order = order
        self._now = Use(0, 0, 0)
        self._packs: Mapping[int, Ints] | None = None
        self._turns: dict[int, dict[int, int]] = {}
        self._lock = threading.RLock()

    def move(self, to: Use, packs: Callable[[], Mapping[int, Ints]] | None = None) -> None:
        """Sets the current position. ``packs()``, called once per window, returns the packs that use each of its
        blocks, ascending."""
        with self._lock:
            if packs is None or to[:2] != self._now[:2] or self._packs is None:
                self._packs = packs() if packs else None
            self._now = to

    def next_use(self, window: int, block: int) -> Use:
        with self._lock:
            now, turn = self._now, self._turn(self._now.epoch, window)
            if turn > now.window:
                return Use(now.epoch, turn, 0)
            if turn == now.window:
                if self._packs is None:
                    return now
                later = self._packs.get(block, np.zeros(0, np.int64))
                at = int(np.searchsorted(later, now.pack))
                if at < len(later):
                    return Use(now.epoch, turn, int(later[at]))
            return Use(now.epoch + 1, self._turn(now.epoch + 1, window), 0)

    def soon(self, window: int) -> bool:
        """Returns True for the window that is being read and for the next one."""
        with self._lock:
            return window in (self.current(), self.following())

    def current(self) -> int:
        return self._order(self._now.epoch)[self._now.window]

    def following(self) -> int:
        order = self._order(self._now.epoch)
        here = self._now.window + 1
        return order[here] if here < len(order) else self._order(self._now.epoch + 1)[0]

    def _turn(self, epoch: int, window: int) -> int:
        if epoch not in self._turns:
            kept = {e: t for e, t in self._turns.items() if abs(e - epoch) <= 1}
            self._turns = {**kept, epoch: {w: i for i, w in enumerate(self._order(epoch))}}
        return self._turns[epoch][window]


def packs_of_blocks(plan: WindowPlan, block_of: npt.NDArray[np.integer[Any]]) -> dict[int, Ints]:
    """Returns, for each block of a window, the packs that use it, ascending. ``block_of``: the block of each sample."""
    packs = np.repeat(np.arange(len(plan), dtype=np.int64), np.diff(plan.offsets))
    blocks = block_of[plan.samples]
    return {int(b): np.unique(packs[blocks == b]) for b in np.unique(blocks)}
