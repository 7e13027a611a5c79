"""A training loop in this process, with everything it is put together from open to a test's eyes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support.models import built
from tests.support.training import prepare, run_of
from trainer.adapters import Adapter
from trainer.data import Batch, Stream, eval_batches
from trainer.data.run_data import RunData, weights
from trainer.distributed.world import World, join_world
from trainer.optim import make_optimizer
from trainer.recipe import Recipe
from trainer.storage import open_storage
from trainer.strategies import Strategy, make_strategy
from trainer.tasks import Task, make_task
from trainer.worker.build import accompany
from trainer.worker.loop import Callbacks, Loop, Position
from trainer.worker.train_state import TrainState


@dataclass
class Bench:
    """The parts, and what the loop told: ``rows`` of metrics, ``evaluations``, ``due`` checkpoints (step, last)."""

    recipe: Recipe
    world: World
    model: Any
    strategy: Strategy
    task: Task
    adapter: Adapter
    state: TrainState
    data: RunData
    stream: Stream
    rows: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    due: list[tuple[int, bool]] = field(default_factory=list)
    fed: list[tuple[int, list[Batch]]] = field(default_factory=list)

    def start(self) -> Position:
        return Position(0, self.stream.start())

    def run(self, start: Position | None = None, **hooks: Callable[..., Any]) -> Position:
        begin = start or self.start()
        with closing(self.stream.prefetch(begin.cursor, 0, 1)) as steps:
            return self.loop(**hooks).run(begin, steps)

    def loop(self, **hooks: Callable[..., Any]) -> Loop:
        told: dict[str, Callable[..., Any]] = {
            "step_done": self.rows.append,
            "fed": lambda step, batches: self.fed.append((step, batches)),
            "checkpoint": lambda position, last: self.due.append((position.step, last)),
            "evaluated": self.evaluations.append,
            "stop_requested": lambda: False,
            "around_step": lambda step: nullcontext(),
            "around_update": lambda step: self.adapter.around_update(self.model, step, self.data.total_steps),
            **hooks,
        }
        names = [f.name for f in dataclasses.fields(Callbacks)]
        return Loop(
            self.recipe,
            self.world,
            self.strategy,
            self.task,
            Callbacks(**{name: told.get(name, lambda *given: None) for name in names}),
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
    with join_world(gpu=False) as world:
        data = prepare(recipe, open_storage(recipe.storage))
        task, strategy = make_task(recipe, data.train.spec.labels), make_strategy(recipe, world)
        model, adapter = built(recipe, task.labels)
        accompany(task, recipe, Path(recipe.model.path), world=world, strategy=strategy, reward=reward)
        task.attach(model)
        strategy.setup(model, lambda parameters: make_optimizer(recipe.optimizer, parameters, adapter.lr_scale))
        state = TrainState(strategy, adapter, task)
        yield Bench(recipe, world, model, strategy, task, adapter, state, data, _stream(recipe, data))


def _stream(recipe: Recipe, data: RunData) -> Stream:
    return Stream(
        data.train,
        run_of(recipe),
        seed=recipe.seed,
        sequence_length=recipe.data.sequence_length,
        packing=recipe.data.packing,
        weights=weights(recipe.data),
        global_batch=recipe.training.global_batch,
        micro_batch=recipe.training.micro_batch,
    )
