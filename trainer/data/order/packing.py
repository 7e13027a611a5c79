"""Filling packs: two heuristics for bin packing, of which the better result is used.

*Best-fit-decreasing* takes the samples from the longest to the shortest, and puts each into the pack with the least
room left after it. It is nearly perfect while short samples remain to fill the gaps. Where there are none, 1 to 3 % of
the room stays empty.

*Exact fit* fills one pack after another. It starts with the longest sample left. Then, as soon as one exists, it adds a
sample or a pair of samples that fills the pack to its last token; otherwise the longest sample that fits.

Both depend on lengths only: the number of packs does not depend on the order of the samples. That order selects one of
several samples of equal length, so that the samples that share a pack differ between epochs. Sets of lengths are
integers with one bit per length, and are searched by shifts and masks.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Lengths = npt.NDArray[np.integer[Any]]
Packs = list[list[int]]


def fill_packs(lengths: Lengths, capacity: int) -> Packs:
    """Returns packs of at most ``capacity`` tokens, as positions in ``lengths``; each position occurs once."""
    assert len(lengths) == 0 or (lengths.min() > 0 and lengths.max() <= capacity), "a length is outside 1 to capacity"
    best, exact = best_fit(lengths, capacity), ExactFit(lengths, capacity).packs()
    return exact if len(exact) < len(best) else best


def best_fit(lengths: Lengths, capacity: int) -> Packs:
    """Best-fit-decreasing. Bit r of ``rooms`` is set while at least one pack has room for exactly r tokens."""
    packs: Packs = []
    by_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms = 0
    sizes = lengths.tolist()
    for i in _decreasing(lengths):
        size = sizes[i]
        if fitting := rooms >> size:
            room = size + _lowest(fitting)
            pack = by_room[room].pop()
            if not by_room[room]:
                rooms ^= 1 << room
            packs[pack].append(i)
        else:
            room, pack = capacity, len(packs)
            packs.append([i])
        by_room[room - size].append(pack)
        rooms |= 1 << (room - size)
    return packs


class ExactFit:
    """Exact fit, over the samples that are not packed yet.

    Bit n of ``there`` and bit capacity - n of ``mirror`` are set while a sample of length n is left. One shifted and
    masked by the other gives the pairs of lengths with a given sum.
    """

    def __init__(self, lengths: Lengths, capacity: int) -> None:
        self.capacity = capacity
        self.by_length: list[list[int]] = [[] for _ in range(capacity + 1)]
        sizes = lengths.tolist()
        for i in _decreasing(lengths)[::-1]:
            self.by_length[sizes[i]].append(i)
        self.there = sum(1 << n for n in set(sizes))
        self.mirror = sum(1 << (capacity - n) for n in set(sizes))

    def packs(self) -> Packs:
        packs: Packs = []
        while self.there:
            packs.append(self._next_pack())
        return packs

    def _next_pack(self) -> list[int]:
        pack: list[int] = []
        room = self.capacity
        while fitting := self.there & ((2 << room) - 1):
            for length in self._filling(fitting, room) or (fitting.bit_length() - 1,):
                pack.append(self._take(length))
                room -= length
        return pack

    def _filling(self, fitting: int, room: int) -> tuple[int, ...]:
        """Returns one length that fills the room exactly, or two (the most even ones, longer first); empty if none
        do."""
        if fitting >> room:
            return (room,)
        pairs = fitting & (self.mirror >> (self.capacity - room))
        half = room // 2
        if room % 2 == 0 and len(self.by_length[half]) < 2:
            pairs &= ~(1 << half)
        upper = (room + 1) // 2
        if not pairs >> upper:
            return ()
        longer = upper + _lowest(pairs >> upper)
        return longer, room - longer

    def _take(self, length: int) -> int:
        same = self.by_length[length]
        taken = same.pop()
        if not same:
            self.there ^= 1 << length
            self.mirror ^= 1 << (self.capacity - length)
        return taken


def _decreasing(lengths: Lengths) -> list[int]:
    order: list[int] = np.argsort(-lengths.astype(np.int64), kind="stable").tolist()
    return order


def _lowest(bits: int) -> int:
    return (bits & -bits).bit_length() - 1
