"""Location of a saved artifact by its address: download of its files, and its description."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from trainer.artifacts.adapter_files import ADAPTER_CONFIG, read_adapter_config
from trainer.checkpoint import fetch_newest, list_commits
from trainer.checkpoint.artifact_info import ArtifactInfo
from trainer.checkpoint.blobs import entry_of_file
from trainer.checkpoint.publish import STATE_FILES, chosen_of, is_last, published_files
from trainer.data.run_data import read_data
from trainer.errors import InputError, UsageError
from trainer.model import fetch_model, load_tokenizer
from trainer.model.files.configs import read_config
from trainer.recipe import ModelSection, Recipe
from trainer.recipe.tasks import CAUSAL, PEFT_TYPES, TASKS
from trainer.recipe.trust import NOBODY, Trust
from trainer.run import layout
from trainer.run.frozen import read_recipe
from trainer.storage import Storage, open_storage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)
MODEL_CONFIG = "config.json"
DEFAULT_OUTPUTS = ("LABEL_0", "LABEL_1")
"""Outputs of a classifier whose configuration does not name them: transformers' default."""
DEFAULT = "default"
"""Name of an adapter without a given name."""
DTYPES = ("float32", "bfloat16", "float16")
_NAMED = re.compile(r"([A-Za-z0-9][A-Za-z0-9_-]*)=(.+)", re.DOTALL)


@dataclass(frozen=True)
class ArtifactRef:
    """The address of an artifact, exactly one of: a run's folder, folders of adapters (or of a fully tuned model) by
    name, or any model."""

    run: str | None = None
    adapters: tuple[tuple[str, str], ...] = ()
    model: str | None = None

    @classmethod
    def of(cls, run: str | None, adapters: Sequence[str] | None, model: str | None) -> ArtifactRef:
        """Parses the options of a command line; several adapters are named by ``NAME=URI``. Raises UsageError."""
        named = [None if Path(given).exists() else _NAMED.fullmatch(given) for given in adapters or ()]
        pairs = [(m[1], m[2]) if m else (DEFAULT, uri) for m, uri in zip(named, adapters or (), strict=True)]
        names = [name for name, _ in pairs]
        if len(set(names)) < len(names):
            raise UsageError(f"adapters need names of their own, as in --adapter a=URI --adapter b=URI; got {names}")
        address = cls(run, tuple(pairs), model)
        address.check()
        return address

    def check(self) -> None:
        if [self.run is None, not self.adapters, self.model is None].count(False) != 1:
            raise UsageError("give exactly one of --run RUN_URI, --adapter URI, --model PATH")


@dataclass(frozen=True)
class Artifact:
    """A located artifact: adapters of one method, or a full model.

    ``section``: the base model, or the full model if there are no adapters. ``adapters``: folders on this host, by
    name. ``labels``: the names of a classifier's outputs; None if its files do not name them. ``outputs``: the number
    of outputs of a full model. ``origin``: the record of its training in its files, if there is one. ``recipe``: the
    recipe of its run, if it is known. ``trusted``: True if code next to the adapters may run; for code of the base
    model, the ``section`` decides. ``chat_template``: that of the run, for a checkpoint, which has no tokenizer."""

    section: ModelSection
    task: str
    method: str
    adapters: dict[str, Path] = field(default_factory=dict)
    labels: tuple[str, ...] | None = None
    outputs: int | None = None
    origin: ArtifactInfo | None = None
    recipe: Recipe | None = None
    trusted: bool = False
    chat_template: str | None = None

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Names of a classifier's outputs; None for a language model. Raises InputError if they are unknown."""
        if TASKS[self.task].auto_class == CAUSAL:
            return None
        if not self.labels:
            raise InputError(
                f"the number of outputs of the head on {self.section.path} is unknown: its {MODEL_CONFIG} is missing"
            )
        return self.labels

    def check_labels(self, labels: Sequence[str]) -> None:
        """Raises InputError if the head has another number of outputs than ``labels``."""
        if self.outputs not in (None, len(labels)):  # transformers would initialise another head at random
            raise InputError(
                f"{self.section.path} has a head with {self.outputs} outputs, and {len(labels)} are needed here: "
                f"{', '.join(labels)}"[:500]
            )


def base_files(subject: Artifact, *, weights: bool = False) -> Path:
    """Returns the folder of the base model's files on this host."""
    return fetch_model(subject.section, weights=weights).folder


def tokenizer_of(subject: Artifact) -> PreTrainedTokenizerBase:
    """Returns the tokenizer that was saved with the adapter, or else that of the base model. A checkpoint of a fully
    tuned model has none: then it is the one of the base model that its run began with."""
    for adapter in [*subject.adapters.values()][:1]:
        if (adapter / "tokenizer_config.json").is_file():
            return load_tokenizer(adapter, trust_remote_code=subject.trusted)
    folder, trust = base_files(subject), subject.section.trust_remote_code
    if not (folder / "tokenizer_config.json").is_file():
        source = subject.origin.model if subject.origin else subject.section
        trust = subject.trusted or source.trust_remote_code  # the origin's is the user's own recipe's, or none
        folder = fetch_model(source, weights=False).folder
    tokenizer = load_tokenizer(folder, trust_remote_code=trust)
    tokenizer.chat_template = subject.chat_template or tokenizer.chat_template
    return tokenizer


def find(address: ArtifactRef, folder: Path, recipe: Recipe | None = None, *, trust: Trust = NOBODY) -> Artifact:
    """Downloads the files into ``folder``, and those of a model into the cache. With the user's ``recipe``, an adapter
    is put on the recipe's base model, and the artifact must fit the recipe's task. ``trust``: whose code may run.

    Raises InputError when there are no files, or when they do not fit each other."""
    address.check()
    return replace(_found(address, folder, recipe, trust), trusted=trust.everything)


def _found(address: ArtifactRef, folder: Path, recipe: Recipe | None, trust: Trust) -> Artifact:
    if address.run is not None:
        return _of_run(recipe, open_storage(address.run), folder, trust)
    if address.model is not None:
        plain = recipe.model if recipe else _section(address.model)
        section = trust.grant(plain.model_copy(update={"path": address.model, "revision": "main"}))
        files = fetch_model(section, weights=False).folder
        return _whole_model(recipe, section if recipe else _in_its_dtype(section, files), files, address.model)
    found = []
    for name, uri in address.adapters:
        storage = open_storage(uri)
        for item in storage.list():
            if "/" not in item.key and item.key not in STATE_FILES:
                storage.download(item.key, folder / name / item.key)
        found.append((name, uri, _saved(recipe, folder / name, uri, trust)))
    return replace(_together(found), chat_template=_template_of_checkpoint(address.adapters[0][1]))


def _template_of_checkpoint(uri: str) -> str | None:
    """Returns the chat template of the run that a checkpoint is in; None for any other folder."""
    run, inside, _ = uri.rstrip("/").rpartition(f"/{layout.CHECKPOINTS}/")
    try:
        return read_data(open_storage(run))["train"].chat_template if inside else None
    except FileNotFoundError:
        return None


def _together(found: list[tuple[str, str, Artifact]]) -> Artifact:
    (_, uri, first), *others = found
    if first.adapters:
        first = replace(first, adapters={name: one.adapters[DEFAULT] for name, _, one in found if one.adapters})
    for _, other_uri, other in others:
        if not (first.adapters and other.adapters):
            raise UsageError(f"{uri if not first.adapters else other_uri} is a whole model: name adapters, or it alone")
        if (other.section, other.task) != (first.section, first.task):
            raise InputError(
                f"{other_uri} is for {_base(other)}, and {uri} for {_base(first)}: adapters that are loaded together "
                "share a base"
            )
    return first


def _base(subject: Artifact) -> str:
    return f"{subject.section.path} ({subject.section.quantization}, {subject.section.dtype}, task {subject.task})"


def _of_run(recipe: Recipe | None, run: Storage, folder: Path, trust: Trust) -> Artifact:
    begun = read_recipe(run)
    if recipe and begun.task != recipe.task:
        raise InputError(
            f"{run.url} was trained for task {begun.task}, and the recipe has task {recipe.task}; use the run's recipe"
        )
    folder = folder / DEFAULT
    if not _take_published(run, folder / "adapter"):
        record = fetch_newest(run, folder / "checkpoint")
        if record is None:
            raise InputError(f"{run.url} has neither a final adapter nor a complete checkpoint yet: train it first")
        log.warning("%s has no complete final adapter; its checkpoint of step %d is used", run.url, record.step)
        base, folder = record.state.get("base"), folder / "checkpoint"
    else:
        base, folder = None, folder / "adapter"
    found = _saved(recipe or begun, folder, run.url, trust)
    if isinstance(base, dict) and found.origin:  # only the final adapter has a file with its base's identity
        found = replace(found, origin=found.origin._replace(base=base))
    try:
        data = read_data(run)["train"]
    except FileNotFoundError:
        raise InputError(f"{run.url} lacks {layout.DATA}, the record of its training data; restore it") from None
    return replace(found, labels=data.labels or found.labels, chat_template=data.chat_template)


def _take_published(run: Storage, folder: Path) -> bool:
    """Downloads the final adapter. Returns True if it exists and is that of the run's last step, or the best one."""
    keys = [o.key for o in run.list(layout.ADAPTER)]
    newest = next(iter(list_commits(run, newest=1)), None)
    if not keys or newest is None or not is_last(newest):
        return False
    for key in keys:
        run.download(key, folder / key.removeprefix(f"{layout.ADAPTER}/"))
    wanted = published_files(chosen_of(run, newest))
    return all((folder / n).is_file() and entry_of_file(folder / n) == info for n, info in wanted.items())


def _saved(recipe: Recipe | None, folder: Path, where: str, trust: Trust) -> Artifact:
    """Returns the artifact in a folder that training has saved: an adapter or a full model."""
    if (folder / ADAPTER_CONFIG).is_file():
        config = read_adapter_config(folder, where)
        known = _origin(folder, where)
        if recipe:
            _check_adapter(recipe, config, where)
            origin = ArtifactInfo.of(recipe)._replace(base=known.base if known else None)
        else:
            origin = known or _origin_by_peft(config, where)
        model_config = read_config(folder / MODEL_CONFIG, where) if (folder / MODEL_CONFIG).is_file() else {}
        labels = _labels(model_config) if recipe else _outputs(model_config)
        section = trust.grant(origin.model)
        return Artifact(section, origin.task, origin.method, {DEFAULT: folder}, labels, None, origin, recipe)
    if not (folder / MODEL_CONFIG).is_file():
        raise InputError(f"{where} holds neither {ADAPTER_CONFIG} nor {MODEL_CONFIG}: name the folder of an adapter")
    plain = recipe.model if recipe else _section(str(folder))
    moved = {"path": str(folder), "revision": "main", "quantization": "none"}
    section = trust.grant(plain.model_copy(update=moved))
    return _whole_model(recipe, section if recipe else _in_its_dtype(section, folder), folder, where)


def _check_adapter(recipe: Recipe, config: dict[str, Any], where: str) -> None:
    wanted, got = PEFT_TYPES[TASKS[recipe.task].auto_class], config.get("task_type")
    if got not in (None, wanted):
        raise InputError(f"{where} is an adapter for {got}, and task {recipe.task} needs one for {wanted}")
    base = config.get("base_model_name_or_path")
    if base and base != recipe.model.path:
        log.warning("%s was trained on %s; it is put on the recipe's %s", where, base, recipe.model.path)


def _origin(folder: Path, where: str) -> ArtifactInfo | None:
    """Reads the origin from `muster.json` next to a final adapter; for a checkpoint, from its run's frozen recipe."""
    run, inside, _ = where.rstrip("/").rpartition(f"/{layout.CHECKPOINTS}/")
    if inside and (storage := open_storage(run)).info(layout.RECIPE):
        return ArtifactInfo.of(read_recipe(storage))
    return ArtifactInfo.read(folder)


def _origin_by_peft(config: dict[str, Any], where: str) -> ArtifactInfo:
    """Returns the origin of an adapter with peft's files only. Its base model has the dtype of the base's files."""
    base = config.get("base_model_name_or_path")
    if not base:
        raise InputError(f"{ADAPTER_CONFIG} of {where} names no base; write it there as base_model_name_or_path")
    tasks = {PEFT_TYPES[row.auto_class]: name for name, row in reversed(list(TASKS.items()))}
    kind = config.get("task_type") or PEFT_TYPES[TASKS["sft"].auto_class]
    task = tasks.get(kind) if isinstance(kind, str) else None
    if task is None:
        raise InputError(f"{where} is an adapter for {config['task_type']}, which is none of {', '.join(tasks)}")
    section = _section(base, revision=config.get("revision") or "main")
    section = _in_its_dtype(section, fetch_model(section, weights=False).folder)
    method = str(config.get("peft_type", "?")).lower()
    method = "dora" if config.get("use_dora") else "rslora" if config.get("use_rslora") else method
    return ArtifactInfo(task, method, section)


def _section(path: str, **settings: str) -> ModelSection:
    try:
        return ModelSection(path=path, **settings)  # type: ignore[arg-type]
    except ValidationError as error:  # the message does not repeat the path, which may contain a password
        raise InputError(f"this cannot be a model: {error.errors()[0]['msg']}") from None


def _in_its_dtype(section: ModelSection, folder: Path) -> ModelSection:
    config = read_config(folder / MODEL_CONFIG, section.path)
    dtype = str(config.get("dtype") or config.get("torch_dtype") or DTYPES[0])
    return section.model_copy(update={"dtype": dtype if dtype in DTYPES else DTYPES[0]})


def _whole_model(recipe: Recipe | None, section: ModelSection, folder: Path, where: str) -> Artifact:
    config = read_config(folder / MODEL_CONFIG, where)
    named = [str(name) for name in config.get("architectures") or []]
    head = any(name.endswith("ForSequenceClassification") for name in named)
    task = recipe.task if recipe else "classification" if head else "sft"
    if TASKS[task].has_reference and not (recipe and recipe.stores_outputs):
        raise InputError(f"{where} is a whole model: task {task} compares an adapter with the base under it, name one")
    kind = TASKS[task].auto_class.removeprefix("AutoModel")
    if not kind.startswith("ForCausal") and not any(name.endswith(kind) for name in named):
        raise InputError(f"{where} is {', '.join(named) or 'of no kind'}, without the head that task {task} needs")
    labels = _labels(config) if recipe else _outputs(config)
    outputs = len(config.get("id2label") or DEFAULT_OUTPUTS)
    origin = ArtifactInfo.of(recipe) if recipe else _origin(folder, where)
    return Artifact(section, task, "none", {}, labels, outputs, origin, recipe)


def _labels(config: dict[str, Any]) -> tuple[str, ...] | None:
    """Returns the names of the outputs; None for transformers' default names."""
    ordered = _outputs(config)
    return None if ordered is None or all(n == f"LABEL_{i}" for i, n in enumerate(ordered)) else ordered


def _outputs(config: dict[str, Any]) -> tuple[str, ...] | None:
    named = config.get("id2label") or {}
    if wrong := [number for number in named if not re.fullmatch(r"\d{1,9}", number, re.ASCII)]:
        raise InputError(f"{MODEL_CONFIG} names the label of {wrong[0]!r}, which is no number of an output")
    names = {int(number): str(name) for number, name in named.items()}
    return tuple(names[n] for n in sorted(names)) or None
