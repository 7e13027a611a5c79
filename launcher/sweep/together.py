"""The trials of a sweep in the same processes, on one base model (`trainer.worker.together`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from launcher.driver.attempts import last_step
from launcher.driver.driver import Signals, run_together
from launcher.monitor.progress import Progress
from launcher.sweep.trial import CANCELLED, is_final
from trainer.checkpoint.publish import finished
from trainer.errors import MusterError
from trainer.recipe import Recipe
from trainer.recipe.sweeps.trials import listed, trial_name, trial_recipe
from trainer.run.failure import message_of
from trainer.run.lease import end_is_requested, read_lease
from trainer.run.sweep import COMPLETE, FAILED, STOPPED, TrialRecord, change_trial, read_trials, write_trial
from trainer.storage import Storage, open_storage


def train_trials(
    recipe: Recipe,
    base: Mapping[str, Any],
    folder: Storage,
    signals: Signals,
    progress: Progress,
    *,
    takeover: bool = False,
) -> None:
    """Trains the trials that have not ended, and records their ends. A loss that is not finite ends a trial alone, and
    so does `muster cancel` of its run; any other error is raised, and the sweep can be resumed."""
    assert recipe.sweep is not None
    begun, every = {trial.number for trial in read_trials(folder)}, listed(recipe.sweep) or []
    for number, values in enumerate(every, 1):
        if number not in begun:
            write_trial(folder, TrialRecord(number, trial_name(recipe.name, number), values))
    left = [trial for trial in read_trials(folder) if not trial.is_over]
    recipes = [trial_recipe(base, trial.number, trial.values) for trial in left]
    progress.say(f"{len(left)} of {len(every)} trials, all at the same time on one base model")
    storage, failure = open_storage(recipe.storage), ""
    try:
        run_together(recipes, progress, takeover=takeover, signals=signals)
    except MusterError as error:
        failure = message_of(error) if is_final(error) else ""
        try:
            open_trials = record_ends(storage, folder, left, recipes, failure)
        except MusterError:  # a resume looks again
            raise error from None
        if open_trials:
            raise
    else:
        record_ends(storage, folder, left, recipes)


def record_ends(
    storage: Storage, folder: Storage, trials: Sequence[TrialRecord], recipes: Sequence[Recipe], failure: str = ""
) -> int:
    """Records the trials that have ended; returns how many have not. ``failure``: a line for each trial whose loss was
    not finite."""
    lines, still_open = failure.splitlines(), 0
    for trial, recipe in zip(trials, recipes, strict=True):
        run = storage.child(trial.run)
        cause = next((line for line in lines if f"run {trial.run}: " in line), None)
        if finished(run, recipe.training) is not None:
            change_trial(folder, trial.number, state=COMPLETE, step=last_step(run))
        elif cause is not None:
            change_trial(folder, trial.number, state=FAILED, step=last_step(run), cause=cause, final=True)
        elif (lease := read_lease(run)) is not None and end_is_requested(run, lease.driver):
            change_trial(folder, trial.number, state=STOPPED, step=last_step(run), cause=CANCELLED)
        else:
            still_open += 1
    return still_open
