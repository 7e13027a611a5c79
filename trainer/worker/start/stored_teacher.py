"""Looks, before a teacher is loaded, whether its outputs for all samples are stored (`distill.store`). It is then not
needed, and may be gone."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from trainer.artifacts.teacher import is_gone, teacher_identity
from trainer.data import PreparedDataset, open_prepared
from trainer.data.outputs import all_outputs, folder_of, open_outputs
from trainer.data.run_data import RunData, eval_spec, find_prepared, try_open_data
from trainer.distributed.world import World
from trainer.errors import InputError
from trainer.model import fetch_model
from trainer.model.base_config import load_config
from trainer.recipe import ModelSection, Recipe
from trainer.recipe.tasks import TASKS
from trainer.run import layout
from trainer.run.events import StartEvent
from trainer.run.frozen import has_commits
from trainer.run.jsonl import read_events
from trainer.storage import Storage, open_storage
from trainer.tasks.distill.stored import StoredTeacher, settings_of_outputs
from trainer.tasks.distill.teacher import check_same_teacher

log = logging.getLogger(__name__)

Identity = Mapping[str, Any]


class KnownTeacher(NamedTuple):
    """The teacher, and the settings of its stored outputs."""

    teacher: StoredTeacher
    settings: dict[str, Any]


def stored_teacher(recipe: Recipe, world: World, data: RunData, run: Storage) -> StoredTeacher | None:
    """Returns the recipe's teacher if its outputs for the data are complete, else None. Collective. A run with a
    checkpoint has learnt from one teacher; raises InputError if that has changed and its outputs are not stored."""
    if not _stores(recipe):
        return None
    parts = [part for part in (data.train, data.eval) if part is not None]
    found = world.decide_on_rank0(lambda: find_stored(recipe, parts, recipe.model, _begun_with(run)))
    return found and found.teacher


def find_stored(
    recipe: Recipe, parts: Sequence[PreparedDataset], student: ModelSection, begun: Identity | None = None
) -> KnownTeacher | None:
    """Returns the teacher if its outputs for ``parts`` of the data are complete, else None. ``begun``: identifies the
    teacher that a run has begun with; by default the teacher is the one that is at its location now, and if nothing is
    there, the one whose outputs are stored."""
    if not _stores(recipe):
        return None
    config = load_config(student, fetch_model(student, weights=False).folder, None)
    rows = int(config.get_text_config().vocab_size)  # of the output head
    found = _complete(recipe, parts, rows, begun) if begun else None
    if found is not None:
        return found
    try:
        now = teacher_identity(recipe)
    except InputError:
        if begun or not is_gone(str(recipe.distill.teacher)):
            raise
        return _remembered(recipe, parts, rows)
    if begun:
        check_same_teacher(str(recipe.distill.teacher), begun, now)
    return _complete(recipe, parts, rows, now)


def has_stored(recipe: Recipe, tokenizer: Any) -> bool:
    """Returns True if a start of the recipe's run needs no teacher, since its outputs are complete."""
    if not _stores(recipe):
        return False
    storage = open_storage(recipe.storage)
    run, shared = storage.child(recipe.name), storage.child(layout.PREPARED)
    begun = _begun_with(run)
    data = try_open_data(recipe, run, shared) if begun else _prepared_before(recipe, shared, tokenizer)
    parts = [part for part in (data.train, data.eval) if part is not None] if data else []
    return bool(parts) and find_stored(recipe, parts, recipe.model, begun) is not None


def _stores(recipe: Recipe) -> bool:
    return TASKS[recipe.task].has_teacher and recipe.stores_outputs


def _prepared_before(recipe: Recipe, shared: Storage, tokenizer: Any) -> RunData | None:
    train, evaluation = find_prepared(recipe, shared, tokenizer), None
    if train is not None and recipe.data.evaluates:
        evaluation = open_prepared(shared, eval_spec(recipe, tokenizer, train.spec.labels).fingerprint)
    if train is None or (recipe.data.evaluates and evaluation is None):
        return None
    return RunData(recipe, train, evaluation)


def _begun_with(run: Storage) -> Identity | None:
    """Returns the identity of the teacher that the run's checkpoints have learnt from; None without a checkpoint."""
    if not has_commits(run):
        return None
    models = [event.models for event in read_events(run) if isinstance(event, StartEvent)]
    return next((of["teacher"] for of in reversed(models) if isinstance(of.get("teacher"), dict)), None)


def _complete(recipe: Recipe, parts: Sequence[PreparedDataset], rows: int, identity: Identity) -> KnownTeacher | None:
    settings = {"task": recipe.task, **settings_of_outputs(recipe.distill, rows, identity)}
    if any(open_outputs(folder_of(part.storage, settings)) is None for part in parts):
        return None
    return KnownTeacher(StoredTeacher(identity), settings)


def _remembered(recipe: Recipe, parts: Sequence[PreparedDataset], rows: int) -> KnownTeacher | None:
    """Returns the teacher that was at the recipe's location when its outputs were stored; None if there is no such one.
    Raises InputError if there are several."""
    place, kind = recipe.distill.teacher, recipe.distill.quantization
    known = [outputs.settings.get("teacher") for outputs in all_outputs(parts[0].storage)]
    fits = [t for t in known if t and t["location"] == place and kind in (None, t["quantization"])]
    complete = [found for found in (_complete(recipe, parts, rows, identity) for identity in fits) if found]
    different = {folder_of(parts[0].storage, found.settings).url: found for found in complete}
    if len(different) > 1:
        raise InputError(
            f"distill.teacher {place} is not there any more, and outputs of {len(different)} teachers that were there "
            "are stored; put the teacher back that is to be learnt from"
        )
    found = next(iter(different.values()), None)
    if found is not None:
        log.warning("distill.teacher %s is not there any more; its outputs are stored, and the run learns them", place)
    return found
