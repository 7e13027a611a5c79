"""Compares a run's recipe with the one that resumes it: changes are refused, or accepted and recorded."""

from __future__ import annotations

from trainer.recipe import Recipe, TrainingSection, differences
from trainer.recipe.tasks import TASKS
from trainer.recipe.writing import changeable_values, length_decides
from trainer.run.claims import read_claims
from trainer.run.events import ChangeEvent, SettingChange
from trainer.run.jsonl import Events, read_events
from trainer.storage import Storage


def refusals(frozen: Recipe, new: Recipe) -> list[str]:
    """Returns each value of ``new`` with which the run of ``frozen`` cannot be resumed, as ``path: old -> new``. A run
    may become longer, unless the result of a step depends on the length."""
    found = differences(frozen, new)
    if not is_longer(frozen, new):
        return found
    others = differences(frozen, with_length(new, frozen.training))
    why = length_decides(frozen)
    return [*others, *(f"{line} ({why})" for line in found if why and line not in others)]


def is_longer(frozen: Recipe, new: Recipe) -> bool:
    """Returns True if ``new`` has more steps, or more epochs."""
    old, now = frozen.training, new.training
    lengths = (old.steps, now.steps), (old.epochs, now.epochs)
    return any(before is not None and after is not None and before < after for before, after in lengths)


def with_length(recipe: Recipe, training: TrainingSection) -> Recipe:
    """Returns the recipe with the steps and epochs of ``training``."""
    length = {"steps": training.steps, "epochs": training.epochs}
    return recipe.model_copy(update={"training": recipe.training.model_copy(update=length)})


def further(frozen: Recipe, run: Storage, adapter: str) -> str:
    """Returns how another run can begin from the result of a run that cannot become longer: the part of a sentence.
    ``adapter``: the URI of the final adapter. Empty if no run can begin from it."""
    if frozen.adapter.method == "none":
        return f"begin another run from its result, with model.path: {adapter}"
    if not (TASKS[frozen.task].has_reference or frozen.adapter.row.residual or frozen.adapter.row.inserts_tokens):
        return f"begin another run from its result, with adapter.from: {run.url}"
    if frozen.adapter.row.merges:
        return f"begin another run from its result: `muster merge --run {run.url} --out DIR`, then model.path: DIR"
    return ""


def record_changes(run: Storage, frozen: Recipe, new: Recipe, driver: int) -> None:
    """Records in an event what differs from the attempt before: from ``frozen`` with the changes recorded so far."""
    known = changeable_values(frozen)
    for event in read_events(run):
        if isinstance(event, ChangeEvent):
            known |= {change.key: change.after for change in event.changes}
    found = [SettingChange(key=k, before=known[k], after=v) for k, v in changeable_values(new).items() if known[k] != v]
    if found:
        events = Events(run, read_claims(run).attempt, f"driver{driver}-recipe")
        events.emit(ChangeEvent(changes=tuple(found), driver=driver))
        events.close()
