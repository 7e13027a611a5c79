"""The length of a run, if its data are prepared, and its speed, if it has run before.

Both are optional in a plan: they are left out when the storage does not answer within `ANSWER_S`, or fails."""

from __future__ import annotations

import logging
import statistics
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from itertools import islice
from typing import TypeVar

from trainer.data.run_data import find_prepared, total_steps, try_open_data
from trainer.model import fetch_model, load_tokenizer
from trainer.recipe import Recipe
from trainer.run import layout
from trainer.run.jsonl import metrics_backwards
from trainer.run.metrics import StepMetrics
from trainer.storage import open_storage

log = logging.getLogger(__name__)
T = TypeVar("T")

ANSWER_S = 2.0
ROWS = 50


@dataclass(frozen=True)
class RunLength:
    """Steps, samples and speed of a run; None where unknown.

    ``tokens_per_s``: sum over all ranks. ``measured_ranks``: the number of ranks when the run itself measured it."""

    steps: int | None = None
    steps_per_epoch: int | None = None
    samples_per_epoch: int | None = None
    tokens_per_s: float | None = None
    measured_ranks: int | None = None

    def hours(self, tokens_per_step: int) -> float | None:
        if self.steps is None or not self.tokens_per_s:
            return None
        return self.steps * tokens_per_step / self.tokens_per_s / 3600


class RunLengthQuery:
    """Requests to the storage that begin when the object is made, and run while the plan is computed."""

    def __init__(self, recipe: Recipe, tokens_per_s: float | None) -> None:
        """``tokens_per_s``: the user's own value, which replaces that of the run's metrics."""
        self._given = RunLength(steps=recipe.training.steps, tokens_per_s=tokens_per_s)
        self._deadline = time.monotonic() + ANSWER_S
        self._length = _started(lambda: _length(recipe))
        self._speed = _started(lambda: _speed(recipe)) if tokens_per_s is None else None

    def outlook(self) -> RunLength:
        outlook, length = self._given, self._answer(self._length)
        if length is not None:
            outlook = replace(outlook, steps=length[0], steps_per_epoch=length[1], samples_per_epoch=length[2])
        if self._speed and (speed := self._answer(self._speed)) is not None:
            outlook = replace(outlook, tokens_per_s=speed[0], measured_ranks=speed[1])
        return outlook

    def _answer(self, future: Future[T | None]) -> T | None:
        """Returns None if the call has failed, or has no result at the deadline."""
        try:
            return future.result(max(0.0, self._deadline - time.monotonic()))
        except Exception as error:  # a storage may raise anything, and its answer is optional
            log.debug("left out of the plan: %r", error)
            return None


def _started(call: Callable[[], T]) -> Future[T]:
    """Starts the call in a daemon thread. An executor's threads would keep the process alive until a silent storage
    answers."""
    future: Future[T] = Future()

    def work() -> None:
        try:
            future.set_result(call())
        except Exception as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return future


def _length(recipe: Recipe) -> tuple[int, int, int] | None:
    """Returns the steps of the run and of an epoch, and an epoch's samples; None if the data are not prepared."""
    storage = open_storage(recipe.storage, deadline_s=ANSWER_S)
    shared = storage.child(layout.PREPARED)
    begun = try_open_data(recipe, storage.child(recipe.name), shared)
    train = begun.train if begun else None
    if not begun:
        folder = fetch_model(recipe.model, weights=False).folder
        tokenizer = load_tokenizer(folder, trust_remote_code=recipe.model.trust_remote_code)
        train = find_prepared(recipe, shared, tokenizer)
    if train is None:
        return None
    epoch = recipe.training.model_copy(update={"steps": None, "epochs": 1})
    per_epoch = total_steps(recipe.model_copy(update={"training": epoch}), train)
    return total_steps(recipe, train), per_epoch, train.totals.samples


def _speed(recipe: Recipe) -> tuple[float, int] | None:
    """Returns the median tokens per second of the run's last steps, and its number of ranks then."""
    storage = open_storage(recipe.storage, deadline_s=ANSWER_S)
    rows = islice(metrics_backwards(storage.child(recipe.name)), ROWS)
    steps = [row for row in rows if isinstance(row, StepMetrics)]
    measured = [(row.tokens_per_s, row.world_size) for row in steps if row.tokens_per_s and row.world_size]
    return (statistics.median(speed for speed, _ in measured), measured[0][1]) if measured else None
