"""The training loop: the same few lines for every method, strategy and task.

A global step is one update of the optimizer, or as many as its task asks for (`Task.updates`). An update is cut into
micro-batches; rank r runs those with k % world_size == r. What a micro-batch holds, and the
random numbers that its forward draws, depend on (seed, step, k) alone, and the loss is the sum over the task's units
(target tokens, samples, pairs) divided by the update's, which every rank knows: so any number of ranks trains the same
run.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from trainer.data import Batch, Cursor, RankStep, StepPlan
from trainer.distributed.world import World, memory_bytes
from trainer.errors import NonFiniteLoss
from trainer.optim import learning_rate
from trainer.recipe import Recipe
from trainer.strategies import Strategy
from trainer.tasks import Task, Totals, Update
from trainer.worker.hang_detector import CHECKPOINT, WAITING_FOR_DATA
from trainer.worker.mfu import Meter
from trainer.worker.rank_timer import RankTimer, of_this_rank, rank_record

NAMED_SAMPLES = NAMED_RANKS = 8
NAMING = (
    "SOURCE:FILE/PLACE is the entry of data.train and its file in the order of names, both from 0, and the byte where "
    "the sample begins (in Parquet and on the Hub its row)"
)
MIN_LOSS_SCALE = 1.0


@dataclass(frozen=True)
class Position:
    """Where a run stands: ``step`` optimizer steps are done, ``cursor`` is the next one's data."""

    step: int
    cursor: Cursor


@dataclass(frozen=True)
class Callbacks:
    """What the loop tells others. ``stop_requested`` may say yes on any one rank; the other calls happen on all.

    ``around_step`` surrounds a step from when its data is waited for until its update is done. ``around_update`` is
    entered when a step's gradients are complete, and left when the optimizer has used them. ``samples`` comes before a
    run's first step (as step 0) and after its last one."""

    step_done: Callable[[dict[str, Any]], None]
    fed: Callable[[int, list[Batch]], None]
    checkpoint: Callable[[Position, bool], None]
    evaluated: Callable[[dict[str, Any]], None]
    stop_requested: Callable[[], bool]
    phase: Callable[[int, str], None]
    around_step: Callable[[int], AbstractContextManager[Any]] = lambda step: nullcontext()
    around_update: Callable[[int], AbstractContextManager[Any]] = lambda step: nullcontext()
    examples: Callable[[int, list[dict[str, Any]]], None] = lambda step, shown: None
    samples: Callable[[int], None] = lambda step: None


class UpdateResult(NamedTuple):
    """What one update of the optimizer came to: the mean loss, the gradient's norm, whether any rank asks to stop, what
    attention did (`Operations.scores`), each rank's own seconds and its memory in bytes, and the metrics' sums over all
    ranks, to be named by ``totals``."""

    loss: float
    norm: float
    stop: bool
    scores: float
    own_s: list[float]
    held: list[float]
    sums: list[float]
    totals: Totals


class Loop:
    """Trains from a position to the last step, to ``training.stop_after``, or until somebody asks it to stop."""

    def __init__(
        self,
        recipe: Recipe,
        world: World,
        strategy: Strategy,
        task: Task,
        hooks: Callbacks,
        *,
        total_steps: int,
        eval_batches: Callable[[], Iterator[Batch]] | None,
        meter: Meter | None = None,
    ) -> None:
        self.recipe, self.world, self.strategy, self.task, self.hooks = recipe, world, strategy, task, hooks
        self.total_steps = total_steps
        self.eval_batches = eval_batches
        self.meter = meter
        self.own = RankTimer(world.device)

    def run(self, start: Position, steps: Iterator[RankStep]) -> Position:
        """Returns the position reached, which has been handed to ``hooks.checkpoint`` as the last one."""
        training = self.recipe.training
        end = min(self.total_steps, training.stop_after or self.total_steps)
        position = start
        self.strategy.module.train()
        if start.step == 0:
            self.hooks.samples(0)
        while position.step < end:
            step = position.step + 1
            with self.hooks.around_step(step):
                began = time.monotonic()
                self.own.start()
                self.hooks.phase(step, WAITING_FOR_DATA)
                data = next(steps)
                metrics, stop = self._step(step, data, began)
            position = Position(step, data.plan.next)
            self.hooks.fed(step, data.batches)
            self.hooks.step_done(metrics)
            if shown := self.task.example_rollouts():
                self.hooks.examples(step, shown)
            if self._evaluation_due(step):
                self.evaluate(step)
            if step == self.total_steps:
                self.hooks.samples(step)
            last = stop or step == end
            if last or step % self.recipe.checkpoint.every_steps == 0:
                self.hooks.phase(step, CHECKPOINT)
                self.hooks.checkpoint(position, last)
            if stop:
                break
        return position

    def _evaluation_due(self, step: int) -> bool:
        every = self.recipe.training.eval_every
        return self.eval_batches is not None and (step == self.total_steps or (every is not None and step % every == 0))

    def _step(self, step: int, data: RankStep, began: float) -> tuple[dict[str, Any], bool]:
        batches = data.batches + [Batch.empty()] * (data.plan.rounds(self.world.size) - len(data.batches))
        if self.task.prepares_steps:
            self.hooks.phase(step, "phase before the losses")
            self._prepare(step, batches)
        lr = learning_rate(self.recipe.schedule, self.recipe.optimizer.lr, step, self.total_steps)
        done = [self._update(step, update, lr) for update in self.task.updates(step, data.plan, batches)]
        said = {"loss": sum(update.loss for update in done) / len(done)}
        if sums := [sum(values) for values in zip(*(update.sums for update in done), strict=True)]:
            said |= self.task.step_metrics(done[0].totals.named(sums))
        norm = sum(update.norm for update in done) / len(done)
        stop = any(update.stop for update in done)
        seconds = time.monotonic() - began
        speed = self._speed(data.plan, sum(update.scores for update in done), seconds)
        own = [sum(one) for one in zip(*(update.own_s for update in done), strict=True)]
        ranks = rank_record(own, done[-1].held)
        return self._metrics(step, data.plan, said, lr, norm, {**speed, **ranks}), stop

    def _update(self, step: int, update: Update, lr: float) -> UpdateResult:
        loss_sum, totals = self._accumulate(step, update)
        self.hooks.phase(step, "exchange of the loss")
        stop_here, scores_here = float(self.hooks.stop_requested()), self._scores(update)
        rank, ranks = self.world.rank, self.world.size
        own = of_this_rank(self.own.take(), rank, ranks)
        held = of_this_rank(memory_bytes(self.world.device), rank, ranks)
        total, bad, stop, scores, *sums = self.world.all_reduce_sum(
            [loss_sum, float(not math.isfinite(loss_sum)), stop_here, scores_here, *own, *held, *totals.numbers()]
        )
        own, held, sums = sums[:ranks], sums[ranks : 2 * ranks], sums[2 * ranks :]
        if bad:
            self._non_finite(step, update, loss_sum)
        self.hooks.phase(step, "optimizer")
        norm = self.strategy.step(lr, self.hooks.around_update(step))
        if not math.isfinite(norm) and not self._may_scale_down():
            named = self._named(_samples(update))
            raise NonFiniteLoss(
                f"step {step}: the gradient's norm is {norm} while the loss is finite ({named}); "
                f"lower the learning rate ({lr:g}), compute in float32 or bfloat16 (model.dtype), or look at these "
                f"samples: {NAMING}"
            )
        return UpdateResult(total / max(1, update.units), norm, bool(stop), scores, own, held, sums, totals)

    def _scores(self, update: Update) -> float:
        if self.meter is None:
            return 0.0
        return sum(self.meter.operations.scores(batch) for batch in update.batches if isinstance(batch, Batch))

    def _may_scale_down(self) -> bool:
        """In float16 the first gradients overflow as a matter of course, until the scale of the loss has come down."""
        scaler = self.strategy.scaler
        return scaler.is_enabled() and scaler.get_scale() >= MIN_LOSS_SCALE

    def _accumulate(self, step: int, update: Update) -> tuple[float, Totals]:
        """This rank's sum of losses, and those of the metrics; gradients of the update's mean loss lie in the
        parameters afterwards."""
        scale = (self.world.size if self.strategy.averages_gradients else 1) / max(1, update.units)
        total, totals = torch.zeros((), dtype=torch.float64, device=self.world.device), Totals()
        self.own.start()
        for i, batch in enumerate(update.batches):
            seed_micro_batch(self.recipe.seed, step, batch.index)
            with self.strategy.micro_batch(last=i == len(update.batches) - 1):
                self.hooks.phase(step, f"forward of micro-batch {batch.index}")
                with self.strategy.autocast():
                    loss, sums = self.task.loss(self.strategy.module, batch, self.world.device)
                self.hooks.phase(step, f"backward of micro-batch {batch.index}")
                if i == len(update.batches) - 1:
                    self.own.stop()
                self.strategy.backward(loss * scale)
            total += loss.detach()
            totals.add(sums)
        return float(total), totals

    @torch.no_grad()
    def _prepare(self, step: int, batches: Sequence[Batch]) -> None:
        self.strategy.module.eval()
        with self.strategy.autocast():
            self.task.prepare_step(self.strategy.module, batches, self.world.device, step)
        self.strategy.reshard()
        self.strategy.module.train()

    def _metrics(
        self, step: int, plan: StepPlan, said: dict[str, float], lr: float, norm: float, speed: dict[str, Any]
    ) -> dict[str, Any]:
        return {
            "step": step,
            "total_steps": self.total_steps,
            "epoch": plan.epoch,
            **said,
            "lr": lr,
            "grad_norm": norm,
            "tokens": plan.tokens,
            "target_tokens": plan.target_tokens,
            **speed,
            "world_size": self.world.size,
            "samples": plan.next.samples,
        }

    def _speed(self, plan: StepPlan, scores: float, seconds: float) -> dict[str, float]:
        tokens_per_s = plan.tokens / max(seconds, 1e-9)
        used = self.meter.utilisation(plan.tokens, plan.target_tokens, scores, seconds) if self.meter else {}
        return {
            "tokens_per_s": tokens_per_s,
            "tokens_per_s_per_worker": tokens_per_s / self.world.size,
            "step_s": seconds,
            **used,
        }

    def _non_finite(self, step: int, update: Update, loss_sum: float) -> None:
        """Every rank gets here, since the sum told all of them; each names what it had been fed."""
        named = self._named([] if math.isfinite(loss_sum) else _samples(update))
        raise NonFiniteLoss(
            f"step {step}: the loss is not finite ({named}). Lower optimizer.lr, or look at these samples: {NAMING}"
        )

    def _named(self, mine: Sequence[str]) -> str:
        """Collective: what each rank names of its samples, the first ones of them."""
        named = [(rank, samples) for rank, samples in enumerate(self.world.all_gather(mine)) if samples]
        told = [f"rank {rank}: samples {_first_of(samples, NAMED_SAMPLES)}" for rank, samples in named]
        return _first_of(told, NAMED_RANKS, "; ")

    @torch.no_grad()
    def evaluate(self, step: int) -> None:
        assert self.eval_batches is not None
        began = time.monotonic()
        totals = Totals()
        self.strategy.module.eval()
        self.hooks.phase(step, WAITING_FOR_DATA)
        for batch in self.eval_batches():
            self.hooks.phase(step, "evaluation")
            totals.add(self._measure(batch))
            self.hooks.phase(step, WAITING_FOR_DATA)  # the storage may take longer than the hang detector waits
        self.hooks.phase(step, "exchange of the evaluation")
        self.strategy.reshard()
        self.strategy.module.train()
        sums = totals.named(self.world.all_reduce_sum(totals.numbers()))
        self.hooks.evaluated(
            {
                "step": step,
                **{f"eval_{name}": value for name, value in self.task.metrics(sums).items()},
                "eval_tokens": int(sums["tokens"]),
                "eval_target_tokens": int(sums["target_tokens"]),
                "eval_s": time.monotonic() - began,
            }
        )

    def _measure(self, batch: Batch) -> dict[str, torch.Tensor]:
        with self.strategy.autocast():
            return evaluated_sums(self.task, self.strategy.module, batch, self.world.device)


def _samples(update: Update) -> list[str]:
    return [sample for batch in update.batches for sample in batch.sample_ids]


def _first_of(things: Sequence[str], count: int, between: str = ", ") -> str:
    more = len(things) - count
    return between.join(things[:count]) + (f" and {more} more" if more > 0 else "")


def evaluated_sums(task: Task, module: torch.nn.Module, batch: Batch, device: torch.device) -> dict[str, torch.Tensor]:
    """What a batch adds to an evaluation, for the task's ``metrics`` to be made of."""
    loss, sums = task.eval_loss(module, batch, device)
    counted = {"units": task.loss_units(batch), "tokens": batch.tokens, "target_tokens": batch.target_tokens}
    return {"loss": loss, **{n: torch.tensor(v, device=device) for n, v in counted.items()}, **sums}


def seed_micro_batch(seed: int, step: int, index: int) -> None:
    """Seeds torch's generators on every device from (seed, step, micro-batch), whatever rank runs it."""
    digest = hashlib.sha256(f"micro-batch:{seed}:{step}:{index}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "big") >> 1)
