"""The loop's metrics as rows, events and log lines."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any

from trainer.data import Batch
from trainer.run.startup_phases import FIRST_STEP, SAMPLES, Phases
from trainer.strategies.compiling import Warmup
from trainer.worker.callbacks import Callback, Position
from trainer.worker.checkpointer import Checkpointer
from trainer.worker.rank_timer import RANK_FIELDS
from trainer.worker.recorder import Recorder

log = logging.getLogger(__name__)

LOG_EVERY_S = 10.0


class Telemetry(Callback):
    """``compiles``: layers are compiled, which is reported apart. ``startup``: the phases until the first step."""

    def __init__(self, recorder: Recorder, checkpointer: Checkpointer, startup: Phases, *, compiles: bool) -> None:
        self._recorder, self._checkpointer = recorder, checkpointer
        self._warmup = Warmup(compiles)
        self._startup: Phases | None = startup
        self._logged_at = 0.0

    def on_start(self, position: Position) -> None:
        """Comes after the sample texts, which a run writes before its first step."""
        if self._startup and position.step == 0:
            self._startup.end(SAMPLES)

    def on_step_end(self, metrics: dict[str, Any], batches: Sequence[Batch]) -> None:
        step = metrics["step"]
        self._recorder.log_ledger(step, batches)
        if self._startup:
            self._startup.end(FIRST_STEP)
            spent, self._startup = self._startup.spent(), None
            self._recorder.event("startup", wait=False, step=step, seconds=spent, total_s=sum(spent.values()))
        if (now := time.monotonic()) - self._logged_at >= LOG_EVERY_S:
            self._logged_at = now
            shown = step, metrics["total_steps"], metrics["loss"], metrics["step_s"]
            log.info("step %d of %d: loss %.4f, %.2f s", *shown)
        if self._recorder.world.is_rank0:
            of_ranks = {name: metrics[name] for name in RANK_FIELDS if name in metrics}
            facts = {name: value for name, value in metrics.items() if name not in RANK_FIELDS}
            self._recorder.metrics(facts, **self._checkpointer.take_metrics(), **of_ranks, **self._compiled(step))

    def on_examples(self, step: int, examples: list[dict[str, Any]]) -> None:
        self._recorder.event("texts", wait=False, step=step, texts=examples)

    def on_evaluation(self, metrics: dict[str, Any]) -> None:
        self._recorder.metrics(metrics, **self._compiled(metrics["step"]))

    def _compiled(self, step: int) -> dict[str, Any]:
        """Returns the seconds spent in the compiler since the last call, if any, and records an event about them."""
        taken = self._warmup.taken()
        if taken is None:
            return {}
        self._recorder.event("compiled", wait=False, step=step, **taken._asdict())
        return {"compile_s": taken.seconds}
