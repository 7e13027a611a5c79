"""What is evaluated: a run, an adapter or a model by its address, its files brought to this host."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trainer import layout
from trainer.begin import read_recipe
from trainer.checkpoint import fetch_whole, list_commits
from trainer.checkpoint.blobs import entry_of_file
from trainer.data import Preparation
from trainer.errors import InputError, UsageError
from trainer.model import fetch_model
from trainer.publish import STATE_FILES, is_last, published_files
from trainer.recipe import ModelSection, Recipe
from trainer.recipe.tasks import AUTO_CLASSES, PEFT_TYPES
from trainer.storage import Storage, open_storage

log = logging.getLogger(__name__)
ADAPTER_CONFIG, MODEL_CONFIG = "adapter_config.json", "config.json"
DEFAULT_OUTPUTS = ("LABEL_0", "LABEL_1")
"""Of a classifier whose configuration says nothing, by transformers."""


@dataclass(frozen=True)
class Address:
    """One of the three: a run's folder, the folder of an adapter (or of a fully tuned model), or any model."""

    run: str | None = None
    adapter: str | None = None
    model: str | None = None

    def check(self) -> None:
        if [self.run, self.adapter, self.model].count(None) != 2:
            raise UsageError("say what to evaluate by one of --run RUN_URI, --adapter URI, --model PATH")


@dataclass(frozen=True)
class Subject:
    """``section``: the base, or the whole model where there is no ``adapter``, the folder of which is on this host.
    ``labels``: the names of a classifier's outputs; None where its files do not name them. ``outputs``: how many of
    them a whole model has."""

    section: ModelSection
    adapter: Path | None
    labels: tuple[str, ...] | None
    outputs: int | None = None

    def check_labels(self, labels: Sequence[str]) -> None:
        """A head of another size would be drawn at random. Raises InputError."""
        if self.outputs not in (None, len(labels)):
            raise InputError(
                f"{self.section.path} has a head with {self.outputs} outputs, and {len(labels)} are needed here: "
                f"{', '.join(labels)}"[:500]
            )


def find(recipe: Recipe, address: Address, folder: Path) -> Subject:
    """Brings the files into ``folder``, those of a model into its cache. Raises InputError when there are none, or when
    they are no model for the recipe's task."""
    address.check()
    if address.run is not None:
        return _of_run(recipe, open_storage(address.run), folder)
    if address.adapter is not None:
        _download(open_storage(address.adapter), folder)
        return _saved(recipe, folder, address.adapter)
    assert address.model is not None
    section = recipe.model.model_copy(update={"path": address.model, "revision": "main"})
    return _whole_model(recipe, section, fetch_model(section, weights=False).folder, address.model)


def _of_run(recipe: Recipe, run: Storage, folder: Path) -> Subject:
    begun = read_recipe(run)
    if begun.task != recipe.task:
        raise InputError(
            f"{run.url} was trained for task {begun.task}, and the recipe says {recipe.task}; name its own"
        )
    if not _take_published(run, folder / "adapter"):
        record = fetch_whole(run, folder / "checkpoint")
        if record is None:
            raise InputError(f"{run.url} has neither a final adapter nor a whole checkpoint yet: train it first")
        log.warning("%s has no whole final adapter; its checkpoint of step %d is evaluated", run.url, record.step)
        folder = folder / "checkpoint"
    else:
        folder = folder / "adapter"
    found = _saved(recipe, folder, run.url)
    train = Preparation.from_json(run.read_json(layout.DATA)["train"])
    return replace(found, labels=train.labels)


def _take_published(run: Storage, folder: Path) -> bool:
    """Whether the final adapter is there, and is that of the last commit."""
    keys = [o.key for o in run.list(layout.ADAPTER)]
    newest = next(iter(list_commits(run, newest=1)), None)
    if not keys or newest is None or not is_last(newest):
        return False
    for key in keys:
        run.download(key, folder / key.removeprefix(f"{layout.ADAPTER}/"))
    wanted = published_files(newest)
    return all((folder / n).is_file() and entry_of_file(folder / n) == info for n, info in wanted.items())


def _download(storage: Storage, folder: Path) -> None:
    for item in storage.list():
        if "/" not in item.key and item.key not in STATE_FILES:
            storage.download(item.key, folder / item.key)


def _saved(recipe: Recipe, folder: Path, where: str) -> Subject:
    """What training saves: an adapter, or a whole model."""
    if (folder / ADAPTER_CONFIG).is_file():
        _check_adapter(recipe, _json(folder / ADAPTER_CONFIG, where), where)
        config = _json(folder / MODEL_CONFIG, where) if (folder / MODEL_CONFIG).is_file() else {}
        return Subject(recipe.model, folder, _labels(config))
    if not (folder / MODEL_CONFIG).is_file():
        raise InputError(f"{where} holds neither {ADAPTER_CONFIG} nor {MODEL_CONFIG}: name the folder of an adapter")
    section = recipe.model.model_copy(update={"path": str(folder), "revision": "main", "quantization": "none"})
    return _whole_model(recipe, section, folder, where)


def _check_adapter(recipe: Recipe, config: dict[str, Any], where: str) -> None:
    wanted, got = PEFT_TYPES[AUTO_CLASSES[recipe.task]], config.get("task_type")
    if got not in (None, wanted):
        raise InputError(f"{where} is an adapter for {got}, and task {recipe.task} needs one for {wanted}")
    base = config.get("base_model_name_or_path")
    if base and base != recipe.model.path:
        log.warning("%s was trained on %s; it is evaluated on the recipe's %s", where, base, recipe.model.path)


def _whole_model(recipe: Recipe, section: ModelSection, folder: Path, where: str) -> Subject:
    if recipe.task == "dpo":
        raise InputError(f"{where} is a whole model: task dpo compares an adapter with the base under it, name one")
    config, auto = _json(folder / MODEL_CONFIG, where), AUTO_CLASSES[recipe.task]
    kind = auto.removeprefix("AutoModel")
    named = config.get("architectures") or []
    if not kind.startswith("ForCausal") and not any(str(name).endswith(kind) for name in named):
        raise InputError(
            f"{where} is {', '.join(named) or 'of no kind'}, without the head that task {recipe.task} needs"
        )
    return Subject(section, None, _labels(config), len(config.get("id2label") or DEFAULT_OUTPUTS))


def _labels(config: dict[str, Any]) -> tuple[str, ...] | None:
    """None for the names that stand for none."""
    names = {int(number): str(name) for number, name in (config.get("id2label") or {}).items()}
    ordered = tuple(names[n] for n in sorted(names))
    return None if all(name == f"LABEL_{n}" for n, name in enumerate(ordered)) else ordered


def _json(path: Path, where: str) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"{path.name} of {where} is not JSON: {error}") from error
    return found
