"""``muster sweep``: holds the sweep, runs its trials on one Ray, and can be killed at any moment.

The driver holds a lease, as that of a run does (`trainer.run.lease`): a second driver of the same sweep is refused, and
the trials' processes read in it that the sweep ends.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import wait
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from cluster.job_environment import job_environment
from launcher.capacity import room, workers_that_fit
from launcher.driver.driver import FIRST_LOOK_S, Signals, check_inputs
from launcher.driver.start_lock import one_at_a_time
from launcher.monitor.progress import Progress
from launcher.raytrain.sweeps import SweepPlan, SweepRunner
from launcher.sweep.table import TrialRow, read_rows
from launcher.sweep.together import train_trials
from launcher.sweep.trial import Trials, with_workers
from trainer.errors import Interrupted, StartAgain, UsageError, WorkerFailed
from trainer.interruption import current
from trainer.progress.lines import called_often
from trainer.progress.texts import plural
from trainer.recipe import Recipe, ResourcesSection
from trainer.recipe.rules.together import check_together
from trainer.recipe.sections.sweep import SweepSection
from trainer.recipe.sweeps.searches import SEARCHES
from trainer.recipe.sweeps.trials import (
    as_text,
    check_trials,
    direction,
    first_values,
    number_of_trials,
    trial_recipe,
    trials_of,
)
from trainer.run.lease import Lease, check_not_cancelled
from trainer.run.outcome import leave
from trainer.run.sweep import RUNNING, folder_of, freeze_sweep, read_trials
from trainer.storage import Storage, open_storage

RESUMES = "the same command resumes the sweep"
POLL_S = 0.5
SETTLE_S = 10.0
"""Seconds for which resources that have just been released may count as used."""


def sweep(recipe: Recipe, base: Mapping[str, Any], progress: Progress, *, takeover: bool = False) -> list[TrialRow]:
    """Runs the sweep of the recipe to its end, from where it stands; returns its trials, the best first. ``base``: the
    recipe as the user gave it, without filled-in defaults.

    Raises UsageError (2) before anything is started, and Interrupted (3) after a stop that lost nothing. A trial that
    fails is a row of the result.
    """
    section = section_of(recipe)
    check_trials(base, section)
    check_search(section)
    if section.together:
        check_together(trials_of(base, section))
    first_look = folder_of(open_storage(recipe.storage, deadline_s=FIRST_LOOK_S), recipe.name)
    folder, here = folder_of(open_storage(recipe.storage), recipe.name), job_environment(os.environ)
    with one_at_a_time(folder.url, takeover=takeover) as starting, called_often(progress.repeat):
        signals = Signals(progress)
        known = read_trials(first_look)
        check_inputs(trial_recipe(base, 1, first_values(section)), progress, begun=bool(known))
        check_not_cancelled(folder, here.job)
        with current.asking(signals.note):
            lease = Lease.acquire(folder, job=here.job, takeover=takeover, sleep=signals.sleep)
        signals.tell(lease, of_all=True)
        if starting:
            starting.close()
        with held(folder, lease, signals):
            freeze_sweep(folder, recipe, as_text(base))
            SweepDriver(recipe, base, folder, lease, signals, progress, takeover).drive()
            check_ended(recipe, folder)
    return read_rows(recipe, folder, open_storage(recipe.storage))


def section_of(recipe: Recipe) -> SweepSection:
    """Returns the section `sweep`. Raises UsageError if nothing varies."""
    if recipe.sweep is None or not recipe.sweep.parameters:
        raise UsageError(
            "nothing varies: give KEY=V1,V2 (optimizer.lr=1e-4,3e-4), or sweep.parameters in the recipe; `muster run` "
            "trains it once"
        )
    return recipe.sweep


def check_search(section: SweepSection) -> None:
    """Raises InputError if the library of the search is missing."""
    if SEARCHES[section.chosen_search].learns:
        from launcher.raytrain.samplers import sampler

        sampler(section.chosen_search, section.seed)


def check_ended(recipe: Recipe, folder: Storage) -> None:
    """Raises Interrupted if a trial has not ended, as when another driver has taken the sweep over."""
    count = number_of_trials(section_of(recipe))
    ended = sum(trial.state != RUNNING for trial in read_trials(folder))
    if ended < count:
        raise Interrupted(f"{count - ended} of {count} trials have not ended; {RESUMES} {recipe.name}")


@contextmanager
def held(folder: Storage, lease: Lease, signals: Signals) -> Iterator[None]:
    """Releases the lease of the sweep after the block."""
    try:
        yield
    except BaseException as error:
        current.unwinding()
        stopped = signals.stopped or isinstance(error, Interrupted | KeyboardInterrupt | SystemExit)
        leave(folder, lease, "interrupted" if stopped else "failed", error)
        raise
    leave(folder, lease, "succeeded")


@dataclass(frozen=True)
class SweepDriver:
    """A sweep whose lease this driver holds."""

    recipe: Recipe
    base: Mapping[str, Any]
    folder: Storage
    lease: Lease
    signals: Signals
    progress: Progress
    takeover: bool = False

    @property
    def section(self) -> SweepSection:
        return section_of(self.recipe)

    def drive(self) -> None:
        """Runs the trials that have not ended."""
        count, known = number_of_trials(self.section), read_trials(self.folder)
        left = count - sum(trial.is_over for trial in known)
        if known:
            self.progress.say(f"resumes {self.folder.url}: {count - left} of {count} trials have ended")
        if not left:
            return
        if self.section.together:
            train_trials(self.recipe, self.base, self.folder, self.signals, self.progress, takeover=self.takeover)
            return
        here = job_environment(os.environ)
        address = here.ray_address
        self.progress.phase(f"joining Ray at {address}" if address else "starting Ray")
        ray = SweepRunner(self._all_at_once(), address, self.progress)
        with ray:
            self.progress.phase("")
            ray.await_resources(here.nodes, lambda: self.signals.stopped)
            parallel, workers = self._shares(ray, left)
            many = plural(workers, "worker") if isinstance(workers, int) else f"{workers[0]} to {workers[1]} workers"
            self.progress.say(f"{left} of {count} trials, {parallel} at a time, with {many} each")
            trials = Trials(
                self.recipe.storage, self.recipe.name, self.lease.driver, self.base, self.section.metric, workers
            )
            grace = self.section.grace_steps or self.recipe.training.eval_every or 1
            plan = SweepPlan(
                self.recipe.name,
                self.folder.url,
                self.section,
                direction(self.recipe),
                grace,
                parallel,
                known,
                trials.train,
            )
            self._run(ray, plan)

    def _all_at_once(self) -> Recipe:
        """Returns the recipe with the workers of all trials that train at the same time, for which Ray is asked."""
        resources, least = self.recipe.resources, least_workers(self.recipe)
        most = max(resources.max_workers, least * (self.section.parallel or 1))
        return with_workers(self.recipe, (resources.min_workers, most))

    def _shares(self, ray: SweepRunner, left: int) -> tuple[int, int | tuple[int, int]]:
        """Returns how many trials train at the same time, and the `resources.workers` of each."""
        resources, least = self.recipe.resources, least_workers(self.recipe)
        asked = self.section.parallel
        if asked is not None:
            ray.ask_for(least * min(asked, left))
        places = free_places(resources, ray, least * min(asked or left, left), lambda: self.signals.stopped)
        parallel = max(1, min(left, asked or left, places // least))
        if asked is not None and parallel < min(asked, left):
            self.progress.warn(f"the cluster has room for {parallel} trials at a time, and not for {asked}")
        return parallel, share(self.recipe, places, parallel)

    def _run(self, ray: SweepRunner, plan: SweepPlan) -> None:
        outcome = ray.sweep(plan)
        self.signals.note_step()  # from here on there is something to commit
        current.command(RESUMES)
        asked = False
        with current.asking(self.signals.ask):
            while not wait([outcome], POLL_S).done:
                if self.signals.stopped and not asked:
                    asked = True
                    ray.stop()
                if self.lease.lost.is_set():
                    raise WorkerFailed(f"another driver has taken {self.folder.url} over; this one has stopped")
        again = ray.result(outcome)
        if self.signals.stopped:
            raise Interrupted(f"stopped on request; {RESUMES} {self.recipe.name}")
        if again:
            raise StartAgain(f"{again}; {RESUMES} {self.recipe.name}")


def least_workers(recipe: Recipe) -> int:
    """Returns the workers that a trial needs at least."""
    multiple = recipe.strategy.context_parallel
    return math.ceil(recipe.resources.min_workers / multiple) * multiple


def free_places(resources: ResourcesSection, ray: SweepRunner, wanted: int, stopped: Callable[[], bool]) -> int:
    """Returns how many workers there is room for now, once there is room for ``wanted``, or for all that the cluster
    holds; what others have just released counts as used for a while."""
    deadline = time.monotonic() + SETTLE_S
    while True:
        nodes = ray.nodes()
        free = room(resources, nodes, {})
        done = free >= min(wanted, workers_that_fit(resources, nodes)) or time.monotonic() >= deadline
        if (done and nodes) or stopped():
            return free
        time.sleep(POLL_S)


def share(recipe: Recipe, places: int, parallel: int) -> int | tuple[int, int]:
    """Returns the `resources.workers` of a trial: as in the recipe, with a maximum that leaves the others their
    places."""
    resources, multiple = recipe.resources, recipe.strategy.context_parallel
    if isinstance(resources.workers, int):
        return resources.workers
    most = places // parallel // multiple * multiple
    return resources.min_workers, max(least_workers(recipe), min(resources.max_workers, most))
