"""What training has saved, by its address: its files brought to this host, and what is known of it."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from trainer.artifacts.adapter_files import ADAPTER_CONFIG, read_adapter_config
from trainer.checkpoint import fetch_whole, list_commits
from trainer.checkpoint.artifact_info import ArtifactInfo
from trainer.checkpoint.blobs import entry_of_file
from trainer.checkpoint.publish import STATE_FILES, is_last, published_files
from trainer.data.run_data import read_data
from trainer.errors import InputError, UsageError
from trainer.model import fetch_model, load_tokenizer
from trainer.model.files.configs import read_config
from trainer.recipe import ModelSection, Recipe
from trainer.recipe.sections.tasks import AUTO_CLASSES, CAUSAL, PEFT_TYPES, REFERRING
from trainer.recipe.trust import NOBODY, Trust
from trainer.run import layout
from trainer.run.frozen import read_recipe
from trainer.storage import Storage, open_storage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)
MODEL_CONFIG = "config.json"
DEFAULT_OUTPUTS = ("LABEL_0", "LABEL_1")
"""Of a classifier whose configuration says nothing, by transformers."""
DEFAULT = "default"
"""The name of an adapter that was given none."""
DTYPES = ("float32", "bfloat16", "float16")
_NAMED = re.compile(r"([A-Za-z0-9][A-Za-z0-9_-]*)=(.+)", re.DOTALL)


@dataclass(frozen=True)
class ArtifactRef:
    """One of the three: a run's folder, folders of adapters (or of a fully tuned model) by name, or any model."""

    run: str | None = None
    adapters: tuple[tuple[str, str], ...] = ()
    model: str | None = None

    @classmethod
    def of(cls, run: str | None, adapters: Sequence[str] | None, model: str | None) -> ArtifactRef:
        """As a command line has them: several adapters are told apart by ``NAME=URI``."""
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
            raise UsageError("say which by one of --run RUN_URI, --adapter URI, --model PATH")


@dataclass(frozen=True)
class Artifact:
    """``section``: the base, or the whole model where there are no ``adapters``: name to folder on this host, of one
    method. ``labels``: the names of a classifier's outputs; None where its files do not name them. ``outputs``: how
    many of them a whole model has. ``origin``: what its files say of how it was trained; ``recipe``: that of its run.
    Both where they are known. ``trusted``: whether code that lies beside the adapters may run; that of the base is the
    ``section``'s."""

    section: ModelSection
    task: str
    method: str
    adapters: dict[str, Path] = field(default_factory=dict)
    labels: tuple[str, ...] | None = None
    outputs: int | None = None
    origin: ArtifactInfo | None = None
    recipe: Recipe | None = None
    trusted: bool = False

    @property
    def classes(self) -> tuple[str, ...] | None:
        """The outputs of a classifier; None of a language model. Raises InputError where nobody has named them."""
        if AUTO_CLASSES[self.task] == CAUSAL:
            return None
        if not self.labels:
            raise InputError(
                f"nobody says how many outputs the head on {self.section.path} has: its {MODEL_CONFIG} is missing"
            )
        return self.labels

    def check_labels(self, labels: Sequence[str]) -> None:
        """A head of another size would be drawn at random. Raises InputError."""
        if self.outputs not in (None, len(labels)):
            raise InputError(
                f"{self.section.path} has a head with {self.outputs} outputs, and {len(labels)} are needed here: "
                f"{', '.join(labels)}"[:500]
            )


def base_files(subject: Artifact, *, weights: bool = False) -> Path:
    """The base's files on this host."""
    return fetch_model(subject.section, weights=weights).folder


def tokenizer_of(subject: Artifact) -> PreTrainedTokenizerBase:
    """The one that was saved with the adapter, where it was; else the base's. A checkpoint of a model that is trained
    whole has none, but its run knows whose it was."""
    for adapter in [*subject.adapters.values()][:1]:
        if (adapter / "tokenizer_config.json").is_file():
            return load_tokenizer(adapter, trust_remote_code=subject.trusted)
    folder = base_files(subject)
    if (folder / "tokenizer_config.json").is_file():
        return load_tokenizer(folder, trust_remote_code=subject.section.trust_remote_code)
    source = subject.origin.model if subject.origin else subject.section
    trust = subject.trusted or source.trust_remote_code  # the origin's is the user's own recipe's, or none
    return load_tokenizer(fetch_model(source, weights=False).folder, trust_remote_code=trust)


def find(address: ArtifactRef, folder: Path, recipe: Recipe | None = None, *, trust: Trust = NOBODY) -> Artifact:
    """Brings the files into ``folder``, those of a model into its cache. With the user's ``recipe``, its base is the
    one that an adapter is put on, and its task what the model has to be for. ``trust``: whose code may run.

    Raises InputError when there are none, or when they do not go together."""
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
        _download(open_storage(uri), folder / name)
        found.append((name, uri, _saved(recipe, folder / name, uri, trust)))
    return _together(found)


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
            f"{run.url} was trained for task {begun.task}, and the recipe says {recipe.task}; name its own"
        )
    folder = folder / DEFAULT
    if not _take_published(run, folder / "adapter"):
        record = fetch_whole(run, folder / "checkpoint")
        if record is None:
            raise InputError(f"{run.url} has neither a final adapter nor a whole checkpoint yet: train it first")
        log.warning("%s has no whole final adapter; its checkpoint of step %d is taken", run.url, record.step)
        base, folder = record.state.get("base"), folder / "checkpoint"
    else:
        base, folder = None, folder / "adapter"
    found = _saved(recipe or begun, folder, run.url, trust)
    if isinstance(base, dict) and found.origin:  # a checkpoint before the last has no file that says so
        found = replace(found, origin=found.origin._replace(base=base))
    try:
        labels = read_data(run)["train"].labels
    except FileNotFoundError:
        raise InputError(f"{run.url} lacks {layout.DATA}, which says what it was trained on; put it back") from None
    return replace(found, labels=labels or found.labels)


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


def _saved(recipe: Recipe | None, folder: Path, where: str, trust: Trust) -> Artifact:
    """What training saves: an adapter, or a whole model."""
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
    wanted, got = PEFT_TYPES[AUTO_CLASSES[recipe.task]], config.get("task_type")
    if got not in (None, wanted):
        raise InputError(f"{where} is an adapter for {got}, and task {recipe.task} needs one for {wanted}")
    base = config.get("base_model_name_or_path")
    if base and base != recipe.model.path:
        log.warning("%s was trained on %s; it is put on the recipe's %s", where, base, recipe.model.path)


def _origin(folder: Path, where: str) -> ArtifactInfo | None:
    """As training wrote it beside what is final; of a checkpoint, by the recipe of the run that it lies in."""
    run, inside, _ = where.rstrip("/").rpartition(f"/{layout.CHECKPOINTS}/")
    if inside and open_storage(run).info(layout.RECIPE):
        return ArtifactInfo.of(read_recipe(open_storage(run)))
    return ArtifactInfo.read(folder)


def _origin_by_peft(config: dict[str, Any], where: str) -> ArtifactInfo:
    """Of an adapter that says no more than peft's own: its base is taken as it lies in its files."""
    base = config.get("base_model_name_or_path")
    if not base:
        raise InputError(f"{ADAPTER_CONFIG} of {where} names no base; write it there as base_model_name_or_path")
    tasks = {kind: task for task, auto in reversed(AUTO_CLASSES.items()) for kind in [PEFT_TYPES[auto]]}
    kind = config.get("task_type") or PEFT_TYPES[AUTO_CLASSES["sft"]]
    task = tasks.get(kind) if isinstance(kind, str) else None
    if task is None:
        raise InputError(f"{where} is an adapter for {config['task_type']}, which is none of {', '.join(tasks)}")
    section = _section(base, revision=config.get("revision") or "main")
    section = _in_its_dtype(section, fetch_model(section, weights=False).folder)
    return ArtifactInfo(task, _method_by_peft(config), section)


def _section(path: str, **settings: str) -> ModelSection:
    """Raises InputError, which does not repeat the path: it may hold what nobody is to read."""
    try:
        return ModelSection(path=path, **settings)  # type: ignore[arg-type]
    except ValidationError as error:
        raise InputError(f"this cannot be a model: {error.errors()[0]['msg']}") from None


def _method_by_peft(config: dict[str, Any]) -> str:
    kind = str(config.get("peft_type", "?")).lower()
    return "dora" if config.get("use_dora") else "rslora" if config.get("use_rslora") else kind


def _in_its_dtype(section: ModelSection, folder: Path) -> ModelSection:
    config = read_config(folder / MODEL_CONFIG, section.path)
    told = str(config.get("dtype") or config.get("torch_dtype") or DTYPES[0])
    return section.model_copy(update={"dtype": told if told in DTYPES else DTYPES[0]})


def _whole_model(recipe: Recipe | None, section: ModelSection, folder: Path, where: str) -> Artifact:
    config = read_config(folder / MODEL_CONFIG, where)
    named = [str(name) for name in config.get("architectures") or []]
    head = any(name.endswith("ForSequenceClassification") for name in named)
    task = recipe.task if recipe else "classification" if head else "sft"
    if task in REFERRING:
        raise InputError(f"{where} is a whole model: task {task} compares an adapter with the base under it, name one")
    kind = AUTO_CLASSES[task].removeprefix("AutoModel")
    if not kind.startswith("ForCausal") and not any(name.endswith(kind) for name in named):
        raise InputError(f"{where} is {', '.join(named) or 'of no kind'}, without the head that task {task} needs")
    labels = _labels(config) if recipe else _outputs(config)
    outputs = len(config.get("id2label") or DEFAULT_OUTPUTS)
    origin = ArtifactInfo.of(recipe) if recipe else _origin(folder, where)
    return Artifact(section, task, "none", {}, labels, outputs, origin, recipe)


def _labels(config: dict[str, Any]) -> tuple[str, ...] | None:
    """None for the names that stand for none."""
    ordered = _outputs(config)
    return None if ordered is None or all(n == f"LABEL_{i}" for i, n in enumerate(ordered)) else ordered


def _outputs(config: dict[str, Any]) -> tuple[str, ...] | None:
    named = config.get("id2label") or {}
    if wrong := [number for number in named if not re.fullmatch(r"\d{1,9}", number, re.ASCII)]:
        raise InputError(f"{MODEL_CONFIG} names the label of {wrong[0]!r}, which is no number of an output")
    names = {int(number): str(name) for number, name in named.items()}
    return tuple(names[n] for n in sorted(names)) or None
