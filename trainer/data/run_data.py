"""A run's data: which prepared data the run trains on and evaluates on, and how they are prepared, opened and counted.

Until the first checkpoint is committed, corrected data may replace the data that the run started with, since no
training is lost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Required, TypedDict

from trainer.chat_templates.rendering import writes_date
from trainer.chat_templates.template import template_of
from trainer.data import (
    PreparationSpec,
    PreparedDataset,
    check_first_rows,
    count_steps,
    describe,
    freeze,
    open_begun,
    open_prepared,
    prepare_dataset,
    resolve_chat_template,
)
from trainer.data.spec import FORMAT_VERSION, FrozenSource
from trainer.errors import CorruptObject, InputError
from trainer.parsing import Malformed
from trainer.recipe import Recipe
from trainer.records import read_record
from trainer.run import layout
from trainer.run.frozen import has_commits
from trainer.run.shared import announce_use
from trainer.storage import Storage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


Early = Callable[[PreparationSpec, Any, Storage], PreparedDataset]
"""Starts to prepare data and returns before it is complete: see `trainer.data.PartialDataset`."""


class _Data(TypedDict, total=False):
    train: Required[Any]
    eval: Any


@dataclass(frozen=True)
class RunData:
    """The prepared data of a run, and its number of steps."""

    recipe: Recipe
    train: PreparedDataset
    eval: PreparedDataset | None

    @cached_property
    def total_steps(self) -> int:
        """Optimizer steps. If the recipe gives epochs, every window is read: seconds per million samples."""
        return total_steps(self.recipe, self.train)


def check_rows(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Encodes the first rows of each source; raises InputError for what would fail the preparation. Returns what is
    odd about them."""
    odd: list[str] = []
    labels: Sequence[str] | None = None
    for part in recipe.data.parts:
        spec = _spec(recipe, part, tokenizer, None, labels)
        odd += check_first_rows(spec, tokenizer)
        labels = spec.labels
    return list(dict.fromkeys(odd))


def prepare_data(
    recipe: Recipe,
    run: Storage,
    shared: Storage,
    tokenizer: Callable[[], PreTrainedTokenizerBase],
    *,
    map_windows: Callable[..., Any] = map,
    on_progress: Callable[..., None] | None = None,
    early: Early | None = None,
    record: bool = True,
) -> RunData:
    """Opens or prepares the run's training and evaluation data under ``shared``. ``tokenizer`` is called only if
    something must be prepared. ``on_progress(part, done)`` is called after each window. ``early`` prepares the training
    data if the recipe gives a number of steps. ``record``: writes into the run which data they are; otherwise nothing
    is written there."""
    frozen = _frozen_data(run)
    parts: dict[str, PreparedDataset | None] = {"train": None, "eval": None}
    loaded: list[PreTrainedTokenizerBase] = []
    for part in recipe.data.parts:
        spec = frozen.get(part) if frozen else None
        prepared = open_prepared(shared, _announced(shared, spec)) if spec else None
        if prepared is None:
            loaded = loaded or [tokenizer()]
            on_part = partial(on_progress, part) if on_progress else None
            known = parts["train"].spec.labels if parts["train"] else None
            spec = _spec(recipe, part, loaded[0], spec, known)
            _announced(shared, spec)
            if early is not None and part == "train" and prepares_early(recipe):
                prepared = early(spec, loaded[0], shared)
            else:
                prepared = prepare_dataset(spec, loaded[0], shared, map_windows=map_windows, on_progress=on_part)
        parts[part] = prepared
    train = parts["train"]
    assert train is not None, "a recipe has training data"
    if record and frozen is None:
        run.write_json(layout.DATA, {part: p.spec.to_json() for part, p in parts.items() if p is not None})
    return RunData(recipe, train, parts["eval"])


def _announced(shared: Storage, spec: PreparationSpec) -> str:
    """Returns the fingerprint of data whose use `muster gc` knows of from now on. Raises InputError while it deletes
    them."""
    if not announce_use(shared.child(spec.fingerprint)):
        raise InputError(
            f"`muster gc` is deleting {shared.uri(spec.fingerprint)}: start again when it has ended; if it was "
            "interrupted, run it again after ten minutes"
        )
    return spec.fingerprint


def prepares_early(recipe: Recipe) -> bool:
    """Returns True if the first steps may run while the training data are still being prepared."""
    return recipe.training.steps is not None and not recipe.stores_outputs


def open_data(recipe: Recipe, run: Storage, shared: Storage) -> RunData:
    """Opens, on a worker, the data that the driver has prepared or is preparing. Raises InputError if it is missing."""
    data = try_open_data(recipe, run, shared, open_begun if prepares_early(recipe) else open_prepared)
    if data is None:
        raise InputError(f"the prepared data of {run.url} is not complete in {shared.url}; start the run again")
    return data


def try_open_data(
    recipe: Recipe,
    run: Storage,
    shared: Storage,
    open_train: Callable[[Storage, str], PreparedDataset | None] = open_prepared,
) -> RunData | None:
    """Opens the run's data; returns None if a part is not complete."""
    try:
        frozen = read_data(run)
    except FileNotFoundError:
        return None
    opens = {"train": open_train, "eval": open_prepared}
    parts = {part: opens[part](shared, spec.fingerprint) for part, spec in frozen.items()}
    if any(prepared is None for prepared in parts.values()):
        return None
    train = parts["train"]
    assert train is not None
    return RunData(recipe, train, parts.get("eval"))


def find_prepared(recipe: Recipe, shared: Storage, tokenizer: PreTrainedTokenizerBase) -> PreparedDataset | None:
    """Opens training data of this recipe that were prepared before; None if they are missing or not complete."""
    return open_prepared(shared, train_spec(recipe, tokenizer).fingerprint)


def train_spec(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> PreparationSpec:
    """Returns the specification of the recipe's training data as they are now."""
    return _spec(recipe, "train", tokenizer, None, None)


def eval_spec(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, labels: Sequence[str]) -> PreparationSpec:
    """Returns the specification of the recipe's evaluation data with the training data's ``labels``."""
    return _spec(recipe, "eval", tokenizer, None, labels)


def total_steps(recipe: Recipe, train: PreparedDataset) -> int:
    training = recipe.training
    if training.steps is not None:
        return training.steps
    assert training.epochs is not None, "the recipe gives steps or epochs"
    return count_steps(
        train,
        seed=recipe.seed,
        epochs=training.epochs,
        global_batch=training.global_batch,
        sequence_length=recipe.data.sequence_length,
        packing=recipe.data.packing,
        weights=recipe.data.weights,
    )


def _frozen_data(run: Storage) -> dict[str, PreparationSpec] | None:
    """Reads the frozen specifications. Returns None without a committed checkpoint: the data may still change."""
    if not has_commits(run):
        return None
    try:
        return read_data(run)
    except FileNotFoundError:
        raise CorruptObject(
            f"{run.url} has checkpoints but no {layout.DATA}, which records the data they were trained on; restore it, "
            "or start a run under another name"
        ) from None


def read_data(run: Storage) -> dict[str, PreparationSpec]:
    """Reads the specifications of the run's training data (``train``) and, if there are any, evaluation data
    (``eval``). Raises CorruptObject for a malformed record."""
    body = run.read_json(layout.DATA)
    try:
        parts = read_record(_Data, body)
        return {part: PreparationSpec.from_json(parts[part]) for part in ("train", "eval") if part in parts}
    except Malformed as error:
        raise CorruptObject(
            f"{run.uri(layout.DATA)} is not a valid record of the run's data ({error}); restore it, or start a run "
            "under another name"
        ) from error


def _spec(
    recipe: Recipe,
    part: str,
    tokenizer: PreTrainedTokenizerBase,
    frozen: PreparationSpec | None,
    labels: Sequence[str] | None,
) -> PreparationSpec:
    """Returns the specification of the part ``train`` or ``eval`` of the data. With ``frozen``, it has exactly the
    objects frozen there.

    ``labels``: the training data's label set, which evaluation data must use; None for the training data itself.
    Raises InputError when the tokenizer or the chat template differs from that of ``frozen``.
    """
    if frozen is None:
        settings = _settings(recipe)
        if writes_date(settings["chat_template"] or template_of(tokenizer)):
            settings["date"] = datetime.now().date().isoformat()
        spec = describe(frozen_part(recipe, part), tokenizer, labels=labels, **settings)
        _check_class_weights(recipe, spec.labels)
        return spec
    if frozen.version != FORMAT_VERSION:
        raise InputError(
            "this run's data were prepared by an older version of muster, and they are missing; put them back, "
            "continue it with that version, or start a run under another name"
        )
    spec = describe(frozen.sources, tokenizer, labels=frozen.labels, date=frozen.date, **_settings(recipe))
    if spec.fingerprint != frozen.fingerprint:
        raise InputError(
            "the tokenizer or the chat template is not the one that this run was started with, and its prepared data "
            "are missing; put the old one back, or start a run under another name"
        )
    return spec


def _check_class_weights(recipe: Recipe, labels: Sequence[str]) -> None:
    unknown = [label for label in recipe.classification.class_weights if label not in labels]
    if unknown:
        raise InputError(
            f"classification.class_weights names the label {unknown[0]!r}, and those of the training data are "
            f"{', '.join(labels)}"[:500]
        )


def _settings(recipe: Recipe) -> dict[str, Any]:
    data = recipe.data
    return {
        "sequence_length": data.sequence_length,
        "packing": data.packing,
        "task": recipe.task,
        "chat_template": resolve_chat_template(data.chat_template),
        "max_bad_rows": data.max_bad_rows,
        "special_tokens": data.special_tokens,
    }


def frozen_part(recipe: Recipe, part: str) -> tuple[FrozenSource, ...]:
    """Returns the frozen sources of the part ``train`` or ``eval``: held-out rows have the same objects in both."""
    data = recipe.data
    sources = freeze(data.eval if part == "eval" and data.eval else data.train)
    if not data.eval_fraction:
        return sources
    return tuple(replace(source, eval_fraction=data.eval_fraction, part=part) for source in sources)
