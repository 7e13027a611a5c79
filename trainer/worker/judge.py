"""Judges each evaluation: is it the best one so far (`checkpoint.keep_best`), and does the run end
(`training.early_stop`)?"""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

from trainer.recipe import Recipe
from trainer.recipe.tasks import compared_metrics
from trainer.run.best import (
    Best,
    Patience,
    State,
    better_of,
    is_over,
    read_best,
    read_patience,
    to_state,
    value_of,
    waited,
)
from trainer.run.events import BestEvent, EarlyStopEvent
from trainer.run.metrics import EvalMetrics
from trainer.worker.recorder import Recorder

log = logging.getLogger(__name__)


class Verdict(NamedTuple):
    """``best``: the evaluation is the best so far, and its weights are kept. ``over``: the run ends."""

    best: bool = False
    over: bool = False


class Judge:
    """Every rank has one, with the same state. ``total_steps``: the run's, after which nothing can end early."""

    def __init__(self, recipe: Recipe, recorder: Recorder, total_steps: int) -> None:
        self._total_steps = total_steps
        self._keep, self._stop = recipe.checkpoint.keep_best, recipe.training.early_stop
        self._better, self._recorder = compared_metrics(recipe), recorder
        self._of_answers = recipe.generative_eval.metrics
        self._best: Best | None = None
        self._patience: Patience | None = None
        self._over = False

    def resume_from(self, state: State) -> None:
        """Continues from the state of a commit record. What was compared by another metric starts again."""
        best, patience = read_best(state), read_patience(state)
        if best and best.metric == self._keep:
            self._best = best
        if patience and self._stop and patience.metric == self._stop.metric:
            self._patience = patience

    def state(self) -> dict[str, Any]:
        """Returns the entries for a commit record's state."""
        return to_state(self._best, self._patience, over=self._over)

    def evaluated(self, metrics: EvalMetrics) -> Verdict:
        """Collective."""
        # Rank 0 decides, so that no rank can see another value in the last bit and take another way.
        judged = self._recorder.world.decide_on_rank0(lambda: self._judged(metrics))
        over = metrics.step < self._total_steps and is_over(judged[1], self._stop)
        verdict = Verdict(judged[0] != self._best, over)
        self._best, self._patience = judged
        self._over = verdict.over
        self._record(metrics.step, verdict)
        return verdict

    def _judged(self, metrics: EvalMetrics) -> tuple[Best | None, Patience | None]:
        best, patience, step = self._best, self._patience, metrics.step
        if self._keep and (value := value_of(metrics, self._keep)) is not None:
            now = Best(self._keep, value, step, self._recorder.attempt)
            best = better_of(best, now, self._better[self._keep])
        # An evaluation without answers has no score, which is no sign that the score is worse.
        if (stop := self._stop) is not None and (metrics.eval_answers or stop.metric not in self._of_answers):
            before = patience or Patience(stop.metric)
            value = value_of(metrics, stop.metric)
            patience = waited(before, value, step, self._better[stop.metric], stop.min_delta)
        return best, patience

    def _record(self, step: int, verdict: Verdict) -> None:
        if verdict.best and self._best:
            self._recorder.event(BestEvent(step=step, metric=self._best.metric, value=self._best.value), wait=False)
        if verdict.over and (last := self._patience):
            log.info("the run ends early: %s", last)
            event = EarlyStopEvent(
                step=step, metric=last.metric, value=last.value, best_step=last.step, evaluations=last.evaluations
            )
            self._recorder.event(event)
