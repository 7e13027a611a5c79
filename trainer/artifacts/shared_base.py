"""A further model of a run by its location in the recipe, and its adapter for the base model that is trained."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from trainer.artifacts.adapter_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, check_patterns, read_adapter_config
from trainer.artifacts.locate import Artifact, ArtifactRef
from trainer.errors import InputError
from trainer.recipe import ModelSection, Recipe
from trainer.run import layout
from trainer.storage import open_storage
from trainer.tasks.shared_adapter import SharedAdapter

if TYPE_CHECKING:
    import torch
    from peft import PeftConfig


class PlannedModel(NamedTuple):
    """A further model in a plan, which reads no weights. ``section``: its base model. ``shared``: that is the one which
    is trained. ``as_stored``: it is loaded in the type of its files, which are not read here."""

    section: ModelSection
    shared: bool = False
    as_stored: bool = False


class Found(NamedTuple):
    """The adapter, and the tensors that are saved ``beside`` it, by their names in the file."""

    adapter: SharedAdapter
    beside: Mapping[str, torch.Tensor]


def address_of(place: str) -> ArtifactRef:
    """Returns the address of a run, an adapter's folder or a model; which of them is decided by its files."""
    if "://" not in place and not Path(place).exists():
        return ArtifactRef(model=place)
    storage = open_storage(place)
    if storage.info(layout.RECIPE):
        return ArtifactRef(run=place)
    if storage.info(ADAPTER_CONFIG):
        return ArtifactRef(adapters=(("default", place),))
    return ArtifactRef(model=place)


def is_same_base(section: ModelSection, recipe: Recipe) -> bool:
    """Returns True if the base model is the recipe's, of the same types, and the recipe's adapter can share it."""
    alike = all(getattr(section, n) == getattr(recipe.model, n) for n in ("path", "revision", "quantization"))
    return alike and recipe.adapter.row.shares_base


def shared_adapter(
    subject: Artifact, recipe: Recipe, name: str, where: str, beside: Collection[str] = ()
) -> Found | None:
    """Returns the adapter of ``subject`` for the recipe's base model, as adapter ``name``; None if it has another base
    model, or is not plain LoRA. ``where``: its setting and location, for errors. ``beside``: the names of tensors that
    may be saved with it."""
    if len(subject.adapters) != 1 or not is_same_base(subject.section, recipe):
        return None
    (folder,) = subject.adapters.values()
    config, tensors = _config(folder), _tensors(folder, where)
    others = {key: tensors.pop(key) for key in beside if key in tensors}
    _check_sizes(folder, tensors, where)
    parts = {key.rpartition("."): tensor for key, tensor in tensors.items()}
    if config is None or not all(stem.endswith((".lora_A", ".lora_B")) for stem, _, _ in parts):
        return None
    # On the model, a parameter's name has the adapter's name, without which peft saves it.
    named = {f"{stem}.{name}.{last}": tensor for (stem, _, last), tensor in parts.items()}
    return Found(SharedAdapter(name, config, named), others)


def _check_sizes(folder: Path, tensors: dict[str, torch.Tensor], where: str) -> None:
    """Raises InputError for a configuration that would create far larger tensors than its file contains."""
    given = read_adapter_config(folder, where)
    check_patterns(given, [name.rpartition(".lora_")[0] for name in tensors], where)
    rank, ranks = given.get("r"), [min(t.shape) for t in tensors.values() if t.ndim == 2]
    if isinstance(rank, int) and ranks and rank > 4 * max(ranks):
        raise InputError(f"{where} is configured with rank {rank}, but its file has rank {max(ranks)}")


def _config(folder: Path) -> PeftConfig | None:
    """Returns the adapter's configuration as a frozen causal-LM adapter; None unless it is plain LoRA."""
    from peft import LoraConfig, PeftConfig, TaskType

    config: Any = PeftConfig.from_pretrained(str(folder))
    if not isinstance(config, LoraConfig) or config.use_dora or config.bias != "none" or config.trainable_token_indices:
        return None
    config.task_type, config.modules_to_save, config.inference_mode = TaskType.CAUSAL_LM, None, True
    config.init_lora_weights = False
    return config


def _tensors(folder: Path, where: str) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / ADAPTER_WEIGHTS
    try:
        return load_file(path) if path.is_file() else {}
    except SafetensorError as error:
        raise InputError(f"{where}: its {path.name} cannot be read, it is torn: {error}") from error
