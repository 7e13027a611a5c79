"""Python code that a recipe names, and who may allow it to run.

A user who gives a recipe file trusts that file. A recipe in a storage (a run's recipe, `muster.json` next to an
adapter) may be written by anyone with write access, and its code would run with the reader's credentials. So everything
that is read from a storage passes through this module: `without_code` removes the code, `granted` accepts it if the
command's option allows it, and `Trust` decides which models may run code. The names of plug-ins' rows stay: reading a
recipe from a storage imports none of them (`trainer.recipe.plugins`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from trainer.errors import UsageError
from trainer.recipe.plugins import plugins_of
from trainer.recipe.root import Recipe
from trainer.recipe.sections.model import ModelSection
from trainer.recipe.sections.rollouts.engine import RolloutSection
from trainer.recipe.sections.rollouts.reward import RewardSection
from trainer.recipe.sections.rollouts.task import RolloutTaskSection

FLAG = "--trust-remote-code"
SHIPPED_REWARDS = ("trainer.tasks.rewards.shipped:", "trainer.tasks.ppo.rewards:")
SHIPPED_ENVIRONMENTS = ("trainer.tasks.environments.calculator:Calculator",)
RUNS_TEXTS = ("trainer.tasks.rewards.shipped:python_tests",)
"""Shipped rewards that run the code in the texts and in the data, which a stored recipe chooses."""


def code_of(recipe: Recipe) -> list[str]:
    """Lists, for a person to read, every value of the recipe that leads to an import of foreign code."""
    # Each new key that names code must be added here and in `without_code`.
    found = []
    if recipe.model.trust_remote_code:
        found.append(f"the code that comes with model.path {recipe.model.path} (model.trust_remote_code)")
    for key, reward in rewards_of(recipe).items():
        if _is_foreign(reward.function):
            found.append(f"{key}.reward.function {reward.function}")
        found += [f"{key}.reward.functions {row.function}" for row in reward.functions if _is_foreign(row.function)]
    found += [f"{key}.environment {name}" for key, name in foreign_environments(recipe).items()]
    if recipe.optimizer.row.named_by_user:
        found.append(f"optimizer.name {recipe.optimizer.name}")
    if recipe.rollout.vllm.python is not None:
        found.append(f"rollout.vllm.python {recipe.rollout.vllm.python}")
    if recipe.rollout.addresses:
        found.append(f"the servers of rollout.addresses ({', '.join(recipe.rollout.addresses)})")
    if _is_foreign(recipe.generative_eval.function):
        found.append(f"generative_eval.metric {recipe.generative_eval.metric}")
    if recipe.cluster.env:  # some name a library to load, or the server that files and credentials are exchanged with
        found.append(f"libraries with the variables of cluster.env ({', '.join(recipe.cluster.env)})")
    if plugins := [f"{key} {name}" for key, name in plugins_of(recipe)]:
        found.append(f"the plug-in {', '.join(plugins)}")
    return found


def rewards_of(recipe: Recipe) -> dict[str, RewardSection]:
    """Returns the rewards of every task that has some, by the key of the task's section."""
    sections = {name: getattr(getattr(recipe, name), "reward", None) for name in Recipe.model_fields}
    return {name: reward for name, reward in sections.items() if isinstance(reward, RewardSection)}


def foreign_environments(recipe: Recipe) -> dict[str, str]:
    """Returns the environments that are not muster's own, by the key of the task's section."""
    sections = {name: getattr(recipe, name) for name in Recipe.model_fields}
    named = {key: s.environment for key, s in sections.items() if isinstance(s, RolloutTaskSection)}
    return {key: name for key, name in named.items() if name is not None and name not in SHIPPED_ENVIRONMENTS}


def _is_foreign(function: str | None) -> bool:
    return function is not None and (function in RUNS_TEXTS or not function.startswith(SHIPPED_REWARDS))


def submitting_code_of(recipe: Recipe) -> list[str]:
    """Lists every value that decides what runs on a cluster, or which server gets the job and its credentials."""
    cluster = recipe.cluster
    values = {
        "cluster.slurm.options": " ".join(cluster.slurm.options),
        "cluster.slurm.container": cluster.slurm.container,
        "cluster.kubernetes.image": cluster.kubernetes.image,
        "cluster.kubernetes.pod": cluster.kubernetes.pod,
        "cluster.kubernetes.head_pod": cluster.kubernetes.head_pod,
        "cluster.ray.address": cluster.ray.address,
        "cluster.skypilot.setup": cluster.skypilot.setup,
        "cluster.skypilot.options": ", ".join(cluster.skypilot.options),
        "cluster.ray.runtime_env": ", ".join(cluster.ray.runtime_env),
    }
    return [f"{name} {value}" for name, value in values.items() if value]


def without_code(recipe: Recipe) -> Recipe:
    """Returns a recipe from a storage without the values that lead to foreign code."""
    changes: dict[str, Any] = {"model": recipe.model.model_copy(update={"trust_remote_code": False}), "plugins": ()}
    for key, reward in rewards_of(recipe).items():
        if any(_is_foreign(row.function) for row in reward.rows):
            own = tuple(row for row in reward.functions if not _is_foreign(row.function))
            single = None if _is_foreign(reward.function) else reward.function
            reward = reward.model_copy(update={"function": single, "functions": own})
            changes[key] = getattr(recipe, key).model_copy(update={"reward": reward})
    for key in foreign_environments(recipe):
        changes[key] = (changes.get(key) or getattr(recipe, key)).model_copy(update={"environment": None})
    if recipe.rollout.row.serves:
        changes["rollout"] = RolloutSection()
    if recipe.optimizer.row.named_by_user:
        changes["optimizer"] = recipe.optimizer.model_copy(update={"name": "adamw", "settings": {}})
    if _is_foreign(recipe.generative_eval.function):
        changes["generative_eval"] = recipe.generative_eval.model_copy(update={"metric": "auto"})
    if recipe.cluster.env:
        changes["cluster"] = recipe.cluster.model_copy(update={"env": {}})
    return recipe.model_copy(update=changes)


def granted(recipe: Recipe, where: str, *, trust: bool, submits: bool = False) -> Recipe:
    """Returns a recipe from the storage at ``where``, to train with and, if it ``submits``, to send to a cluster.

    Raises UsageError if the recipe names code and the user does not ``trust`` it.
    """
    # Not `without_code`: the recipe without its code would train something else.
    code = [*code_of(recipe), *(submitting_code_of(recipe) if submits else [])]
    if code and not trust:
        raise UsageError(
            f"{where} is read from a storage and would run {' and '.join(code)}: check that code, then give {FLAG}, or "
            "name a recipe file of your own"
        )
    return recipe


@dataclass(frozen=True)
class Trust:
    """The models that may bring code. ``everything`` (the command's option): the models that the command's address
    names, and those stored next to them. ``model``: the one model that the user's own recipe trusts."""

    everything: bool = False
    model: ModelSection | None = None

    def grant(self, section: ModelSection) -> ModelSection:
        """Returns the section with ``trust_remote_code`` as the user allows it; the section's own value is ignored."""
        own = self.model
        same = own is not None and (own.path, own.revision) == (section.path, section.revision)
        trusted = self.everything or (own is not None and same and own.trust_remote_code)
        return section.model_copy(update={"trust_remote_code": trusted})


NOBODY = Trust()
