"""Inspection of an adapter or a model: its origin, its contents, and a check of its files."""

from __future__ import annotations

import math
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from trainer.artifacts.adapter_files import ADAPTER_CONFIG, check_patterns, read_adapter_config
from trainer.artifacts.generate import Generator
from trainer.artifacts.load import load
from trainer.artifacts.locate import (
    DEFAULT,
    MODEL_CONFIG,
    Artifact,
    ArtifactRef,
    base_files,
    find,
    tokenizer_of,
)
from trainer.checkpoint import list_commits
from trainer.checkpoint.publish import STATE_FILES, chosen_of, is_last, published_files, reads_back
from trainer.errors import InputError, MusterError
from trainer.model import check_weights
from trainer.model.base_config import load_config
from trainer.model.placement import placement_for
from trainer.recipe.tasks import TASKS
from trainer.recipe.trust import NOBODY, Trust
from trainer.run import layout
from trainer.storage import Storage, open_storage

PROMPT, NEW_TOKENS = "Once upon a time", 8
SETTINGS = ("r", "lora_alpha", "use_dora", "use_rslora", "target_modules", "modules_to_save", "num_virtual_tokens")


@dataclass
class ArtifactReport:
    """The result of an inspection. ``problems``: faults of the files, empty if there are none. ``facts``: other
    findings by name."""

    uri: str
    kind: str
    method: str
    task: str
    base: dict[str, Any] | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    tensors: int = 0
    parameters: int = 0
    bytes: int = 0
    dtypes: dict[str, int] = field(default_factory=dict)
    files: dict[str, int] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @property
    def whole(self) -> bool:
        return not self.problems

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "whole": self.whole}


def describe(uri: str, *, trust: Trust = NOBODY) -> ArtifactReport:
    """Describes the folder of an adapter, a run or a model. A model is loaded and generates a few words; ``trust``:
    whose code may run for it.

    Raises InputError if the folder is none of these."""
    storage = open_storage(uri)
    keys = {o.key for o in storage.list() if "/" not in o.key}
    if layout.RECIPE in keys:
        return _run(uri, storage, trust)
    with tempfile.TemporaryDirectory(prefix="muster-inspect-") as folder:
        if ADAPTER_CONFIG in keys:
            return _adapter(uri, storage, find(ArtifactRef(adapters=((DEFAULT, uri),)), Path(folder), trust=trust))
        if MODEL_CONFIG in keys:
            return _model(uri, storage, find(ArtifactRef(model=uri), Path(folder), trust=trust))
    raise InputError(f"{uri} holds no {ADAPTER_CONFIG}, {MODEL_CONFIG} or {layout.RECIPE}: name the folder of one")


def _run(uri: str, run: Storage, trust: Trust) -> ArtifactReport:
    """Describes a run's final adapter, and compares its files with the commit from which they were published."""
    record = next(iter(list_commits(run, newest=1)), None)
    if record is None or not is_last(record):
        raise InputError(f"{uri} is a run that has no final adapter yet; inspect one of its checkpoints")
    record = chosen_of(run, record)
    found = describe(run.uri(layout.ADAPTER), trust=trust)
    for name, wanted in published_files(record).items():
        if run.info(f"{layout.ADAPTER}/{name}") is None:
            found.problems.append(f"{name} is missing")
        elif not reads_back(run, f"{layout.ADAPTER}/{name}", wanted):
            found.problems.append(f"{name} is not what was committed")
    found.facts["step"] = record.step
    return found


def _adapter(uri: str, storage: Storage, subject: Artifact) -> ArtifactReport:
    (folder,) = subject.adapters.values()
    config = read_adapter_config(folder, uri)
    found = _described(uri, "adapter", subject, storage)
    found.settings = {name: config[name] for name in SETTINGS if config.get(name) not in (None, False, [])}
    found.base = subject.section.model_dump(mode="json", exclude={"trust_remote_code"})
    weights = sorted(folder.glob("adapter_model*.safetensors"))
    if not weights:
        found.problems.append("adapter_model.safetensors is missing")
    for path in weights:
        _count(found, path)
    if found.whole:
        _compare_with_base(found, subject, config)
    return found


def _model(uri: str, storage: Storage, subject: Artifact) -> ArtifactReport:
    found = _described(uri, "model", subject, storage)
    try:
        check_weights(subject.section)
        folder = base_files(subject, weights=True)
    except MusterError as error:
        found.problems.append(str(error))
        return found
    for path in sorted(folder.glob("*.safetensors")):
        if path.name not in STATE_FILES:
            _count(found, path)
    if found.whole:
        _try(found, subject, folder)
    return found


def _described(uri: str, kind: str, subject: Artifact, storage: Storage) -> ArtifactReport:
    files = {o.key: o.size for o in storage.list() if "/" not in o.key}
    return ArtifactReport(uri, kind, subject.method, subject.task, files=files)


def _count(found: ArtifactReport, path: Path) -> None:
    """Counts the tensors, bytes and dtypes of a file. Values that are not finite are a problem."""
    from safetensors import SafetensorError

    dtypes: Counter[str] = Counter()
    try:
        for name, tensor in _tensors(path):
            found.tensors += 1
            found.parameters += tensor.numel()
            found.bytes += tensor.numel() * tensor.element_size()
            dtypes[str(tensor.dtype).removeprefix("torch.")] += 1
            if tensor.is_floating_point():
                wide = tensor.float() if tensor.itemsize == 1 else tensor  # 8-bit floats support few operations
                if not torch.isfinite(wide).all():
                    found.problems.append(f"{path.name}: {name} holds values that are not finite")
    except (SafetensorError, OSError, ValueError) as error:
        found.problems.append(f"{path.name} cannot be read, it is torn: {' '.join(str(error).split())[:200]}")
    found.dtypes = dict(Counter(found.dtypes) + dtypes)


def _tensors(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - a safetensors file is no mapping
            yield name, file.get_tensor(name)


def _compare_with_base(found: ArtifactReport, subject: Artifact, config: Mapping[str, Any]) -> None:
    """Compares names and shapes with those that peft creates from the configuration, if the base can be read."""
    try:
        wanted = _laid_out(subject)
    except Exception as error:  # the base is missing, or peft needs its weights to create the adapter
        found.facts["not compared with its base"] = " ".join(str(error).split())[:200]
        return
    got = {
        name: tuple(tensor.shape)
        for path in sorted(next(iter(subject.adapters.values())).glob("adapter_model*.safetensors"))
        for name, tensor in _tensors(path)
    }
    lacking, foreign = sorted(wanted.keys() - got.keys()), sorted(got.keys() - wanted.keys())
    if lacking:
        found.problems.append(f"{len(lacking)} tensors are missing: {', '.join(lacking[:3])}")
    if foreign:
        found.problems.append(f"{len(foreign)} tensors are foreign: {', '.join(foreign[:3])}")
    if str(config.get("peft_type")) == "ADALORA":
        return  # its ranks differ from layer to layer
    unlike = [n for n in sorted(got.keys() & wanted.keys()) if got[n] != wanted[n]]
    if unlike:
        name = unlike[0]
        found.problems.append(f"{len(unlike)} tensors do not fit the base: {name} is {got[name]}, not {wanted[name]}")


def _laid_out(subject: Artifact) -> dict[str, tuple[int, ...]]:
    import transformers
    from peft import PeftConfig, get_peft_model, get_peft_model_state_dict

    (folder,) = subject.adapters.values()
    head = {"num_labels": len(subject.classes)} if subject.classes else {}
    trust = subject.section.trust_remote_code
    auto_class = TASKS[subject.task].auto_class
    config = load_config(subject.section, base_files(subject), auto_class, **head)
    with torch.device("meta"):
        base = getattr(transformers, auto_class).from_config(config, trust_remote_code=trust)
        check_patterns(read_adapter_config(folder, DEFAULT), [name for name, _ in base.named_modules()], DEFAULT)
        settings = PeftConfig.from_pretrained(str(folder))
        settings.inference_mode = True  # otherwise peft initialises prompts from files that the configuration names
        model = get_peft_model(base, settings, low_cpu_mem_usage=True)
        saved = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {name: tuple(tensor.shape) for name, tensor in saved.items()}


def _try(found: ArtifactReport, subject: Artifact, folder: Path) -> None:
    """Tests that the model loads, computes finite logits and generates text. Adds the results to ``found``."""
    causal = subject.classes is None
    found.facts.update(loads=False, finite=False, **({"generates": False} if causal else {}))
    try:
        with placement_for(subject.section, folder) as placement:
            model = load(subject, placement, subject.classes)
            found.facts["loads"] = True
            tokenizer = _tokenizer(found, subject)
            ids = torch.tensor([tokenizer(PROMPT)["input_ids"] if tokenizer else [0]], device=placement.device)
            with torch.no_grad():
                logits = model(input_ids=ids).logits
            found.facts["finite"] = bool(math.isfinite(float(logits.float().abs().max())))
            if not found.facts["finite"]:
                found.problems.append("its logits are not finite")
            elif causal and tokenizer:
                text = Generator(model, tokenizer, placement.device, 1).answers([PROMPT], NEW_TOKENS)[0]
                found.facts.update(generates=True, text=text)
    except MusterError as error:
        found.problems.append(str(error))


def _tokenizer(found: ArtifactReport, subject: Artifact) -> Any:
    """Returns the tokenizer; None if there is none, as in a checkpoint in the middle of a run."""
    try:
        return tokenizer_of(subject)
    except InputError as error:
        found.facts["tokenizer"] = str(error)[:200]
        return None
