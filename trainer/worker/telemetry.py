"""The loop's metrics as rows, events and log lines."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import replace

from trainer.data import Batch
from trainer.layers.compiling import Warmup
from trainer.run.events import CompiledEvent, SampleText, StartupEvent, TextsEvent
from trainer.run.metrics import EvalMetrics, StepMetrics
from trainer.run.startup_phases import FIRST_STEP, SAMPLES, Phases
from trainer.worker.callbacks import Callback, Position
from trainer.worker.checkpointer import Checkpointer
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

    def on_step_end(self, metrics: StepMetrics, batches: Sequence[Batch]) -> None:
        step = metrics.step
        self._recorder.log_ledger(step, batches)
        if self._startup:
            self._startup.end(FIRST_STEP)
            spent, self._startup = self._startup.spent(), None
            self._recorder.event(StartupEvent(step=step, seconds=spent, total_s=sum(spent.values())), wait=False)
        if (now := time.monotonic()) - self._logged_at >= LOG_EVERY_S:
            self._logged_at = now
            shown = step, metrics.total_steps, metrics.loss, metrics.step_s
            log.info("step %d of %d: loss %.4f, %.2f s", *shown)
        if self._recorder.world.is_rank0:
            stall_s, lag = self._checkpointer.take_stall()
            self._recorder.metrics(
                replace(
                    metrics,
                    stall_s=stall_s,
                    backlog=lag.backlog,
                    checkpoint_age_s=lag.age_s,
                    compile_s=self._compile_s(step),
                )
            )

    def on_examples(self, step: int, examples: Sequence[SampleText]) -> None:
        self._recorder.event(TextsEvent(step=step, texts=tuple(examples)), wait=False)

    def on_evaluation(self, metrics: EvalMetrics) -> None:
        self._recorder.metrics(replace(metrics, compile_s=self._compile_s(metrics.step)))

    def _compile_s(self, step: int) -> float | None:
        """Returns the seconds spent in the compiler since the last call, if any, and records an event about them."""
        taken = self._warmup.taken()
        if taken is None:
            return None
        self._recorder.event(CompiledEvent(step=step, seconds=taken.seconds, programs=taken.programs), wait=False)
        return taken.seconds
