"""The interface between the training loop and what observes it: telemetry, checkpoints, hang detection, profiles."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from trainer.data import Batch, Cursor
from trainer.run.events import SampleText
from trainer.run.metrics import EvalMetrics, StepMetrics


@dataclass(frozen=True)
class Position:
    """``step`` optimizer steps are done; ``cursor`` is the position of the next step's data. ``over``: the run is
    complete, at its last step or earlier (`training.early_stop`)."""

    step: int
    cursor: Cursor
    over: bool = False


class Callback:
    """Observes the loop; by default it does nothing. Every rank calls the same methods in the same order, so that a
    callback may run collectives in each of them except `on_phase`."""

    def on_start(self, position: Position) -> None:
        """Called before the first step of an attempt."""

    def around_step(self, step: int) -> AbstractContextManager[Any]:
        """Surrounds a step, from the wait for its data until its update is done."""
        return nullcontext()

    def on_phase(self, step: int, phase: str) -> None:
        """Called when a part of ``step`` begins: waiting for data, forward, backward, optimizer, evaluation, …"""

    def on_step_end(self, metrics: StepMetrics, batches: Sequence[Batch]) -> None:
        """``batches``: this rank's micro-batches of the step, without those that only fill up its number of forward
        passes."""

    def on_examples(self, step: int, examples: Sequence[SampleText]) -> None:
        """``examples``: texts that the task generated in this step (`trainer.tasks.Task.example_rollouts`)."""

    def on_evaluation(self, metrics: EvalMetrics) -> None:
        """Called after an evaluation."""

    def on_last_step(self, step: int) -> None:
        """Called after the run's last step, before its checkpoint."""

    def on_checkpoint(self, position: Position, *, last: bool) -> None:
        """Called when a checkpoint is due. ``last``: no step of this attempt follows."""


@contextmanager
def around_step(callbacks: Iterable[Callback], step: int) -> Iterator[None]:
    with ExitStack() as stack:
        for callback in callbacks:
            stack.enter_context(callback.around_step(step))
        yield
