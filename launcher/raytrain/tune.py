"""A sweep on Ray Tune: which trial comes next, and which one stops early. Each trial is a driver of a run, in an actor.

Tune keeps nothing: trials are recorded in the sweep's storage before they begin (`trainer.run.sweep`), and a sweep that
is resumed replays their stored results to a new Tuner. The actors take no CPU, and stay on the node of the sweep's
driver, where they have its files and its environment; the workers of the trials are placed by Ray Train.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from typing import Any

import ray
from ray import tune

from launcher.child import tell
from launcher.raytrain.failures import last_error
from launcher.raytrain.searching import AGAIN, OptunaValues, TrialSearch
from launcher.raytrain.stopping import REPLAYED, STEP, VALUE, Decides
from launcher.raytrain.sweeps import SweepPlan
from launcher.raytrain.trials import Crew, TrialActor, environment_of_trials
from trainer.recipe.sweeps.searches import STOPS
from trainer.recipe.sweeps.trials import described, listed, number_of_trials, trial_name
from trainer.run.sweep import FAILED, STOPPED, STOPPING, change_trial, read_trial
from trainer.storage import open_storage

DEATHS = 3
"""Deaths of a trial's driver before the trial counts as failed."""
SETTINGS = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    # A trial that failed has no metric in its last result.
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_WARN_INSUFFICENT_RESOURCE_THRESHOLD_S": "-1",
}


class Tuning:
    """One Tuner, and the searcher, scheduler and actors that it is made of. ``variables``: the names of `cluster.env`;
    ``joined``: Ray is a cluster, and not of this machine's own."""

    def __init__(self, plan: SweepPlan, variables: tuple[str, ...], *, joined: bool) -> None:
        os.environ.update(SETTINGS)
        self._plan, self._reports = plan, Reports(plan)
        values = listed(plan.section)
        optuna = OptunaValues(plan.section, plan.mode, plan.known) if values is None else None
        self._search = self._reports.search = TrialSearch(
            open_storage(plan.folder),
            plan.name,
            number_of_trials(plan.section),
            plan.known,
            values,
            optuna,
            self._reports.on_trial,
        )
        self._scheduler: Decides = STOPS.load(plan.section.stop)(plan.section, plan.mode, plan.grace_steps)
        self._scheduler.stop = self._reports.on_stop
        self._crew = Crew(plan.train, environment_of_trials(variables), joined)

    def run(self) -> str | None:
        """Returns once all trials have ended; see `SweepServer.sweep`."""
        here = f"node:{ray.util.get_node_ip_address()}"
        with tempfile.TemporaryDirectory(prefix="muster-tune-") as folder:
            tuner = tune.Tuner(
                tune.with_resources(
                    tune.with_parameters(TrialActor, crew=self._crew),
                    tune.PlacementGroupFactory([{"CPU": 0, here: 0.001}]),
                ),
                tune_config=tune.TuneConfig(
                    search_alg=self._search,
                    scheduler=self._scheduler,
                    num_samples=number_of_trials(self._plan.section),
                    max_concurrent_trials=self._plan.parallel,
                    reuse_actors=True,
                ),
                run_config=tune.RunConfig(
                    name=self._plan.name,
                    storage_path=folder,
                    failure_config=tune.FailureConfig(max_failures=DEATHS),
                    checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                    callbacks=[self._reports],
                    verbose=0,
                ),
            )
            tuner.fit()
        return self._reports.again

    def stop(self) -> None:
        self._search.stopped = True


class Reports(tune.Callback):
    """Reports to the driver what happens to the trials, and records decisions."""

    search: TrialSearch

    def __init__(self, plan: SweepPlan) -> None:
        self.again: str | None = None
        self._plan, self._sweep = plan, open_storage(plan.folder)
        self._over = {trial.number for trial in plan.known if trial.is_over}

    def on_stop(self, number: int, step: int) -> None:
        change_trial(self._sweep, number, state=STOPPING, step=step)

    def on_trial(self, number: int, result: Mapping[str, Any] | None) -> None:
        """``result``: the last one of a trial that has ended, None of one that begins."""
        if result is not None and result.get(AGAIN):
            self.again, self.search.stopped = str(result[AGAIN]), True
        trial = read_trial(self._sweep, number) if number not in self._over else None
        if trial is None:
            return
        if result is None:
            tell(f"{trial.run}: {described(trial.values)}")
        elif trial.state == FAILED:
            tell(f"{trial.run}: failed: {trial.cause.partition(chr(10))[0]}")
        elif trial.state == STOPPED:
            tell(f"{trial.run}: {trial.cause or f'stopped by {self._plan.section.stop}'} after step {trial.step}")
        else:
            tell(f"{trial.run}: {trial.state if trial.is_over else 'interrupted'}")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Records that a trial's process has failed, each time that it was started."""
        number = trial.config["number"]
        record = read_trial(self._sweep, number)
        if record is not None and not record.is_over:
            change_trial(self._sweep, number, state=FAILED, cause=f"its driver: {last_error(str(trial.get_error()))}")
            self.on_trial(number, {})

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        if VALUE in result and not any(result.get(key) for key in (REPLAYED, "stored", "done")):
            name = trial_name(self._plan.name, trial.config["number"])
            tell(f"{name}: {self._plan.section.metric} {result[VALUE]:.4f} after step {result[STEP]}")
