"""The records of a sweep, in a folder of their own next to the runs of its trials: ``<storage>/_sweeps/<name>/``.

recipe.yaml      the recipe that every trial shares, with the section `sweep`, as the user gave it
lease, claims/   the driver of the sweep, as in a run (`trainer.run.lease`)
stop             the driver that is requested to stop
submission, submitted/   the job that was given to a cluster for it
trials/000001.json       one record per trial, written before its run begins
best.yaml        the recipe of the best trial

All else that is known of a trial is in its run. So whatever ends the driver, nothing of the sweep is lost.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from trainer.errors import CorruptObject, RecipeChanged, RecipeError
from trainer.parsing import Malformed
from trainer.recipe import Recipe, loads
from trainer.recipe.sweeps.trials import number_of_trials
from trainer.recipe.trust import without_code
from trainer.records import Count, read_record
from trainer.run import layout
from trainer.run.changes import refusals
from trainer.storage import Storage, in_parallel, locate, open_storage

BEST = "best.yaml"
TRIALS = "trials"
RUNNING, STOPPING = "running", "stopping"
COMPLETE, STOPPED, FAILED = "complete", "stopped", "failed"
ENDED = (COMPLETE, STOPPED, FAILED)
MAY_DIFFER = ("trials", "parallel", "together")
"""Settings of the section `sweep` that may change when the sweep is resumed; trials may only grow."""
_PARALLEL = 16


@dataclass(frozen=True)
class TrialRecord:
    """A trial. ``values``: its settings by dotted path. ``state``: ``running`` until it has ended, also while no driver
    is there; ``stopping``: the stopping rule has decided, and the workers commit. ``step``: that of the decision.
    ``final``: the failure would repeat, so that the trial is not tried again."""

    number: Count
    run: str
    values: Mapping[str, Any] = field(default_factory=dict)
    state: str = RUNNING
    step: Count | None = None
    cause: str = ""
    final: bool = False

    @property
    def is_over(self) -> bool:
        """Returns True if a sweep that is resumed does not train it again."""
        return self.state in (COMPLETE, STOPPED, STOPPING) or (self.state == FAILED and self.final)


def folder_of(storage: Storage, name: str) -> Storage:
    return storage.child(layout.SWEEPS).child(name)


def sweep_at(uri: str, *, deadline_s: float = 120.0) -> Storage | None:
    """Returns the folder of the sweep with this URI, ``<storage>/<name>``; None if there is none."""
    home, name = locate(uri.rstrip("/"))
    folder = folder_of(open_storage(home.url, deadline_s=deadline_s), name)
    there = any(folder.info(key) is not None for key in (layout.RECIPE, layout.SUBMISSION))
    return folder if there else None


def read_trial(sweep: Storage, number: int) -> TrialRecord | None:
    """Returns None if there is no such trial yet. Raises CorruptObject."""
    key = _key(number)
    try:
        return read_record(TrialRecord, sweep.read_json(key))
    except FileNotFoundError:
        return None
    except Malformed as error:
        raise CorruptObject(
            f"{sweep.uri(key)} is no record of a trial ({error}); delete it to train it again"
        ) from error


def read_trials(sweep: Storage) -> list[TrialRecord]:
    """Returns the trials that have begun, by number."""
    numbers = [info.key.removeprefix(f"{TRIALS}/").removesuffix(".json") for info in sweep.list(TRIALS)]
    found = in_parallel(lambda text: read_trial(sweep, int(text)), [n for n in numbers if n.isdecimal()], _PARALLEL)
    return sorted((one for one in found if one is not None), key=lambda one: one.number)


def write_trial(sweep: Storage, trial: TrialRecord) -> None:
    sweep.write_json(_key(trial.number), asdict(trial))


def change_trial(sweep: Storage, number: int, **changes: Any) -> None:
    """Writes changes to a record that is there."""
    found = read_trial(sweep, number)
    assert found is not None, f"trial {number} has begun"
    write_trial(sweep, replace(found, **changes))


def freeze_sweep(sweep: Storage, recipe: Recipe, text: str) -> None:
    """Writes the sweep's recipe (``text``) if it is new, or if no trial has begun yet. Raises RecipeChanged if the
    trials that are there belong to another sweep."""
    if sweep.info(layout.RECIPE) is not None and sweep.list(TRIALS):
        changes = sweep_changes(sweep, recipe)
        if changes:
            lines = "\n  ".join(changes)
            raise RecipeChanged(
                f"the sweep {sweep.url} was started with other settings:\n  {lines}\nRun it with its own, or give the "
                "new sweep a name of its own: name=…"
            )
    sweep.write(layout.RECIPE, text.encode())


def read_sweep_recipe(sweep: Storage) -> Recipe:
    """Reads the sweep's recipe, without code that it names."""
    text = sweep.read(layout.RECIPE)
    return without_code(loads(text, sweep.uri(layout.RECIPE), stored=True, imports=False))


def sweep_changes(sweep: Storage, recipe: Recipe) -> list[str]:
    """Returns each setting with which the stored sweep cannot be resumed, as ``path: old -> new``."""
    try:
        frozen = loads(sweep.read(layout.RECIPE), sweep.uri(layout.RECIPE), stored=True, imports=False)
    except RecipeError as error:
        return [str(mistake) for mistake in error.mistakes]
    old, new = frozen.sweep, recipe.sweep
    assert old is not None
    assert new is not None
    before, now = old.model_dump(mode="json"), new.model_dump(mode="json")
    changes = [
        f"sweep.{key}: {before[key]} -> {now[key]}"
        for key in before
        if key not in (*MAY_DIFFER, "search") and before[key] != now[key]
    ]
    if old.chosen_search != new.chosen_search:
        changes.append(f"sweep.search: {old.chosen_search} -> {new.chosen_search}")
    elif number_of_trials(new) < number_of_trials(old):
        fewer = f"{number_of_trials(old)} -> {number_of_trials(new)}"
        changes.append(f"sweep.trials: {fewer}, and a sweep may only grow")
    return [*refusals(frozen, recipe), *changes]


def sweep_instead(uri: str, *, deadline_s: float = 120.0) -> tuple[Storage, Storage] | None:
    """Returns the folder of the sweep with this URI and the storage of its runs, unless there is a run at the URI, or
    no sweep."""
    home, name = locate(uri.rstrip("/"))
    home = open_storage(home.url, deadline_s=deadline_s)
    try:
        home.child(name).read(layout.RECIPE)  # S3 explains a refusal in the answer to a read, not to a look
        return None
    except FileNotFoundError:
        sweep = sweep_at(uri, deadline_s=deadline_s)
        return None if sweep is None else (sweep, home)


def is_trial(uri: str) -> bool:
    """Returns True if the run with this URI is a trial of a sweep."""
    home, name = locate(uri.rstrip("/"))
    sweep, _, number = name.rpartition("-")
    trial = read_trial(folder_of(home, sweep), int(number)) if sweep and number.isdecimal() else None
    return trial is not None and trial.run == name


def runs_at(uri: str, *, deadline_s: float = 120.0) -> list[str]:
    """Returns the URI itself if there is a run; that of each trial's run if there is a sweep instead."""
    found = sweep_instead(uri, deadline_s=deadline_s)
    return [uri] if found is None else [found[1].uri(trial.run) for trial in read_trials(found[0])]


def parts_at(uri: str) -> list[str]:
    """Returns the URI itself, or what can be deleted of a sweep with this URI: its runs that have begun, and then its
    records."""
    if (found := sweep_instead(uri)) is None:
        return [uri]
    sweep, home = found
    return [
        *(home.uri(trial.run) for trial in read_trials(sweep) if home.child(trial.run).list(layout.CLAIMS)),
        sweep.url,
    ]


def _key(number: int) -> str:
    return f"{TRIALS}/{number:06d}.json"
