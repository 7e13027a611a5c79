"""The training loop: the same code for every method, strategy and task.

A global step is one update of the optimizer, or several if the task does more (`Task.updates`). An update is divided
into micro-batches; of n data-parallel ranks, rank r runs micro-batch k if k % n == r. A data-parallel rank is one
process, or those that compute parts of the same tokens (`trainer.recipe.strategies.Mesh`). The samples of a
micro-batch, and the random numbers of its forward pass, depend on (seed, step, k) only. The loss is a sum over the
task's units (target tokens, samples, pairs) divided by the update's number of units, which every rank knows. So any
number of ranks trains the same run.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import reduce
from typing import NamedTuple

import torch

from trainer.data import Batch, RankStep, StepPlan
from trainer.distributed.world import memory_bytes
from trainer.errors import NonFiniteLoss
from trainer.optim import learning_rate
from trainer.run.metrics import EvalMetrics, StepMetrics
from trainer.tasks import Task, Totals, Update
from trainer.worker.build import Parts
from trainer.worker.callbacks import Callback, Position, around_step
from trainer.worker.hang_detector import CHECKPOINT, WAITING_FOR_DATA
from trainer.worker.judge import Verdict
from trainer.worker.rank_timer import RankTimer, of_this_rank, rank_record
from trainer.worker.texts.generative_eval import GenerativeEval

NAMED_SAMPLES = NAMED_RANKS = 8
NAMING = (
    "SOURCE:FILE/PLACE is the entry of data.train and its file in the order of names, both from 0, and the byte where "
    "the sample begins (in Parquet and on the Hub its row)"
)
MIN_LOSS_SCALE = 1.0


class UpdateResult(NamedTuple):
    """One update of the optimizer: the mean loss, the gradient's norm, whether a rank requests a stop, the pairs in
    attention (`Operations.scores`), each rank's local seconds and memory in bytes, and the metrics' sums over all
    ranks."""

    loss: float
    norm: float
    stop: bool
    scores: float
    own_s: list[float]
    held: list[float]
    sums: dict[str, torch.Tensor]


class Loop:
    """Trains from a position to the last step, to ``training.stop_after``, or until a rank's ``stop_requested`` returns
    True. ``judge`` may end the run after an evaluation."""

    def __init__(
        self,
        parts: Parts,
        callbacks: Sequence[Callback],
        stop_requested: Callable[[], bool],
        *,
        total_steps: int,
        eval_batches: Callable[[], Iterator[Batch]] | None,
        judge: Callable[[EvalMetrics], Verdict] = lambda metrics: Verdict(),
        answers: GenerativeEval | None = None,
    ) -> None:
        self.recipe, self.world, self.adapter = parts.recipe, parts.world, parts.adapter
        self.strategy, self.task, self.meter = parts.strategy, parts.task, parts.meter
        self.mesh = parts.strategy.mesh
        self.context_rank = self.mesh.context_rank(parts.world.rank)
        self.counts = self.context_rank == 0
        self.callbacks, self.stop_requested = callbacks, stop_requested
        self.total_steps = total_steps
        self.eval_batches, self.judge, self.answers = eval_batches, judge, answers
        self.own = RankTimer(self.world.device)

    def run(self, start: Position, steps: Iterator[RankStep]) -> Position:
        """Returns the position reached, after its checkpoint was taken."""
        training = self.recipe.training
        end = min(self.total_steps, training.stop_after or self.total_steps)
        position, ahead = start, deque[RankStep]()
        self.strategy.module.train()
        for callback in self.callbacks:
            callback.on_start(start)
        while position.step < end:
            step = position.step + 1
            with around_step(self.callbacks, step):
                began = time.monotonic()
                self.own.start()
                self._phase(step, WAITING_FOR_DATA)
                data = ahead.popleft() if ahead else next(steps)
                metrics, stop = self._step(step, data, began, self._later(step, end, steps, ahead))
            for callback in self.callbacks:
                callback.on_step_end(metrics, data.batches if self.counts else [])
            if examples := self.task.example_rollouts():
                for callback in self.callbacks:
                    callback.on_examples(step, examples)
            verdict, every = Verdict(), training.eval_every
            if self.eval_batches and (step == self.total_steps or (every is not None and step % every == 0)):
                verdict = self.judge(self.evaluate(step))
            position = Position(step, data.plan.next, verdict.over or step == self.total_steps)
            if position.over:
                for callback in self.callbacks:
                    callback.on_last_step(step)
            last = stop or position.over or step == end
            if last or verdict.best or step % self.recipe.checkpoint.every_steps == 0:
                self._phase(step, CHECKPOINT)
                for callback in self.callbacks:
                    callback.on_checkpoint(position, last=last)
            if last:
                break
        return position

    def _later(
        self, step: int, end: int, steps: Iterator[RankStep], ahead: deque[RankStep]
    ) -> Iterator[tuple[int, Sequence[Batch]]]:
        """Yields the later steps that the task may begin during ``step``, and keeps their data in ``ahead``."""
        for n in range(min(self.task.steps_ahead, end - step)):
            if n == len(ahead):
                ahead.append(next(steps))
            yield step + 1 + n, self._filled(ahead[n])

    def _filled(self, data: RankStep) -> list[Batch]:
        """Returns the micro-batches of this rank, as many as every other rank has."""
        return data.batches + [Batch.empty()] * (data.plan.rounds(self.mesh.data_ranks) - len(data.batches))

    def _phase(self, step: int, phase: str) -> None:
        for callback in self.callbacks:
            callback.on_phase(step, phase)

    def _step(
        self, step: int, data: RankStep, began: float, later: Iterator[tuple[int, Sequence[Batch]]]
    ) -> tuple[StepMetrics, bool]:
        batches = self._filled(data)
        if self.task.prepares_steps:
            self._phase(step, "phase before the losses")
            self._prepare(step, batches, later)
        lr = learning_rate(self.recipe.schedule, self.recipe.optimizer.lr, step, self.total_steps)
        done = [self._update(step, update, lr) for update in self.task.updates(step, data.plan, batches)]
        return self._metrics(step, data.plan, lr, done, time.monotonic() - began), any(update.stop for update in done)

    def _update(self, step: int, update: Update, lr: float) -> UpdateResult:
        loss_sum, totals = self._accumulate(step, update)
        self._phase(step, "exchange of the loss")
        stop_here, scores_here = float(self.stop_requested()), 0.0
        if self.meter:
            scores_here = sum(self.meter.operations.scores(b) for b in update.batches if isinstance(b, Batch))
        rank, ranks = self.world.rank, self.world.size
        own = of_this_rank(self.own.take(), rank, ranks)
        held = of_this_rank(memory_bytes(self.world.device), rank, ranks)
        bad, stop, *sums = self.world.all_reduce_sum(
            [
                float(not math.isfinite(loss_sum)),
                stop_here,
                *own,
                *held,
                *self._once([loss_sum, scores_here, *totals.numbers()]),
            ]
        )
        own, held, (total, scores, *sums) = sums[:ranks], sums[ranks : 2 * ranks], sums[2 * ranks :]
        if bad:  # on all ranks: each of them takes part in `_named`
            named = self._named([] if math.isfinite(loss_sum) else _samples(update))
            raise NonFiniteLoss(
                f"step {step}: the loss is not finite ({named}). Lower optimizer.lr, or look at these samples: {NAMING}"
            )
        self._phase(step, "optimizer")
        around = self.adapter.around_update(self.strategy.model, step, self.total_steps)
        norm = self.strategy.step(lr, around)
        if not math.isfinite(norm) and not self._may_scale_down():
            named = self._named(_samples(update))
            raise NonFiniteLoss(
                f"step {step}: the gradient's norm is {norm} while the loss is finite ({named}); "
                f"lower the learning rate ({lr:g}), compute in float32 or bfloat16 (model.dtype), or look at these "
                f"samples: {NAMING}"
            )
        loss = total / max(1, update.units)
        return UpdateResult(loss, norm, bool(stop), scores, own, held, totals.named(sums))

    def _once(self, numbers: list[float]) -> list[float]:
        """Returns zeros on the ranks whose micro-batches another rank counts."""
        return numbers if self.counts else [0.0] * len(numbers)

    def _may_scale_down(self) -> bool:
        """Returns True while a non-finite gradient is expected: in float16 the first gradients overflow, until the
        scaler has lowered the loss scale."""
        scaler = self.strategy.scaler
        return scaler.is_enabled() and scaler.get_scale() >= MIN_LOSS_SCALE

    def _accumulate(self, step: int, update: Update) -> tuple[float, Totals]:
        """Adds the gradients of the update's mean loss to the parameters. Returns this rank's sum of losses, and the
        metrics' sums."""
        scale = (self.world.size if self.strategy.averages_gradients else 1) / max(1, update.units)
        total, totals = torch.zeros((), dtype=torch.float64, device=self.world.device), Totals()
        self.own.start()
        for i, batch in enumerate(update.batches):
            seed_micro_batch(self.recipe.seed, step, batch.index, self.context_rank)
            with self.strategy.micro_batch(last=i == len(update.batches) - 1):
                self._phase(step, f"forward of micro-batch {batch.index}")
                with self.strategy.autocast():
                    loss, sums = self.task.loss(self.strategy.module, batch, self.world.device)
                self._phase(step, f"backward of micro-batch {batch.index}")
                if i == len(update.batches) - 1:
                    self.own.stop()
                self.strategy.backward(loss * scale)
            total += loss.detach()
            totals.add(sums)
        return float(total), totals

    @torch.no_grad()
    def _prepare(self, step: int, batches: Sequence[Batch], later: Iterator[tuple[int, Sequence[Batch]]]) -> None:
        self.strategy.module.eval()
        with self.strategy.autocast():
            self.task.prepare_step(self.strategy.module, batches, self.world.device, step)
            for number, ahead in later:
                self.task.prepare_ahead(self.strategy.module, ahead, self.world.device, number)
        self.strategy.reshard()
        self.strategy.module.train()

    def _metrics(
        self, step: int, plan: StepPlan, lr: float, done: Sequence[UpdateResult], seconds: float
    ) -> StepMetrics:
        sums = {name: reduce(torch.add, (update.sums[name] for update in done)) for name in done[0].sums}
        own_s = [sum(values) for values in zip(*(update.own_s for update in done), strict=True)]
        scores = sum(update.scores for update in done)
        used = self.meter.utilisation(plan.tokens, plan.target_tokens, scores, seconds) if self.meter else (None, None)
        tokens_per_s = plan.tokens / max(seconds, 1e-9)
        return StepMetrics(
            step=step,
            total_steps=self.total_steps,
            epoch=plan.epoch,
            loss=sum(update.loss for update in done) / len(done),
            task=self.task.step_metrics(sums) if sums else {},
            lr=lr,
            grad_norm=sum(update.norm for update in done) / len(done),
            tokens=plan.tokens,
            target_tokens=plan.target_tokens,
            tokens_per_s=tokens_per_s,
            tokens_per_s_per_worker=tokens_per_s / self.world.size,
            step_s=seconds,
            mfu=used[0],
            hfu=used[1],
            world_size=self.world.size,
            samples=plan.next.samples,
            **rank_record(own_s, done[-1].held),
        )

    def _named(self, mine: Sequence[str]) -> str:
        """Collective: returns the first samples of each rank as text."""
        named = [(rank, samples) for rank, samples in enumerate(self.world.all_gather(mine)) if samples]
        of_ranks = [f"rank {rank}: samples {_first_of(samples, NAMED_SAMPLES)}" for rank, samples in named]
        return _first_of(of_ranks, NAMED_RANKS, "; ")

    @torch.no_grad()
    def evaluate(self, step: int) -> EvalMetrics:
        assert self.eval_batches is not None
        began = time.monotonic()
        totals = Totals()
        self.strategy.module.eval()
        self._phase(step, WAITING_FOR_DATA)
        with self.strategy.averaged():
            for batch in self.eval_batches():
                self._phase(step, "evaluation")
                with self.strategy.autocast():
                    totals.add(evaluated_sums(self.task, self.strategy.module, batch, self.world.device))
                self._phase(step, WAITING_FOR_DATA)  # storage gets more patience than a step
            self._phase(step, "exchange of the evaluation")
            self.strategy.reshard()
        self.strategy.module.train()
        sums = totals.named(self.world.all_reduce_sum(self._once(totals.numbers())))
        values = {f"eval_{name}": value for name, value in self.task.metrics(sums).items()}
        answered = None
        if self.answers and self.answers.due(step, self.total_steps):
            answered = self.answers.evaluate(step)
            values |= {f"eval_{name}": value for name, value in answered.scores.items()} if answered else {}
        metrics = EvalMetrics(
            step=step,
            eval_loss=values.pop("eval_loss", None),
            task=values,
            eval_tokens=int(sums["tokens"]),
            eval_target_tokens=int(sums["target_tokens"]),
            eval_s=time.monotonic() - began,
            eval_answers=answered.count if answered else None,
            eval_answers_s=answered.seconds if answered else None,
        )
        for callback in self.callbacks:
            callback.on_evaluation(metrics)
        return metrics


def _samples(update: Update) -> list[str]:
    return [sample for batch in update.batches for sample in batch.sample_ids]


def _first_of(things: Sequence[str], count: int, between: str = ", ") -> str:
    more = len(things) - count
    return between.join(things[:count]) + (f" and {more} more" if more > 0 else "")


def evaluated_sums(task: Task, module: torch.nn.Module, batch: Batch, device: torch.device) -> dict[str, torch.Tensor]:
    """Returns the sums that a batch adds to an evaluation; `Task.metrics` turns them into metrics."""
    loss, sums = task.eval_loss(module, batch, device)
    counted = {"units": task.loss_units(batch), "tokens": batch.tokens, "target_tokens": batch.target_tokens}
    return {"loss": loss, **{n: torch.tensor(v, device=device) for n, v in counted.items()}, **sums}


def seed_micro_batch(seed: int, step: int, index: int, part: int = 0) -> None:
    """Seeds torch's generators on every device from (seed, step, micro-batch), whatever rank runs it. ``part``: the
    part of its tokens."""
    which = f"{index}/{part}" if part else str(index)
    digest = hashlib.sha256(f"micro-batch:{seed}:{step}:{which}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "big") >> 1)
