"""What has to be so before any worker starts: the recipe frozen, the inputs there, the data prepared.

Nothing is frozen before the inputs have been found good, and until the first checkpoint is committed a mended recipe
or mended data may take the place of what was frozen: nothing would be lost by it.
"""

from __future__ import annotations

import importlib.metadata
import logging
import platform
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Required, TypedDict

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
from trainer.errors import CorruptObject, InputError, Mistake, RecipeChanged, RecipeError
from trainer.parsing import Malformed
from trainer.recipe import DataSection, Recipe, SourceSection, differences, dump, loads
from trainer.recipe.trust import granted, without_code
from trainer.records import read_record
from trainer.run import layout
from trainer.storage import Storage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)
PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "bitsandbytes",
    "deepspeed",
    "datasets",
    "ray",
    "fsspec",
    "s3fs",
)


Early = Callable[[PreparationSpec, Any, Storage], PreparedDataset]
"""Prepares data, and gives it back while that goes on: see `trainer.data.PartialDataset`."""


class _Data(TypedDict, total=False):
    train: Required[Any]
    eval: Any


@dataclass(frozen=True)
class RunData:
    """The prepared data of a run, and the number of steps that it comes to."""

    recipe: Recipe
    train: PreparedDataset
    eval: PreparedDataset | None

    @cached_property
    def total_steps(self) -> int:
        """Looks at every window where the recipe gives epochs: seconds per million samples."""
        return total_steps(self.recipe, self.train)


def read_recipe(run: Storage, overrides: Sequence[str] = ()) -> Recipe:
    """The run's frozen recipe without the code that it names (`trainer.recipe.trust`), with what may change between
    attempts changed.

    Raises InputError when there is no run at this address, RecipeChanged when an override changes the result."""
    return without_code(_read_frozen(run, overrides))


def resumed_recipe(run: Storage, overrides: Sequence[str] = (), *, trust: bool = False) -> Recipe:
    """Reads the frozen recipe for training. Raises UsageError when it names code that the user does not ``trust``."""
    return granted(_read_frozen(run, overrides), run.uri(layout.RECIPE), trust=trust)


def _read_frozen(run: Storage, overrides: Sequence[str] = ()) -> Recipe:
    """Reads the recipe as it was written: to be compared, never to be acted on."""
    try:
        text = run.read(layout.RECIPE)
    except FileNotFoundError:
        raise InputError(f"there is no run at {run.url}: no {layout.RECIPE} lies there") from None
    try:
        frozen = loads(text, run.uri(layout.RECIPE), stored=True)
    except RecipeError as error:
        raise RecipeError((*error.mistakes, *_of_another_version(run))) from error
    recipe = loads(text, run.uri(layout.RECIPE), overrides, stored=True)
    if changes := differences(frozen, recipe):
        raise RecipeChanged(f"between attempts of {run.url} this cannot change:\n  " + "\n  ".join(changes))
    return recipe


def _of_another_version(run: Storage) -> list[Mistake]:
    """Why a recipe that was valid when it was frozen may not be one here."""
    theirs, ours = read_provenance(run).get("muster"), code_version()
    if theirs is None or theirs.partition("+")[0] == ours.partition("+")[0]:
        return []
    said = f"the run was begun with muster {theirs}, and this is {ours}; go on with that version or a newer one"
    return [Mistake(run.uri(layout.RECIPE), "", said)]


def has_commits(run: Storage) -> bool:
    return bool(run.list(layout.COMMITS))


def check_same_recipe(run: Storage, recipe: Recipe) -> None:
    """Raises RecipeChanged when the run was begun with a recipe that gives another result."""
    if not has_commits(run):
        return
    changes = differences(_read_frozen(run), recipe)
    if changes:
        raise RecipeChanged(
            f"{run.url} was begun with another recipe:\n  " + "\n  ".join(changes) + "\n"
            "Run it with the recipe that it was begun with, or give the new one another name."
        )


def freeze_recipe(run: Storage, recipe: Recipe) -> None:
    """Writes the resolved recipe and the provenance, unless the run has them; see the module's note on mending."""
    check_same_recipe(run, recipe)
    lasting = recipe.model_copy(update={"training": recipe.training.model_copy(update={"stop_after": None})})
    if not has_commits(run):
        run.write(layout.RECIPE, dump(lasting).encode())
        run.write_json(layout.PROVENANCE, provenance())


def provenance() -> dict[str, Any]:
    """Versions, host and code version. No environment variable is in it: some hold credentials."""
    return {
        "muster": code_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "command": Path(sys.argv[0]).name,
    }


class Provenance(TypedDict, total=False):
    """The program's environment when the recipe was frozen."""

    muster: str | None
    packages: dict[str, str | None]
    python: str | None
    platform: str | None
    host: str | None
    command: str | None


def read_provenance(run: Storage) -> Provenance:
    """Empty where it is gone or cannot be understood: nothing of a run depends on it."""
    try:
        return read_record(Provenance, run.read_json(layout.PROVENANCE))
    except (FileNotFoundError, CorruptObject, Malformed) as error:
        log.warning("what %s was begun with is not known: %s", run.url, error)
        return {}


def versions() -> dict[str, str]:
    """Of what an attempt runs with: packages that are not there are left out."""
    found = {name: version for name in PACKAGES if (version := _version(name)) is not None}
    return {"muster": code_version(), "python": platform.python_version(), **found}


def code_version() -> str:
    """The installed version, and the commit where the code lies in a git checkout."""
    root = Path(__file__).resolve().parents[2]
    version = _version("muster") or "unknown"
    if not (root / ".git").exists():
        return version
    try:
        found = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty"], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return version
    return f"{version}+{found.stdout.strip()}" if found.returncode == 0 else version


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_rows(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> None:
    """Looks at the first rows of every source. Raises InputError for what a whole preparation would fail at soonest."""
    labels: Sequence[str] | None = None
    for sources in filter(None, (recipe.data.train, recipe.data.eval)):
        spec = _spec(recipe, sources, tokenizer, None, labels)
        check_first_rows(spec, tokenizer)
        labels = spec.labels


def prepare_data(
    recipe: Recipe,
    run: Storage,
    shared: Storage,
    tokenizer: Callable[[], PreTrainedTokenizerBase],
    *,
    map_windows: Callable[..., Any] = map,
    on_progress: Callable[..., None] | None = None,
    early: Early | None = None,
) -> RunData:
    """Opens the run's prepared data, or makes it, and notes in the run which they are; ``tokenizer`` is called only if
    there is something to make. ``early`` prepares training data if the recipe says how many steps there are."""
    bound = _frozen_data(run) is not None
    train, evaluation = prepare_parts(
        recipe, run, shared, tokenizer, map_windows=map_windows, on_progress=on_progress, early=early
    )
    if not bound:
        parts = {"train": train, "eval": evaluation}
        run.write_json(layout.DATA, {part: p.spec.to_json() for part, p in parts.items() if p is not None})
    return RunData(recipe, train, evaluation)


def prepare_parts(
    recipe: Recipe,
    run: Storage,
    shared: Storage,
    tokenizer: Callable[[], PreTrainedTokenizerBase],
    *,
    map_windows: Callable[..., Any] = map,
    on_progress: Callable[..., None] | None = None,
    early: Early | None = None,
) -> tuple[PreparedDataset, PreparedDataset | None]:
    """Training and evaluation data, prepared under ``shared``; of the run nothing is written."""
    frozen = _frozen_data(run)
    parts: dict[str, PreparedDataset | None] = {"train": None, "eval": None}
    loaded: list[PreTrainedTokenizerBase] = []
    for part, sources in (("train", recipe.data.train), ("eval", recipe.data.eval)):
        if not sources:
            continue
        spec = frozen.get(part) if frozen else None
        prepared = open_prepared(shared, spec.fingerprint) if spec else None
        if prepared is None:
            loaded = loaded or [tokenizer()]
            known = parts["train"].spec.labels if parts["train"] else None
            spec = _spec(recipe, sources, loaded[0], spec, known)
            if early is not None and part == "train" and recipe.training.steps is not None:
                prepared = early(spec, loaded[0], shared)
            else:
                prepared = prepare_dataset(spec, loaded[0], shared, map_windows=map_windows, on_progress=on_progress)
        parts[part] = prepared
    train = parts["train"]
    assert train is not None, "a recipe has training data"
    return train, parts["eval"]


def open_data(recipe: Recipe, run: Storage, shared: Storage) -> RunData:
    """On a worker: the data that the driver has prepared, or is preparing. Raises InputError when it is not there."""
    data = try_open_data(recipe, run, shared, open_begun if recipe.training.steps is not None else open_prepared)
    if data is None:
        raise InputError(f"the prepared data of {run.url} is not complete in {shared.url}; start the run again")
    return data


def try_open_data(
    recipe: Recipe,
    run: Storage,
    shared: Storage,
    open_train: Callable[[Storage, str], PreparedDataset | None] = open_prepared,
) -> RunData | None:
    """The same, or None when it is not complete."""
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
    """The recipe's training data as somebody has prepared it before; None when nobody has, or not to the end."""
    return open_prepared(shared, _spec(recipe, recipe.data.train, tokenizer, None, None).fingerprint)


def eval_spec(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, labels: Sequence[str]) -> PreparationSpec:
    """What the evaluation data of the recipe are prepared into, held to these ``labels``."""
    return _spec(recipe, recipe.data.eval, tokenizer, None, labels)


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
        weights=weights(recipe.data),
    )


def weights(data: DataSection) -> tuple[float, ...]:
    return tuple(s.weight for s in data.train)


def _frozen_data(run: Storage) -> dict[str, PreparationSpec] | None:
    """What was frozen, if it binds: without a committed checkpoint, mended data may take its place."""
    if not has_commits(run):
        return None
    try:
        return read_data(run)
    except FileNotFoundError:
        raise CorruptObject(
            f"{run.url} has checkpoints but no {layout.DATA}, which says what data they were trained on; put it back, "
            "or start a run under another name"
        ) from None


def read_data(run: Storage) -> dict[str, PreparationSpec]:
    """Reads from what the run's training data (``train``), and its evaluation data if it has any (``eval``), were
    prepared. CorruptObject when the record is not one."""
    body = run.read_json(layout.DATA)
    try:
        parts = read_record(_Data, body)
        return {part: PreparationSpec.from_json(parts[part]) for part in ("train", "eval") if part in parts}
    except Malformed as error:
        raise CorruptObject(
            f"{run.uri(layout.DATA)} does not say what data the run was trained on ({error}); put it back, or start a "
            "run under another name"
        ) from error


def _spec(
    recipe: Recipe,
    sources: Sequence[SourceSection],
    tokenizer: PreTrainedTokenizerBase,
    frozen: PreparationSpec | None,
    labels: Sequence[str] | None,
) -> PreparationSpec:
    """``labels``: the label set of the training data, to which evaluation data are held; None for the former."""
    if frozen is None:
        spec = describe(freeze(sources), tokenizer, labels=labels, **_settings(recipe))
        _check_class_weights(recipe, spec.labels)
        return spec
    spec = describe(frozen.sources, tokenizer, labels=frozen.labels, **_settings(recipe))
    if spec.fingerprint != frozen.fingerprint:
        raise InputError(
            "the tokenizer or the chat template is not the one that this run was begun with, and its prepared data is "
            "gone; put the old one back, or start a run under another name"
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
    }
