"""What one rank of an attempt writes down: rank 0 the metrics and events, every rank its ledger."""

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
    """Metrics and events on rank 0, silent on the others; the ledger, if the recipe wants one, on all."""

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
        """Whether an earlier attempt has told of it. Reads all that they told."""
        earlier = read_rows(self._run, layout.EVENTS) if self.attempt > 1 else []
        return any({"event": event, **fields}.items() <= row.items() for row in earlier)

    def event_from_any_rank(self, event: str, fields: Mapping[str, Any]) -> None:
        """What any rank may have to tell, aside from training: it is stored soon, and nobody waits for it."""
        if self._events:
            self._events.emit(event, wait=False, **fields)
        else:
            events = Events(self._run, self.attempt, f"rank{self.world.rank}")
            events.emit(event, wait=False, **fields)
            events.close()

    def hang(self, found: Sequence[Pulse], text: str) -> None:
        """Who holds the others up, with their stacks; written by whichever rank has found it out."""
        events = self._events or Events(self._run, self.attempt, f"rank{self.world.rank}")
        events.emit("hang", cause=text, ranks=[asdict(pulse) for pulse in found])

    def collective_broke(self, seen: Mapping[int, str]) -> None:
        """Where this rank last saw each one, when its collectives have broken: one that has died says nothing."""
        events = self._events or Events(self._run, self.attempt, f"rank{self.world.rank}")
        events.emit("broken", seen=seen)
        if not self._events:
            events.close()

    def metrics(self, row: dict[str, Any], **aside: Any) -> None:
        """``aside`` is written with the row, but is no fact of the result."""
        self.last_metrics.update(row)
        if self._metrics:
            self._metrics.add({"attempt": self.attempt, "time": time.time(), **row, **aside})

    def resume_from(self, facts: Mapping[str, Any]) -> None:
        """From those of a checkpoint, of which the last evaluation holds until the next."""
        self.last_metrics |= {name: value for name, value in facts.items() if name.startswith(EVALUATED)}

    def log_ledger(self, step: int, batches: Sequence[Batch]) -> None:
        """``batches``: what this rank fed to the model in ``step``, zero-weight ones left out."""
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
        """Collective: when it returns, every rank's ledger is in the storage, and a commit may follow."""
        if self._ledger:
            self._ledger.flush(strict=True)
            self.world.all_gather(None)

    def close(self) -> None:
        """Closes all of them, whatever one of them raises."""
        with ExitStack() as stack:
            for part in (self._events, self._ledger, self._metrics):
                if part:
                    stack.callback(part.close)
