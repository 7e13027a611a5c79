"""A training loop in this process, whose parts and metrics a test can look at."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from trainer.adapters import Adapter
from trainer.data import Batch, Stream, eval_batches
from trainer.data.run_data import RunData
from trainer.distributed.world import World, join_world
from trainer.recipe import Recipe
from trainer.run.metrics import EvalMetrics, StepMetrics
from trainer.storage import open_storage
from trainer.strategies import Strategy
from trainer.tasks import Task
from trainer.worker.build import Parts, build
from trainer.worker.callbacks import Callback, Position
from trainer.worker.loop import Loop
from trainer.worker.start.stored_outputs import with_outputs
from trainer.worker.train_state import TrainState

from .training import prepare, run_of


@dataclass
class Bench(Callback):
    """The parts, and what the loop reported: ``rows`` of metrics, ``evaluations``, ``due`` checkpoints (step, last),
    ``fed`` batches (step, batches)."""

    parts: Parts
    state: TrainState
    data: RunData
    stream: Stream
    rows: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    due: list[tuple[int, bool]] = field(default_factory=list)
    fed: list[tuple[int, Sequence[Batch]]] = field(default_factory=list)
    step_done: Callable[[dict[str, Any]], Any] = field(default=lambda row: None)
    checkpoint: Callable[[Position, bool], Any] = field(default=lambda position, last: None)

    @property
    def recipe(self) -> Recipe:
        return self.parts.recipe

    @property
    def world(self) -> World:
        return self.parts.world

    @property
    def strategy(self) -> Strategy:
        return self.parts.strategy

    @property
    def model(self) -> Any:
        return self.parts.strategy.model

    @property
    def task(self) -> Task:
        return self.parts.task

    @property
    def adapter(self) -> Adapter:
        return self.parts.adapter

    def on_step_end(self, metrics: StepMetrics, batches: Sequence[Batch]) -> None:
        self.rows.append(metrics.to_row())
        self.fed.append((metrics.step, batches))
        self.step_done(self.rows[-1])

    def on_evaluation(self, metrics: EvalMetrics) -> None:
        self.evaluations.append(metrics.to_row())

    def on_checkpoint(self, position: Position, *, last: bool) -> None:
        self.due.append((position.step, last))
        self.checkpoint(position, last)

    def start(self) -> Position:
        return Position(0, self.stream.start())

    def run(
        self, start: Position | None = None, stop_requested: Callable[[], bool] = lambda: False, **given: Any
    ) -> Position:
        """``given``: a function for ``step_done`` or ``checkpoint``."""
        self.step_done = given.pop("step_done", self.step_done)
        self.checkpoint = given.pop("checkpoint", self.checkpoint)
        assert not given, given
        begin = start or self.start()
        with closing(self.stream.prefetch(begin.cursor, self.world.rank, self.world.size)) as steps:
            return self.loop(stop_requested).run(begin, steps)

    def loop(self, stop_requested: Callable[[], bool] = lambda: False) -> Loop:
        return Loop(
            self.parts,
            [self],
            stop_requested,
            total_steps=self.data.total_steps,
            eval_batches=self._eval_batches if self.data.eval else None,
        )

    def _eval_batches(self) -> Iterator[Batch]:
        assert self.data.eval is not None
        return eval_batches(self.data.eval, self.recipe.training.micro_batch, 0, 1)

    def losses(self) -> list[float]:
        return [row["loss"] for row in self.rows]


@contextmanager
def bench(recipe: Recipe, reward: Any = None) -> Iterator[Bench]:
    torch.set_num_threads(1)  # models this small lose time by sharing their work out
    with join_world(gpu=False) as world:
        storage = open_storage(recipe.storage)
        data = prepare(recipe, storage)
        parts = build(recipe, world, storage, data.train.spec.labels, reward)
        data = with_outputs(parts, data)
        state = TrainState(parts.strategy, parts.adapter, parts.task)
        yield Bench(parts, state, data, Stream.of(recipe, data.train, run_of(recipe)))
