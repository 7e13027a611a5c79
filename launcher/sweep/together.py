"""The trials of a sweep in the same processes, on one base model (`trainer.worker.together`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from launcher.driver.attempts import last_step
from launcher.driver.driver import Signals, run_together
from launcher.monitor.progress import Progress
from launcher.sweep.trial import is_final
from trainer.checkpoint.publish import finished
from trainer.errors import MusterError
from trainer.recipe import Recipe
from trainer.recipe.sweeps.trials import listed, trial_name, trial_recipe
from trainer.run.failure import message_of
from trainer.run.sweep import COMPLETE, FAILED, TrialRecord, change_trial, read_trials, write_trial
from trainer.storage import Storage, open_storage


def train_trials(
    recipe: Recipe, base: Mapping[str, Any], folder: Storage, signals: Signals, progress: Progress
) -> None:
    """Trains the trials that have not ended, and records their ends. A loss that is not finite ends a trial alone; any
    other error is raised, and the sweep can be resumed."""
    assert recipe.sweep is not None
    begun, every = {trial.number for trial in read_trials(folder)}, listed(recipe.sweep) or []
    for number, values in enumerate(every, 1):
        if number not in begun:
            write_trial(folder, TrialRecord(number, trial_name(recipe.name, number), values))
    left = [trial for trial in read_trials(folder) if not trial.is_over]
    recipes = [trial_recipe(base, trial.number, trial.values) for trial in left]
    progress.say(f"{len(left)} of {len(every)} trials, all at the same time on one base model")
    failure = ""
    try:
        run_together(recipes, progress, signals=signals)
    except MusterError as error:
        if not is_final(error):
            raise
        failure = message_of(error)
    _record_ends(open_storage(recipe.storage), folder, left, recipes, failure)


def _record_ends(
    storage: Storage, folder: Storage, trials: Sequence[TrialRecord], recipes: Sequence[Recipe], failure: str
) -> None:
    for trial, recipe in zip(trials, recipes, strict=True):
        run = storage.child(trial.run)
        if finished(run, recipe.training) is not None:
            change_trial(folder, trial.number, state=COMPLETE, step=last_step(run))
        else:
            change_trial(folder, trial.number, state=FAILED, step=last_step(run), cause=failure, final=True)
