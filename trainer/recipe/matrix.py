"""The support matrix: one table of the methods, quantisations, strategies and tasks that work together.

``muster validate`` reads it, ``muster matrix`` prints it, and ``make matrix`` trains every cell that it allows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import product
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

from trainer.recipe.base import Conflict, KeyPath
from trainer.recipe.methods import METHODS, MethodRow
from trainer.recipe.sections.model import ModelSection
from trainer.recipe.strategies import STRATEGIES, StrategyRow
from trainer.recipe.tasks import SEQUENCE, TASKS, TaskRow
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


class Refusal(NamedTuple):
    """Cells that do not work: those that have one of these values on every side that is not empty. A side is a tuple of
    values, or a condition on their rows, so that a new row is covered without a change here."""

    why: str
    method: tuple[str, ...] | Callable[[MethodRow], bool] = ()
    quantization: tuple[str, ...] = ()
    strategy: Callable[[StrategyRow], bool] | None = None
    task: Callable[[TaskRow], bool] | None = None

    def sides(self) -> tuple[str, ...]:
        return tuple(side for side in PLAINEST_FIRST if getattr(self, side))

    def values(self, side: str) -> tuple[str, ...]:
        """Returns the values that are covered on one of `sides`."""
        return tuple(value for value in axes()[side] if self._covers(side, value))

    def covers(self, cell: Cell) -> bool:
        return all(self._covers(side, getattr(cell, side)) for side in self.sides())

    def _covers(self, side: str, value: str) -> bool:
        given = getattr(self, side)
        return bool(given(TABLES[side][value])) if callable(given) else value in given


def sharded(row: StrategyRow) -> bool:
    return row.shards != "nothing"


def with_head(row: TaskRow) -> bool:
    return row.auto_class == SEQUENCE


REFUSALS = (
    Refusal(
        "quantised weights cannot be trained, and adapter.method none trains all of them",
        method=("none",),
        quantization=("nf4", "int8"),
    ),
    Refusal(
        "pissa and olora take a part out of each weight, and int8 would round the rest by the largest entry of a row",
        method=lambda method: method.residual,
        quantization=("int8",),
    ),
    Refusal(
        "the reference of dpo and ppo is the model with its adapter off, and adapter.method none has no adapter",
        method=("none",),
        task=lambda task: task.has_reference,
    ),
    Refusal(
        "prompt and p_tuning put virtual tokens before a text, and the head then reads the wrong position",
        method=lambda method: method.own_vectors == "tokens",
        task=with_head,
    ),
    Refusal(
        "peft saves no head with an adaption_prompt",
        method=("adaption_prompt",),
        task=with_head,
    ),
    Refusal(
        "pissa and olora take a part out of the base model, so that it is no reference with its adapter switched off",
        method=lambda method: method.residual,
        task=lambda task: task.has_reference,
    ),
    Refusal(
        "ppo writes texts with a cache of keys and values, which cannot separate an adapter's own vectors from those "
        "of a text; adapters by peft's names may have such vectors",
        method=lambda method: method.own_vectors != "none",
        task=lambda task: task.generates,
    ),
    Refusal(
        "adalora plans its ranks over a run's steps, one update each, and ppo takes several in a step",
        method=("adalora",),
        task=lambda task: task.generates,
    ),
    Refusal(
        "peft mistakes the shape of a packed 4-bit weight for that of the layer",
        method=("loha", "lokr"),
        quantization=("nf4",),
    ),
    Refusal(
        "bitsandbytes splits int8 weights in the first forward, and dora has to read them",
        method=("dora",),
        quantization=("int8",),
    ),
    Refusal(
        "adalora compares the gradients of whole matrices between all layers",
        method=("adalora",),
        strategy=sharded,
    ),
    Refusal(
        "int8 weights cannot be sharded or cast: each scale belongs to a complete row of integer weights",
        quantization=("int8",),
        strategy=sharded,
    ),
)


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
    return next((refused for refused in REFUSALS if refused.covers(cell)), None)


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
        yield Conflict(tuple(PATHS[side] for side in refused.sides()), f"{refused.why}; {advice}")
