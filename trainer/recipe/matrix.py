"""Which method, quantisation, strategy and task work together: one table.

``validate`` reads it, ``muster matrix`` prints it, and ``make matrix`` trains every cell that it allows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import product
from typing import TYPE_CHECKING, NamedTuple, get_args

from trainer.recipe.base import Conflict, KeyPath
from trainer.recipe.sections.model import ModelSection
from trainer.registry import METHODS, STRATEGIES, TASKS

if TYPE_CHECKING:
    from trainer.recipe.root import Recipe


class Cell(NamedTuple):
    method: str
    quantization: str
    strategy: str
    task: str


PATHS: dict[str, KeyPath] = {
    "method": ("adapter", "method"),
    "quantization": ("model", "quantization"),
    "strategy": ("strategy", "kind"),
    "task": ("task",),
}
"""Where a recipe has each side of a cell."""

PLAINEST_FIRST = ("quantization", "strategy", "method", "task")
"""The sides in the order in which a recipe would rather change them: what it learns comes last."""

NEARER_VALUES = {"quantization": ("nf4", "int8", "none")}
"""The order in which the values of a side are tried in another's place: who asks for few bytes gets few bytes."""


SIGNS = {"none": "x", "nf4": "4", "int8": "8"}
"""One sign per quantisation, for tables."""


class Refusal(NamedTuple):
    """Cells that do not work: those with one of these values on every side that is given."""

    why: str
    method: tuple[str, ...] = ()
    quantization: tuple[str, ...] = ()
    strategy: tuple[str, ...] = ()
    task: tuple[str, ...] = ()

    def sides(self) -> tuple[str, ...]:
        return tuple(side for side in PLAINEST_FIRST if getattr(self, side))

    def covers(self, cell: Cell) -> bool:
        return all(getattr(cell, side) in getattr(self, side) for side in self.sides())


REFUSALS = (
    Refusal(
        "quantised weights cannot be trained, and adapter.method none trains all of them",
        method=("none",),
        quantization=("nf4", "int8"),
    ),
    Refusal(
        "pissa and olora start from a part of each weight, and int8 would round the rest by the largest entry of a row",
        method=("pissa", "olora"),
        quantization=("int8",),
    ),
    Refusal(
        "the reference of dpo and ppo is the model with its adapter off, and adapter.method none has no adapter",
        method=("none",),
        task=("dpo", "ppo"),
    ),
    Refusal(
        "prompt and p_tuning put virtual tokens before a text, which then begins and ends where no head looks for it",
        method=("prompt", "p_tuning"),
        task=("classification", "reward"),
    ),
    Refusal(
        "peft saves no head with an adaption_prompt",
        method=("adaption_prompt",),
        task=("classification", "reward"),
    ),
    Refusal(
        "pissa and olora take a part out of the base, so that it is no reference with its adapter switched off",
        method=("pissa", "olora"),
        task=("dpo", "ppo"),
    ),
    Refusal(
        "ppo writes texts by a cache of keys and values, among which vectors that the adapter puts there are not told "
        "from a text, and adapters by peft's names may be of that kind",
        method=("prefix", "prompt", "p_tuning", "adaption_prompt", "peft"),
        task=("ppo",),
    ),
    Refusal(
        "adalora plans its ranks over a run's steps, one update each, and ppo takes several in a step",
        method=("adalora",),
        task=("ppo",),
    ),
    Refusal(
        "peft takes the shape of a packed 4-bit weight for the layer's own",
        method=("loha", "lokr"),
        quantization=("nf4",),
    ),
    Refusal(
        "bitsandbytes takes int8 weights apart in the first forward, and dora has to read them",
        method=("dora",),
        quantization=("int8",),
    ),
    Refusal(
        "adalora compares the gradients of whole matrices between all layers",
        method=("adalora",),
        strategy=("fsdp", "zero2", "zero3"),
    ),
    Refusal(
        "int8 weights cannot be sharded or cast: their scales belong to whole rows of whole-number weights",
        quantization=("int8",),
        strategy=("fsdp", "zero2", "zero3"),
    ),
)


def axes() -> dict[str, tuple[str, ...]]:
    """Every value of every side, in the order in which people meet them."""
    return {
        "method": METHODS.names(),
        "quantization": get_args(ModelSection.model_fields["quantization"].annotation),
        "strategy": STRATEGIES.names(),
        "task": TASKS.names(),
    }


def cells() -> Iterator[Cell]:
    """All cells, allowed or not."""
    yield from (Cell(*values) for values in product(*axes().values()))


def refusal(cell: Cell) -> Refusal | None:
    """Why this cell does not work; None when it does."""
    return next((refused for refused in REFUSALS if refused.covers(cell)), None)


def nearest(cell: Cell) -> list[tuple[str, str]]:
    """Each single change ``(side, value)`` that leads to a cell that works, one value per side, the sides in the order
    of ``PLAINEST_FIRST``; empty when it takes more than one change."""
    found = []
    for side in PLAINEST_FIRST:
        for value in NEARER_VALUES.get(side, axes()[side]):
            if refusal(cell._replace(**{side: value})) is None:
                found.append((side, value))
                break
    return found


def signs(method: str, strategy: str, task: str) -> tuple[str, ...]:
    """The sign of each quantisation, a blank for one that does not work."""
    by_sign = {sign: Cell(method, quantization, strategy, task) for quantization, sign in SIGNS.items()}
    return tuple(" " if refusal(cell) else sign for sign, cell in by_sign.items())


def alike(tasks: Iterable[str]) -> list[tuple[str, ...]]:
    """The tasks in groups that have the same table, in the order of each group's first."""
    groups: dict[tuple[tuple[str, ...], ...], list[str]] = {}
    for task in tasks:
        sides = axes()
        table = tuple(signs(method, strategy, task) for method in sides["method"] for strategy in sides["strategy"])
        groups.setdefault(table, []).append(task)
    return [tuple(group) for group in groups.values()]


def cell_of(recipe: Recipe) -> Cell:
    return Cell(recipe.adapter.kind, recipe.model.quantization, recipe.strategy.kind, recipe.task)


def conflicts(recipe: Recipe) -> Iterator[Conflict]:
    cell = cell_of(recipe)
    refused = refusal(cell)
    if refused is not None:
        yield Conflict(tuple(PATHS[side] for side in refused.sides()), f"{refused.why}; {_advice(cell)}")


def _advice(cell: Cell) -> str:
    changes = [f"{'.'.join(map(str, PATHS[side]))}={value}" for side, value in nearest(cell)]
    return f"what works is {' or '.join(changes)}" if changes else "see `muster matrix`"
