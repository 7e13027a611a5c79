"""One trial of a sweep: drives its run in a thread, and gives its evaluations to Ray Tune. Without Ray.

What is stored of the run is given first, so that a trial which was interrupted, or has ended, is for the search and the
stopping rule what it was. Decisions of the rule come through the trial's record (`trainer.run.sweep`), and the end of
the sweep through its lease.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from rich.console import Console

from launcher.attempt import AttemptFailed
from launcher.capacity import workers_that_fit
from launcher.driver.attempts import Runner
from launcher.driver.driver import Signals
from launcher.driver.driver import run as drive
from launcher.monitor.progress import Progress
from trainer.errors import Interrupted, MusterError, StartAgain
from trainer.recipe import Recipe
from trainer.recipe.sweeps.trials import trial_recipe
from trainer.run import layout
from trainer.run.best import value_of
from trainer.run.failure import message_of
from trainer.run.jsonl_tail import JsonLinesTail
from trainer.run.metrics import StepMetrics, read_metrics_row
from trainer.run.stop_poller import StopPoller
from trainer.run.sweep import (
    COMPLETE,
    FAILED,
    RUNNING,
    STOPPED,
    STOPPING,
    TrialRecord,
    change_trial,
    folder_of,
    read_trial,
    write_trial,
)
from trainer.storage import Storage, open_storage

log = logging.getLogger(__name__)

POLL_S = 1.0
CANCELLED = "ended by `muster cancel`"
MakeRunner = Callable[[Recipe], Runner]
Result = dict[str, Any]
"""``value``, ``step``, ``replayed`` (`launcher.raytrain.stopping`), ``stored`` if it is not new, ``done``, and
``again``: why the sweep has to be started again."""


@dataclass(frozen=True)
class Trials:
    """The things that the trials of a sweep share. ``base``: the recipe as the user gave it; ``workers``:
    `resources.workers` of a trial; ``driver``: the number of the sweep's driver."""

    storage: str
    name: str
    driver: int
    base: Mapping[str, Any]
    metric: str
    workers: int | tuple[int, int]

    def train(self, number: int, make_runner: MakeRunner) -> Generator[Result, None, None]:
        """Trains a trial whose record is there. Closed, it has ended the run."""
        storage = open_storage(self.storage)
        sweep = folder_of(storage, self.name)
        trial = read_trial(sweep, number)
        assert trial is not None, f"trial {number} has begun"
        if trial.state == FAILED and not trial.final:  # its driver ended, and Tune has started it again
            trial = replace(trial, state=RUNNING, cause="")
            write_trial(sweep, trial)
        found = Evaluations(storage.child(trial.run), self.metric)
        stored = found.new()
        if trial.is_over:
            if trial.state == STOPPING:  # its driver ended before the workers had committed
                change_trial(sweep, number, state=STOPPED)
            yield from map(_replayed, stored[:-1])
            yield _end(None if trial.state == FAILED else found.last)
            return
        yield from map(_replayed, stored[:-1])
        yield from (_judged(reading) | {"stored": True} for reading in stored[-1:] if not found.is_last(reading))
        with StopPoller(sweep, self.driver, enabled=True) as poller:
            yield from Training(self, sweep, trial, found, poller.stop_requested).results(make_runner)

    def recipe(self, trial: TrialRecord) -> Recipe:
        recipe = trial_recipe(self.base, trial.number, trial.values)
        return with_workers(recipe, self.workers)


def with_workers(recipe: Recipe, workers: int | tuple[int, int]) -> Recipe:
    return recipe.model_copy(update={"resources": recipe.resources.model_copy(update={"workers": workers})})


@dataclass(frozen=True)
class Training:
    """A trial that has not ended."""

    trials: Trials
    sweep: Storage
    trial: TrialRecord
    found: Evaluations
    stopped: Callable[[], bool]

    def results(self, make_runner: MakeRunner) -> Generator[Result, None, None]:
        if self._is_decided():  # by what was stored
            change_trial(self.sweep, self.trial.number, state=STOPPED)
            yield _end(self.found.last)
            return
        recipe = self.trials.recipe(self.trial)
        with Driving(recipe, make_runner(recipe)) as driving:
            while not driving.ended(POLL_S):
                if self.stopped():
                    driving.stop()
                for reading in [] if driving.stopped else self.found.new_or_none():
                    if self.found.is_last(reading):
                        break  # it comes with the end, which nothing can stop
                    yield _judged(reading)
                    if self._is_decided():
                        driving.stop()
                        break
        if not driving.stopped:
            yield from map(_replayed, self.found.new()[:-1])
        yield self._ended(driving.error)

    def _is_decided(self) -> bool:
        """Returns True once the stopping rule has ended the trial."""
        found = read_trial(self.sweep, self.trial.number)
        return found is not None and found.state == STOPPING

    def _ended(self, error: BaseException | None) -> Result:
        """Records how the run has ended; returns the last result. A trial that was interrupted stays as it is."""
        number, steps = self.trial.number, self.found.steps
        if error is None:
            change_trial(self.sweep, number, state=COMPLETE, step=steps)
            return _end(self.found.last)
        if self._is_decided():  # whatever happened while the workers committed
            change_trial(self.sweep, number, state=STOPPED)
            return _end(self.found.last)
        if isinstance(error, StartAgain):
            return _end(None) | {"again": error.cause}
        if self.stopped():
            return _end(None)
        if isinstance(error, Interrupted):
            change_trial(self.sweep, number, state=STOPPED, step=steps, cause=CANCELLED)
            return _end(self.found.last)
        cause, final = message_of(error), is_final(error)
        change_trial(self.sweep, number, state=FAILED, step=steps, cause=cause, final=final)
        return _end(None)


def is_final(error: BaseException) -> bool:
    """Returns True for a failure that would repeat and that the user cannot correct: a loss that is not finite."""
    failed = error.__cause__
    return isinstance(failed, AttemptFailed) and failed.cause.fatal and not failed.cause.usage


class Reading(NamedTuple):
    """The value of the sweep's metric after a step."""

    step: int
    value: float


def _judged(reading: Reading) -> Result:
    return {**reading._asdict(), "replayed": False, "done": False}


def _replayed(reading: Reading) -> Result:
    return {**reading._asdict(), "replayed": True, "done": False}


def _end(last: Reading | None) -> Result:
    return {**(last._asdict() if last else {}), "done": True}


class Evaluations:
    """The evaluations of a run, as they are stored. ``last``: the newest one that was given; ``steps``: the last step
    of training."""

    def __init__(self, run: Storage, metric: str) -> None:
        self._tail = JsonLinesTail(run, layout.METRICS, read_metrics_row)
        self._metric = metric
        self._total_steps: int | None = None
        self.last: Reading | None = None
        self.steps = 0

    def new(self) -> list[Reading]:
        """Returns those since the last call. An attempt that repeats steps repeats their evaluations; these are left
        out, and so are values that are not finite."""
        found: list[Reading] = []
        for row in self._tail.new():
            if isinstance(row, StepMetrics):
                self._total_steps, self.steps = row.total_steps or self._total_steps, max(self.steps, row.step)
            elif (value := value_of(row, self._metric)) is not None and row.step > (self.last.step if self.last else 0):
                self.last = Reading(row.step, value)
                found.append(self.last)
        return found

    def new_or_none(self) -> list[Reading]:
        """Returns `new`, or nothing while the storage does not answer."""
        try:
            return self.new()
        except MusterError as error:
            log.warning("the evaluations cannot be read: %s", error)
            return []

    def is_last(self, reading: Reading) -> bool:
        """Returns True for the evaluation after the last step of the run."""
        return self._total_steps is not None and reading.step >= self._total_steps


class Driving:
    """The driver of a run in a thread. Leaving the block ends the run, with a checkpoint."""

    def __init__(self, recipe: Recipe, runner: Runner) -> None:
        progress = Progress(Console(quiet=True))
        self._signals = Signals(progress)
        self.stopped = False
        self._pool = ThreadPoolExecutor(1, "driver")
        self._outcome: Future[None] = self._pool.submit(_drive, recipe, progress, self._signals, runner)

    @property
    def error(self) -> BaseException | None:
        """The driver's error, once it has ended."""
        return self._outcome.exception()

    def ended(self, timeout_s: float) -> bool:
        return bool(wait([self._outcome], timeout_s).done)

    def stop(self) -> None:
        self.stopped = True
        self._signals.ask("muster sweep")

    def __enter__(self) -> Driving:
        return self

    def __exit__(self, *error: object) -> None:
        self._signals.ask("muster sweep")
        self._pool.shutdown(wait=True)


def _drive(recipe: Recipe, progress: Progress, signals: Signals, runner: Runner) -> None:
    """Trains the run. As long as the cluster is large enough for it, it waits for workers: other trials may hold the
    places of nodes that are lost."""
    while True:
        try:
            drive(recipe, progress, signals=signals, runner=runner)
            return
        except StartAgain:
            fit = workers_that_fit(recipe.resources, runner.all_nodes())
            if signals.stopped or fit < recipe.resources.min_workers:
                raise
