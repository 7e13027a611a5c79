"""Rules for runs that are trained together: in the same processes, on one base model (`trainer.worker.together`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import reduce
from typing import TYPE_CHECKING, Any, NamedTuple

from trainer.errors import Mistake, RecipeError
from trainer.recipe.methods import METHODS
from trainer.recipe.strategies import STRATEGIES
from trainer.recipe.tasks import TASKS
from trainer.registry import Registry

if TYPE_CHECKING:
    from trainer.recipe.root import Recipe

SAME = ("model", "strategy", "compute", "resources", "cluster", "storage", "exact", "plugins")
"""Top-level keys with one value for all runs. The strategy and what follows it are those of the processes."""


class TogetherRule(NamedTuple):
    """A setting that a run cannot have together with others. ``path``: the value's key; ``message``: follows it."""

    path: str
    broken: Callable[[Recipe], bool]
    message: str


def fitting(table: Registry[Any]) -> str:
    """Returns a message's advice: the names of the rows that take several runs."""
    return f"use one of {', '.join(name for name, row in table.items() if row.takes_several)}"


RULES = (
    TogetherRule(
        "task",
        lambda r: not TASKS[r.task].takes_several,
        f"learns with a model or a head of its own; {fitting(TASKS)}",
    ),
    TogetherRule(
        "adapter.method",
        lambda r: not r.adapter.row.takes_several,
        f"changes the base model or its layers in its own way; {fitting(METHODS)}",
    ),
    TogetherRule(
        "adapter.bias", lambda r: r.adapter.bias not in (None, "none"), "trains the base model's biases; set it to none"
    ),
    TogetherRule(
        "adapter.modules_to_save",
        lambda r: bool(r.adapter.modules_to_save),
        "copies parts of the base model; omit it",
    ),
    TogetherRule(
        "adapter.trainable_tokens",
        lambda r: bool(r.adapter.trainable_tokens),
        "trains rows of the base model; empty it",
    ),
    TogetherRule(
        "model.quantization",
        lambda r: r.model.quantization == "int8",
        "rounds a row by the others of its batch, which are those of other runs; use nf4 or none",
    ),
    TogetherRule(
        "strategy.kind",
        lambda r: not r.strategy.row.takes_several,
        f"has one optimizer for the whole model; {fitting(STRATEGIES)}",
    ),
    TogetherRule(
        "strategy.context_parallel",
        lambda r: r.strategy.context_parallel > 1,
        "divides the rows, which belong to several runs; set it to 1",
    ),
    TogetherRule("compute.compile", lambda r: r.compute.compile, "compiles layers for one adapter; set it to false"),
    TogetherRule(
        "compute.tile_tokens", lambda r: bool(r.compute.tile_tokens), "divides the rows of several runs; set it to null"
    ),
    TogetherRule(
        "sft.neftune_alpha", lambda r: r.sft.neftune_alpha is not None, "changes the shared embeddings; omit it"
    ),
    TogetherRule(
        "training.router_aux_loss_coef",
        lambda r: r.training.router_aux_loss_coef is not None,
        "balances the experts over the tokens of all runs; set it to null",
    ),
    TogetherRule("profile.steps", lambda r: bool(r.profile.steps), "traces all runs of the process; empty it"),
)


def check_together(recipes: Sequence[Recipe]) -> None:
    """Raises RecipeError, with all mistakes, if the runs of the recipes cannot be trained together."""
    found = dict.fromkeys((*_different(recipes), *_unfit(recipes)))
    if found:
        raise RecipeError(tuple(Mistake("together", path, message) for path, message in found))


def _different(recipes: Sequence[Recipe]) -> Iterator[tuple[str, str]]:
    for key in SAME:
        first = getattr(recipes[0], key)
        others = [recipe.name for recipe in recipes if getattr(recipe, key) != first]
        if others:
            yield key, f"has to be the same for all runs together, and {others[0]} has another one; train it apart"
    if len({recipe.training.gradient_checkpointing for recipe in recipes}) > 1:
        yield "training.gradient_checkpointing", "has to be the same for all runs together"
    names = [recipe.name for recipe in recipes]
    for name in {name for name in names if names.count(name) > 1}:
        yield "name", f"is {name} for several of the runs; give each its own"


def _unfit(recipes: Sequence[Recipe]) -> Iterator[tuple[str, str]]:
    for rule in RULES:
        for recipe in filter(rule.broken, recipes):
            value: Any = reduce(getattr, rule.path.split("."), recipe)
            yield rule.path, f"{value} {rule.message}, or train the runs apart"
            break
