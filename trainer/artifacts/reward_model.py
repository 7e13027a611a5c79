"""Loading of the reward model of a recipe: on the policy's base model, or as a separate model."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path

import torch

from trainer.artifacts import Artifact, find, load
from trainer.artifacts.locate import MODEL_CONFIG, tokenizer_of
from trainer.artifacts.shared_base import PlannedModel, address_of, is_same_base, shared_adapter
from trainer.errors import InputError
from trainer.model.files.configs import read_config
from trainer.model.placement import Placement
from trainer.recipe import ModelSection, Recipe
from trainer.recipe.tasks import TASKS
from trainer.recipe.trust import Trust
from trainer.run.frozen import read_recipe
from trainer.storage import open_storage
from trainer.tasks.environments.environments import Environments
from trainer.tasks.rewards.functions import RewardFunctions
from trainer.tasks.rewards.models import ADAPTER, ModelRater, SharedReward

log = logging.getLogger(__name__)

HEAD_KEY = "base_model.model.score.weight"


def reward_model(recipe: Recipe, device: torch.device) -> ModelRater | SharedReward | None:
    """Returns the recipe's reward model; None if the recipe names none. Raises InputError for any other model."""
    section = recipe.rollout_section
    place = section.reward.model if section else None
    if place is None:
        return None
    with tempfile.TemporaryDirectory(prefix="muster-reward-") as folder:
        subject = _found(recipe, place, Path(folder))
        shared = _shared(subject, recipe, place)
        if shared is not None:
            return shared
        seed = subject.recipe.seed if subject.recipe else 0
        model = load(subject, Placement.on(device), subject.labels or ("reward",), seed=seed)
        return ModelRater(model, tokenizer_of(subject), device)


def check_reward(recipe: Recipe) -> None:
    """Checks that the reward functions and the environment can be loaded, in processes that end afterwards, and that
    the reward model of the task exists. Raises InputError. Does not read the weights of a model."""
    section = recipe.rollout_section
    if section is None:
        return
    if section.reward.rows:
        RewardFunctions(section.reward.rows, setting=f"{recipe.task}.reward.function").close()
    if section.environment is not None:
        Environments(section.environment, 1, section.environment_timeout_s, f"{recipe.task}.environment").close()
    if section.reward.model is not None:
        with tempfile.TemporaryDirectory(prefix="muster-reward-") as folder:
            _found(recipe, section.reward.model, Path(folder))


def planned_reward(recipe: Recipe) -> PlannedModel | None:
    """Returns the reward model for a plan, which reads no weights of a base model; None if the recipe names none."""
    section = recipe.rollout_section
    place = section.reward.model if section else None
    if place is None:
        return None
    address = address_of(place)
    if address.model is not None:
        return PlannedModel(ModelSection(path=place), as_stored=True)
    if address.adapters:
        with tempfile.TemporaryDirectory(prefix="muster-reward-") as folder:
            subject = _found(recipe, place, Path(folder))
            return PlannedModel(subject.section, _shared(subject, recipe, place) is not None)
    begun = read_recipe(open_storage(place))
    return PlannedModel(begun.model, begun.adapter.row.plain_lora == 1 and is_same_base(begun.model, recipe))


def _found(recipe: Recipe, place: str, folder: Path) -> Artifact:
    """Locates the reward model. Its code may run only if it is the recipe's own base model and the recipe trusts it."""
    subject = find(address_of(place), folder, trust=Trust(model=recipe.model))
    if not TASKS[subject.task].has_head:
        raise InputError(f"{recipe.task}.reward.model {place} is for task {subject.task}; a reward model is wanted")
    outputs = subject.outputs or len(subject.classes or ())
    if outputs != 1:
        raise InputError(
            f"{recipe.task}.reward.model {place} has a head with {outputs} outputs; a reward model has one"
        )
    return subject


def _shared(subject: Artifact, recipe: Recipe, place: str) -> SharedReward | None:
    """Returns the reward model for the policy's base model; None if it has another base model, or an adapter that
    cannot share the model with the policy's."""
    named = f"{recipe.task}.reward.model {place}"
    found = shared_adapter(subject, recipe, ADAPTER, named, beside=(HEAD_KEY,))
    folder = next(iter(subject.adapters.values()), Path())
    if found is None or HEAD_KEY not in found.beside or not (folder / MODEL_CONFIG).is_file():
        return None
    pad = read_config(folder / MODEL_CONFIG, str(folder)).get("pad_token_id")
    log.info("%s is loaded on the policy's base model", place)
    return SharedReward(found.adapter, found.beside[HEAD_KEY], -1 if pad is None else int(pad))
