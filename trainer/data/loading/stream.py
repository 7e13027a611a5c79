"""The stream of training steps: a pure look-up from a cursor to a step, and from a step to this rank's arrays.

A step is a range of packs, cut into micro-batches of ``micro_batch`` packs. It may cross from one window into the next,
never from one epoch into the next: an epoch's last step may be short. The contents of a micro-batch do not depend on
the number of ranks; micro-batch k is run by rank k % world_size. Here and in this package, ranks that compute parts of
the same tokens (`strategy.context_parallel`) count as one.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from trainer.data.blocks import WindowIndex
from trainer.data.loading.block_reader import MEMORY_BYTES, READERS, BlockReader
from trainer.data.loading.collate import read_batch
from trainer.data.loading.disk_cache import DiskCache
from trainer.data.loading.next_use import NextUse, Use, packs_of_blocks
from trainer.data.loading.prefetch import Prefetcher
from trainer.data.order.order_store import LinkedPlan, PlanStore
from trainer.data.order.pack_order import PlanSettings, copies
from trainer.data.order.packing import fill_packs
from trainer.data.prepare.prepared import PreparedDataset
from trainer.data.types import Cursor, Ints, MicroBatch, Pack, RankStep, StepPlan
from trainer.errors import CorruptObject, InputError
from trainer.recipe import Recipe
from trainer.storage import Storage

_EMPTY_EPOCHS = 50
"""A weight well below 1 may select none of a few samples for an epoch or two. This many empty epochs are an error."""


class Stream:
    """Steps of a run over its prepared data. ``weights`` has one per source; plans are stored under ``<run>/plan/``.

    Thread-safe. All ranks build the same stream, without communication.
    """

    def __init__(
        self,
        prepared: PreparedDataset,
        run: Storage,
        *,
        seed: int,
        sequence_length: int,
        packing: bool,
        weights: Sequence[float],
        global_batch: int,
        micro_batch: int,
        memory_bytes: int = MEMORY_BYTES,
        readers: int = READERS,
        cache: DiskCache | None = None,
    ) -> None:
        self.prepared, self.seed = prepared, seed
        self.global_batch, self.micro_batch = global_batch, micro_batch
        settings = plan_settings(prepared, seed, sequence_length, packing, weights)
        self.plans = PlanStore(prepared, run, settings)
        self.upcoming = NextUse(self.plans.order)
        self.reader = BlockReader(prepared, self.upcoming, memory_bytes=memory_bytes, readers=readers, cache=cache)
        self._warmed: int | None = None
        self._warming: threading.Thread | None = None

    @classmethod
    def of(cls, recipe: Recipe, prepared: PreparedDataset, run: Storage, *, cache: DiskCache | None = None) -> Stream:
        """Returns the stream of the recipe's training data."""
        return cls(
            prepared,
            run,
            seed=recipe.seed,
            sequence_length=recipe.data.sequence_length,
            packing=recipe.data.packing,
            weights=recipe.data.weights,
            global_batch=recipe.training.global_batch,
            micro_batch=recipe.training.micro_batch,
            cache=cache,
        )

    def start(self) -> Cursor:
        """Returns the cursor before the first step."""
        first = self.plans.follow(0, 0, self.plans.root())
        return Cursor(self.prepared.fingerprint, self.seed, 0, 0, 0, first.chain, 0)

    def step(self, cursor: Cursor) -> StepPlan:
        """Returns the step at the cursor. Raises CorruptObject if the cursor is of other data, another seed or plan."""
        if (cursor.fingerprint, cursor.seed) != (self.prepared.fingerprint, self.seed):
            raise CorruptObject(
                f"the data cursor belongs to data {cursor.fingerprint} and seed {cursor.seed}, and this run reads "
                f"{self.prepared.fingerprint} with seed {self.seed}; resume with the recipe that this run started with"
            )
        cursor, linked = self._enter(cursor)
        start, packs = cursor, list[Pack]()
        while True:
            taken = list(linked.plan.packs(linked.window, cursor.pack, cursor.pack + self.global_batch - len(packs)))
            packs += taken
            cursor = replace(cursor, pack=cursor.pack + len(taken))
            if len(packs) == self.global_batch or cursor.window + 1 == self.prepared.count:
                break
            cursor, linked = self._next_window(cursor)
        return self._plan_of(start, packs, cursor)

    def read_step(self, plan: StepPlan, rank: int, world_size: int) -> RankStep:
        """Reads this rank's micro-batches of the step."""
        at = plan.start

        def packs() -> dict[int, Ints]:
            linked = self.plans.at(at.epoch, at.window, at.chain)
            return packs_of_blocks(linked.plan, self.prepared.index(linked.window).block)

        self.upcoming.move(Use(at.epoch, at.window, at.pack), packs)
        return RankStep(plan, [read_batch(self.reader, m) for m in plan.of_rank(rank, world_size)])

    def prefetch(self, cursor: Cursor, rank: int, world_size: int, steps: int | None = None) -> Prefetcher:
        """Returns an iterator over this rank's steps from the cursor, read ahead in a thread; endless without
        ``steps``.

        The caller must close it: use it in a ``with`` statement. ``next`` raises the errors of reading ahead.
        """
        return Prefetcher(self, cursor, rank, world_size, steps)

    def ahead(self, plan: StepPlan) -> None:
        """Starts a thread that fetches the window after this step's, unless that was done or is in progress."""
        following = self.upcoming.following()
        if self._warmed == following or (self._warming is not None and self._warming.is_alive()):
            return
        self._warmed = following
        self._warming = threading.Thread(
            target=self.reader.warm, args=(following,), name="muster-read-ahead", daemon=True
        )
        self._warming.start()

    def _enter(self, cursor: Cursor) -> tuple[Cursor, LinkedPlan]:
        """Returns the plan at the cursor. A cursor at the end of a window is moved to the next pack of a later
        window."""
        linked = self.plans.at(cursor.epoch, cursor.window, cursor.chain)
        first = cursor.epoch
        while cursor.pack >= len(linked.plan):
            cursor, linked = self._next_window(cursor)
            if cursor.epoch > first + _EMPTY_EPOCHS:
                raise InputError(
                    f"the weights {list(self.plans.settings.weights)} select none of the "
                    f"{self.prepared.totals.samples} samples in {_EMPTY_EPOCHS} epochs; raise them"
                )
        return cursor, linked

    def _next_window(self, cursor: Cursor) -> tuple[Cursor, LinkedPlan]:
        last = cursor.window + 1 == self.prepared.count
        epoch, window = (cursor.epoch + 1, 0) if last else (cursor.epoch, cursor.window + 1)
        linked = self.plans.follow(epoch, window, cursor.chain)
        return replace(cursor, epoch=epoch, window=window, pack=0, chain=linked.chain), linked

    def _plan_of(self, start: Cursor, packs: list[Pack], after: Cursor) -> StepPlan:
        parts = [packs[i : i + self.micro_batch] for i in range(0, len(packs), self.micro_batch)]
        micro_batches = tuple(MicroBatch.of(i, part) for i, part in enumerate(parts))
        samples = sum(m.samples for m in micro_batches)
        return StepPlan(
            start.epoch,
            start,
            micro_batches,
            sum(m.tokens for m in micro_batches),
            sum(m.target_tokens for m in micro_batches),
            samples,
            replace(after, samples=after.samples + samples),
        )


def plan_settings(
    prepared: PreparedDataset, seed: int, sequence_length: int, packing: bool, weights: Sequence[float]
) -> PlanSettings:
    spec = prepared.spec
    if (sequence_length, packing) != (spec.sequence_length, spec.packing) or len(weights) != len(spec.sources):
        raise InputError(
            f"the data was prepared for sequence_length {spec.sequence_length}, packing {spec.packing} and "
            f"{len(spec.sources)} sources, not for {sequence_length}, {packing} and {len(weights)}; prepare it again"
        )
    return PlanSettings(spec.order_key, seed, sequence_length, packing, tuple(float(w) for w in weights))


def count_steps(
    prepared: PreparedDataset,
    *,
    seed: int,
    epochs: int,
    global_batch: int,
    sequence_length: int,
    packing: bool,
    weights: Sequence[float],
) -> int:
    """Returns the steps of ``epochs`` epochs. Reads the windows' indexes one at a time, no tokens."""
    settings = plan_settings(prepared, seed, sequence_length, packing, weights)
    # The number of a window's packs depends only on the lengths of its samples. All epochs have the same number, unless
    # a weight has a fraction, which selects other samples in each epoch.
    same = all(w.is_integer() for w in settings.weights)
    planned = [
        sum(epoch_packs(prepared.index(window), settings, epoch).packs for window in range(prepared.count))
        for epoch in range(1 if same else epochs)
    ]
    return sum(-(-packs // global_batch) for packs in planned) * (epochs if same else 1)


class EpochPacks(NamedTuple):
    """The packs and tokens of a window in an epoch."""

    packs: int
    tokens: int


def epoch_packs(index: WindowIndex, settings: PlanSettings, epoch: int) -> EpochPacks:
    times = copies(index, settings, epoch)
    tokens = int((index.length * times).sum())
    if not settings.packing:
        return EpochPacks(int(times.sum()), tokens)
    return EpochPacks(len(fill_packs(index.length.repeat(times), settings.sequence_length)), tokens)
