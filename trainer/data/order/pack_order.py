"""The plan: the samples of each pack, and the order of packs. A pure function of the data's shape, seed and epoch.

An epoch takes the windows in a permuted order. Within a window, each sample is copied by its source's weight, the
copies are permuted, packed, and the packs permuted.

So an *epoch* contains each sample of each source once. With a weight of 2 it contains each twice, with 0.5 a random
half of them, which differs between epochs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from trainer.data.blocks import WindowIndex
from trainer.data.order.packing import fill_packs
from trainer.data.seeding import permutation, uniforms
from trainer.data.types import Ints, Pack, SampleRef


@dataclass(frozen=True)
class PlanSettings:
    """The settings of the plan. ``order_key`` is the preparation's; ``weights`` has one per source."""

    order_key: str
    seed: int
    sequence_length: int
    packing: bool
    weights: tuple[float, ...]


@dataclass(frozen=True)
class WindowPlan:
    """A window's packs. Pack p contains ``samples[offsets[p]:offsets[p + 1]]``, which are rows of the window's
    index."""

    samples: npt.NDArray[np.int32]
    offsets: Ints
    tokens: Ints
    targets: Ints

    def __len__(self) -> int:
        return len(self.tokens)

    def pack(self, number: int) -> list[int]:
        samples: list[int] = self.samples[self.offsets[number] : self.offsets[number + 1]].tolist()
        return samples

    def packs(self, window: int, start: int, stop: int) -> Iterator[Pack]:
        """Yields the packs [start, stop), fewer at the end of the plan. ``window``: that of the prepared data which the
        plan is for."""
        for number in range(start, min(stop, len(self))):
            refs = tuple(SampleRef(window, sample) for sample in self.pack(number))
            yield Pack(refs, int(self.tokens[number]), int(self.targets[number]))

    def digest(self) -> str:
        """Returns the sha256 (hex) of the contents. It does not depend on the library that stored them."""
        h = hashlib.sha256()
        for column in (self.samples, self.offsets, self.tokens, self.targets):
            h.update(len(column).to_bytes(8, "little") + column.astype("<i8").tobytes())
        return h.hexdigest()


def epoch_order(order_key: str, seed: int, epoch: int, windows: int) -> list[int]:
    """Returns the epoch's windows in the order in which they are trained on."""
    order: list[int] = permutation(windows, "windows", order_key, seed, epoch).tolist()
    return order


def copies(index: WindowIndex, settings: PlanSettings, epoch: int) -> Ints:
    """Returns the number of copies of each sample [samples] in this epoch, from its source's weight."""
    weight = np.asarray(settings.weights, dtype=np.float64)[index.source]
    whole = np.floor(weight)
    if np.array_equal(whole, weight):
        return whole.astype(np.int64)
    draw = uniforms((index.source, index.object, index.row), "weight", settings.order_key, settings.seed, epoch)
    return whole.astype(np.int64) + (draw < weight - whole)


def plan_window(index: WindowIndex, settings: PlanSettings, epoch: int, window: int) -> WindowPlan:
    name = (settings.order_key, settings.seed, epoch, window)
    chosen = np.repeat(np.arange(len(index), dtype=np.int64), copies(index, settings, epoch))
    chosen = chosen[permutation(len(chosen), "samples", *name)]
    packs = _packs(index, chosen, settings)
    return _assemble(index, [packs[i] for i in permutation(len(packs), "packs", *name)])


def plan_in_order(index: WindowIndex, sequence_length: int, packing: bool) -> WindowPlan:
    """Returns evaluation's plan: each sample once, in the stored order, not permuted."""
    settings = PlanSettings("", 0, sequence_length, packing, ())
    return _assemble(index, _packs(index, np.arange(len(index), dtype=np.int64), settings))


def _packs(index: WindowIndex, chosen: Ints, settings: PlanSettings) -> list[Ints]:
    if not settings.packing:
        return list(chosen.reshape(-1, 1))
    return [chosen[p] for p in fill_packs(index.length[chosen], settings.sequence_length)]


def _assemble(index: WindowIndex, packs: Sequence[Ints]) -> WindowPlan:
    offsets = np.cumsum([0, *(len(p) for p in packs)]).astype(np.int64)
    samples = np.concatenate(packs).astype(np.int32) if packs else np.zeros(0, np.int32)
    tokens, targets = (
        np.add.reduceat(column[samples].astype(np.int64), offsets[:-1]) if packs else np.zeros(0, np.int64)
        for column in (index.length, index.targets)
    )
    return WindowPlan(samples, offsets, tokens, targets)
