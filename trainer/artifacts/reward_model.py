"""Loading of the reward model of a recipe with `task: ppo`: on the policy's base model, or as a separate model."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from trainer.artifacts import Artifact, ArtifactRef, find, load
from trainer.artifacts.adapter_files import ADAPTER_CONFIG, check_patterns, read_adapter_config
from trainer.artifacts.locate import MODEL_CONFIG, tokenizer_of
from trainer.errors import InputError
from trainer.model.files.configs import read_config
from trainer.model.placement import Placement
from trainer.recipe import Recipe
from trainer.recipe.tasks import TASKS
from trainer.recipe.trust import Trust
from trainer.run import layout
from trainer.storage import open_storage
from trainer.tasks.ppo.reward_function import load as load_function
from trainer.tasks.ppo.reward_models import ADAPTER, ModelRater, SharedReward

if TYPE_CHECKING:
    from peft import PeftConfig

log = logging.getLogger(__name__)

HEAD_KEY = "base_model.model.score.weight"


def reward_model(recipe: Recipe, device: torch.device) -> ModelRater | SharedReward | None:
    """Returns the recipe's reward model; None if the recipe names none. Raises InputError for any other model."""
    place = recipe.ppo.reward.model
    if recipe.task != "ppo" or place is None:
        return None
    with tempfile.TemporaryDirectory(prefix="muster-reward-") as folder:
        subject = _found(recipe, place, Path(folder))
        shared = _shared(subject, recipe)
        if shared is not None:
            return shared
        seed = subject.recipe.seed if subject.recipe else 0
        model = load(subject, Placement.on(device), subject.labels or ("reward",), seed=seed)
        return ModelRater(model, tokenizer_of(subject), device)


def check_reward(recipe: Recipe) -> None:
    """Checks that the reward function or the reward model of `task: ppo` exists. Raises InputError. Does not read the
    weights of a model."""
    section = recipe.ppo.reward
    if section.function is not None:
        load_function(section.function)
    if section.model is not None:
        with tempfile.TemporaryDirectory(prefix="muster-reward-") as folder:
            _found(recipe, section.model, Path(folder))


def _found(recipe: Recipe, place: str, folder: Path) -> Artifact:
    """Locates the reward model. Its code may run only if it is the recipe's own base model and the recipe trusts it."""
    subject = find(_address(place), folder, trust=Trust(model=recipe.model))
    if not TASKS[subject.task].has_head:
        raise InputError(f"ppo.reward.model {place} is for task {subject.task}; a reward model is wanted")
    outputs = subject.outputs or len(subject.classes or ())
    if outputs != 1:
        raise InputError(f"ppo.reward.model {place} has a head with {outputs} outputs; a reward model has one")
    return subject


def _address(place: str) -> ArtifactRef:
    """Returns the address of a run, an adapter's folder or a model; which of them is decided by its files."""
    if "://" not in place and not Path(place).exists():
        return ArtifactRef(model=place)
    storage = open_storage(place)
    if storage.info(layout.RECIPE):
        return ArtifactRef(run=place)
    if storage.info(ADAPTER_CONFIG):
        return ArtifactRef(adapters=(("default", place),))
    return ArtifactRef(model=place)


def _shared(subject: Artifact, recipe: Recipe) -> SharedReward | None:
    """Returns the reward model for the policy's base model; None if it has another base model, or an adapter that
    cannot share the model with the policy's."""
    base, own = subject.section, recipe.model
    alike = all(getattr(base, name) == getattr(own, name) for name in ("path", "revision", "quantization"))
    if not alike or len(subject.adapters) != 1 or not recipe.adapter.row.shares_base:
        return None
    (folder,) = subject.adapters.values()
    config, tensors = _config(folder), _tensors(folder)
    head = tensors.pop(HEAD_KEY, None)
    _check_sizes(recipe, folder, tensors)
    parts = {name.rpartition("."): tensor for name, tensor in tensors.items()}
    lora = all(stem.endswith((".lora_A", ".lora_B")) for stem, _, _ in parts)
    if config is None or head is None or not lora or not (folder / MODEL_CONFIG).is_file():
        return None
    pad = read_config(folder / MODEL_CONFIG, str(folder)).get("pad_token_id")
    log.info("%s is loaded on the policy's base model", recipe.ppo.reward.model)
    # On the model, a parameter's name has the adapter's name, without which peft saves it.
    named = {f"{stem}.{ADAPTER}.{last}": tensor for (stem, _, last), tensor in parts.items()}
    return SharedReward(config, named, head, -1 if pad is None else int(pad))


def _check_sizes(recipe: Recipe, folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Raises InputError for a configuration that would create far larger tensors than its file contains."""
    place, given = str(recipe.ppo.reward.model), read_adapter_config(folder, str(recipe.ppo.reward.model))
    check_patterns(given, [name.rpartition(".lora_")[0] for name in tensors], place)
    rank, ranks = given.get("r"), [min(t.shape) for t in tensors.values() if t.ndim == 2]
    if isinstance(rank, int) and ranks and rank > 4 * max(ranks):
        raise InputError(f"ppo.reward.model {place} is configured with rank {rank}, but its file has rank {max(ranks)}")


def _config(folder: Path) -> PeftConfig | None:
    """Returns the reward adapter's configuration as a frozen causal-LM adapter; None unless it is plain LoRA."""
    from peft import LoraConfig, PeftConfig, TaskType

    config: Any = PeftConfig.from_pretrained(str(folder))
    if not isinstance(config, LoraConfig) or config.use_dora or config.bias != "none" or config.trainable_token_indices:
        return None
    config.task_type, config.modules_to_save, config.inference_mode = TaskType.CAUSAL_LM, None, True
    config.init_lora_weights = False
    return config


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / "adapter_model.safetensors"
    try:
        return load_file(path) if path.is_file() else {}
    except SafetensorError as error:
        raise InputError(f"ppo.reward.model: its {path.name} cannot be read, it is torn: {error}") from error
