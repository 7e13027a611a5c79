"""Writes an attempt's records: metrics and events on rank 0, the ledger on every rank."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

from trainer.data import Batch
from trainer.distributed.world import World
from trainer.recipe import Recipe
from trainer.run import layout
from trainer.run.jsonl import Events, JsonLinesWriter, read_rows
from trainer.storage import Storage
from trainer.worker.hang_detector import Pulse

EVALUATED = "eval_"


class Recorder:
    """``last_metrics``: the newest values, which a checkpoint stores. The other ranks' `event` and `metrics` write
    nothing; the ledger is written only if the recipe has ``data.ledger``."""

    def __init__(self, run: Storage, recipe: Recipe, world: World, attempt: int) -> None:
        self.world = world
        self._run = run
        self.attempt = attempt
        self.last_metrics: dict[str, Any] = {}
        self._metrics = JsonLinesWriter(run, layout.metrics_part(attempt)) if world.is_rank0 else None
        self._events = Events(run, attempt, "rank0") if world.is_rank0 else None
        self._ledger = JsonLinesWriter(run, layout.ledger_part(attempt, world.rank)) if recipe.data.ledger else None

    def event(self, event: str, *, wait: bool = True, **fields: Any) -> None:
        if self._events:
            self._events.emit(event, wait=wait, **fields)

    def has(self, event: str, **fields: Any) -> bool:
        """Returns True if an earlier attempt recorded the event with these fields. Reads all events of the run."""
        earlier = read_rows(self._run, layout.EVENTS) if self.attempt > 1 else []
        return any({"event": event, **fields}.items() <= row.items() for row in earlier)

    def event_from_any_rank(self, event: str, fields: Mapping[str, Any]) -> None:
        """Records an event from any rank, without waiting for the storage."""
        if self._events:
            self._events.emit(event, wait=False, **fields)
        else:
            events = Events(self._run, self.attempt, f"rank{self.world.rank}")
            events.emit(event, wait=False, **fields)
            events.close()

    def hang(self, found: Sequence[Pulse], text: str) -> None:
        """Records the ranks that stop the others, with their stacks. The rank that has found them calls it."""
        events = self._events or Events(self._run, self.attempt, f"rank{self.world.rank}")
        events.emit("hang", cause=text, ranks=[asdict(pulse) for pulse in found])

    def collective_broke(self, seen: Mapping[int, str]) -> None:
        """Records where this rank last saw each rank, after a collective failed: a dead rank records nothing itself."""
        events = self._events or Events(self._run, self.attempt, f"rank{self.world.rank}")
        events.emit("broken", seen=seen)
        if not self._events:
            events.close()

    def metrics(self, row: dict[str, Any], **aside: Any) -> None:
        """Writes a row. ``aside``: fields of the row that do not belong into `last_metrics`."""
        self.last_metrics.update(row)
        if self._metrics:
            self._metrics.add({"attempt": self.attempt, "time": time.time(), **row, **aside})

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
