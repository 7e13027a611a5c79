"""Writes an attempt's records: metrics and events on rank 0, the ledger on every rank."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from trainer.data import Batch
from trainer.distributed.world import World
from trainer.recipe import Recipe
from trainer.run import layout
from trainer.run.events import Event
from trainer.run.jsonl import FLUSH_S, Events, JsonLinesWriter, read_events
from trainer.run.metrics import Metrics
from trainer.storage import Storage
from trainer.storage.pace import write_interval_s

EVALUATED = "eval_"


class Recorder:
    """``last_metrics``: the newest facts, which a checkpoint stores. The other ranks' `event` and `metrics` write
    nothing; the ledger is written only if the recipe has ``data.ledger``."""

    def __init__(self, run: Storage, recipe: Recipe, world: World, attempt: int) -> None:
        self.world = world
        self._run = run
        self.attempt = attempt
        self.last_metrics: dict[str, Any] = {}
        self._metrics = JsonLinesWriter(run, layout.metrics_part(attempt)) if world.is_rank0 else None
        self._events = Events(run, attempt, "rank0") if world.is_rank0 else None
        self._ledger: JsonLinesWriter | None = None
        if recipe.data.ledger:
            flush_s = write_interval_s(world.rank, world.size, FLUSH_S)
            self._ledger = JsonLinesWriter(run, layout.ledger_part(attempt, world.rank), flush_s=flush_s)

    def event(self, event: Event, *, wait: bool = True) -> None:
        if self._events:
            self._events.emit(event, wait=wait)

    def earlier_events(self) -> list[Event]:
        """Reads all events of the run before this attempt."""
        return read_events(self._run) if self.attempt > 1 else []

    def event_from_any_rank(self, event: Event, *, insist: bool = True) -> None:
        """Records an event from any rank. Returns when it is stored, or could not be; with ``insist``, a write that
        fails is tried once more. A rank that ends others must not wait for long, and does not insist."""
        events = self._events or Events(self._run, self.attempt, f"rank{self.world.rank}")
        events.emit(event, wait=True)
        if not self._events and insist:
            events.close()

    def metrics(self, metrics: Metrics) -> None:
        """Writes a row, and keeps its facts for the next checkpoint."""
        self.last_metrics.update(metrics.facts())
        if self._metrics:
            self._metrics.add(replace(metrics, attempt=self.attempt, time=time.time()).to_row())

    def resume_from(self, facts: Mapping[str, Any]) -> None:
        """Takes the last evaluation's values from a checkpoint's metrics; they are valid until the next evaluation."""
        self.last_metrics |= {name: value for name, value in facts.items() if name.startswith(EVALUATED)}

    def log_ledger(self, step: int, batches: Sequence[Batch]) -> None:
        """``batches``: the micro-batches of this rank in ``step``, without those of weight zero."""
        if self._ledger:
            for batch in batches:
                self._ledger.add(
                    {
                        "attempt": self.attempt,
                        "step": step,
                        "micro_batch": batch.index,
                        "rank": self.world.rank,
                        "samples": batch.sample_ids,
                        "tokens": batch.tokens,
                        "target_tokens": batch.target_tokens,
                    }
                )

    def store_metrics(self) -> None:
        """Stores the rows so far, so that a commit may follow: what is committed is not trained again, and its rows
        would be missing for ever. A storage that does not take them is a warning."""
        if self._metrics:
            self._metrics.flush()

    def settle_ledger(self) -> None:
        """Collective: after it, every rank's ledger is in the storage, so that a commit may follow."""
        if self._ledger:
            self._ledger.flush(strict=True)
            self.world.all_gather(None)

    def close(self) -> None:
        """Closes all files, even if closing one of them raises."""
        with ExitStack() as stack:
            for part in (self._events, self._ledger, self._metrics):
                if part:
                    stack.callback(part.close)
