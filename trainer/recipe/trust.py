"""Python code that a recipe names, and whose word lets it run.

A recipe's file is the word of the user who names it. What lies in a storage (a run's recipe, `muster.json` beside an
adapter) was written by whoever can write there, and its code would run with the reader's credentials. So everything
that is read from a storage passes through this module: `without_code` takes the code out, `granted` lets it through
for the option of a command, and `Trust` says whose models may bring code.
"""

from __future__ import annotations

from dataclasses import dataclass

from trainer.errors import UsageError
from trainer.recipe.root import Recipe
from trainer.recipe.sections.model import ModelSection

FLAG = "--trust-remote-code"
SHIPPED_REWARDS = "trainer.tasks.ppo.rewards:"


def code_of(recipe: Recipe) -> list[str]:
    """Every value of the recipe that leads to an import of foreign code, as text for a person.

    A key that names code belongs here and in `without_code`."""
    found = []
    if recipe.model.trust_remote_code:
        found.append(f"the code that comes with model.path {recipe.model.path} (model.trust_remote_code)")
    function = recipe.ppo.reward.function
    if function is not None and not function.startswith(SHIPPED_REWARDS):
        found.append(f"ppo.reward.function {function}")
    return found


def submitting_code_of(recipe: Recipe) -> list[str]:
    """Every value that says what runs on a cluster, or who is sent the job and its credentials."""
    cluster = recipe.cluster
    values = {
        "cluster.slurm.options": " ".join(cluster.slurm.options),
        "cluster.kubernetes.image": cluster.kubernetes.image,
        "cluster.ray.address": cluster.ray.address,
    }
    return [f"{name} {value}" for name, value in values.items() if value]


def without_code(recipe: Recipe) -> Recipe:
    """The recipe as it may be read from a storage: nothing in it leads to foreign code."""
    changes: dict[str, object] = {"model": recipe.model.model_copy(update={"trust_remote_code": False})}
    function = recipe.ppo.reward.function
    if function is not None and not function.startswith(SHIPPED_REWARDS):
        reward = recipe.ppo.reward.model_copy(update={"function": None})
        changes["ppo"] = recipe.ppo.model_copy(update={"reward": reward})
    return recipe.model_copy(update=changes)


def granted(recipe: Recipe, where: str, *, trust: bool, submits: bool = False) -> Recipe:
    """A recipe from the storage at ``where``, to be trained with, and perhaps submitted. Raises UsageError when it
    names code and the user does not ``trust`` it: leaving the code out would train something else."""
    code = [*code_of(recipe), *(submitting_code_of(recipe) if submits else [])]
    if code and not trust:
        raise UsageError(
            f"{where} lies in a storage and would run {' and '.join(code)}: look at that, then give {FLAG}, or name a "
            "recipe file of your own"
        )
    return recipe


@dataclass(frozen=True)
class Trust:
    """Models that may bring code: with ``everything`` (the command's option) those that the address names and what lies
    beside them; else the one ``model`` that the user's own recipe trusts."""

    everything: bool = False
    model: ModelSection | None = None

    def grant(self, section: ModelSection) -> ModelSection:
        """The section with the user's word in the place of what it says itself."""
        own = self.model
        same = own is not None and (own.path, own.revision) == (section.path, section.revision)
        trusted = self.everything or (own is not None and same and own.trust_remote_code)
        return section.model_copy(update={"trust_remote_code": trusted})


NOBODY = Trust()
