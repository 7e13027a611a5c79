"""The support matrix: one table of the methods, quantisations, strategies and tasks that work together.

``muster validate`` reads it, ``muster matrix`` prints it, and ``make matrix`` trains every cell that it allows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import product
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

from trainer.recipe.base import Conflict, KeyPath
from trainer.recipe.methods import METHODS
from trainer.recipe.rules.refusal import Refusal, on_sharded, that_generates, with_adapter_off, with_head
from trainer.recipe.sections.model import ModelSection
from trainer.recipe.strategies import STRATEGIES
from trainer.recipe.tasks import TASKS
from trainer.registry import Registry

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
"""The path in a recipe of each side of a cell."""

TABLES: Mapping[str, Registry[Any]] = {"method": METHODS, "strategy": STRATEGIES, "task": TASKS}
"""The table of each side that has one."""

PLAINEST_FIRST = ("quantization", "strategy", "method", "task")
"""The sides in the order in which to suggest a change: the task, which decides what is learned, is last."""

NEARER_VALUES = {"quantization": ("nf4", "int8", "none")}
"""The order in which the values of a side are suggested: those with the fewest bytes first."""


SIGNS = {"none": "x", "nf4": "4", "int8": "8"}
"""One sign per quantisation, for tables."""


GENERAL = (
    Refusal(
        "the method takes a part out of each weight, and int8 would round the rest by the largest entry of a row",
        method=lambda method: method.residual,
        quantization=("int8",),
    ),
    Refusal(
        "virtual tokens stand before a text, and the head then reads the wrong position",
        method=lambda method: method.own_vectors == "tokens",
        task=with_head,
    ),
    Refusal(
        "the method takes a part out of the base model, so the model with its adapter off is not the reference",
        method=lambda method: method.residual,
        task=with_adapter_off,
    ),
    Refusal(
        "texts are generated with a cache of keys and values, which cannot separate an adapter's own vectors from "
        "those of a text; adapters by peft's names may have such vectors",
        method=lambda method: method.own_vectors != "none",
        task=that_generates,
    ),
    Refusal(
        "int8 weights cannot be sharded or cast: each scale belongs to a complete row of integer weights",
        quantization=("int8",),
        strategy=on_sharded,
    ),
)
"""Refusals by facts that several rows share. Those of one method are in its row."""


def refusals() -> tuple[Refusal, ...]:
    """Returns the refusals of the methods' rows, then the general ones. One refusal names all methods that share it."""
    methods: dict[Refusal, list[str]] = {}
    for name, row in METHODS.items():
        for refused in row.refuses:
            methods.setdefault(refused, []).append(name)
    return (*(refused._replace(method=tuple(names)) for refused, names in methods.items()), *GENERAL)


def sides_of(refused: Refusal) -> tuple[str, ...]:
    """Returns the sides that the refusal is about."""
    return tuple(side for side in PLAINEST_FIRST if getattr(refused, side))


def values_of(refused: Refusal, side: str) -> tuple[str, ...]:
    """Returns the values that are refused on one of `sides_of`."""
    return tuple(value for value in axes()[side] if _covers(refused, side, value))


def _covers(refused: Refusal, side: str, value: str) -> bool:
    given = getattr(refused, side)
    return bool(given(TABLES[side][value])) if callable(given) else value in given


def axes() -> dict[str, tuple[str, ...]]:
    """Returns every value of every side, in the order of the documentation."""
    return {
        "method": METHODS.names(),
        "quantization": get_args(ModelSection.model_fields["quantization"].annotation),
        "strategy": STRATEGIES.names(),
        "task": TASKS.names(),
    }


def cells() -> Iterator[Cell]:
    """Yields all cells, allowed or not."""
    yield from (Cell(*values) for values in product(*axes().values()))


def refusal(cell: Cell) -> Refusal | None:
    """Returns the refusal that covers this cell; None if the cell works."""
    for refused in refusals():
        if all(_covers(refused, side, getattr(cell, side)) for side in sides_of(refused)):
            return refused
    return None


def nearest(cell: Cell) -> list[tuple[str, str]]:
    """Returns the single changes ``(side, value)`` that give a cell that works: at most one value per side, the sides
    in the order of ``PLAINEST_FIRST``. Empty if one change is not enough."""
    found = []
    for side in PLAINEST_FIRST:
        for value in NEARER_VALUES.get(side, axes()[side]):
            if refusal(cell._replace(**{side: value})) is None:
                found.append((side, value))
                break
    return found


def signs(method: str, strategy: str, task: str) -> tuple[str, ...]:
    """Returns the sign of each quantisation, a blank for one that does not work."""
    by_sign = {sign: Cell(method, quantization, strategy, task) for quantization, sign in SIGNS.items()}
    return tuple(" " if refusal(cell) else sign for sign, cell in by_sign.items())


def alike(tasks: Iterable[str]) -> list[tuple[str, ...]]:
    """Returns the tasks in groups that have the same table, in the order of each group's first task."""
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
        changes = [f"{'.'.join(map(str, PATHS[side]))}={value}" for side, value in nearest(cell)]
        advice = f"what works is {' or '.join(changes)}" if changes else "see `muster matrix`"
        yield Conflict(tuple(PATHS[side] for side in sides_of(refused)), f"{refused.why}; {advice}")
