"""A refusal: values of the support matrix (`trainer.recipe.rules.matrix`) that do not work together."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from trainer.recipe.methods import MethodRow
    from trainer.recipe.strategies import StrategyRow
    from trainer.recipe.tasks import TaskRow


class Refusal(NamedTuple):
    """Cells that do not work: those that have one of these values on every side that is not empty. A side is a tuple of
    values, or a condition on their rows, so that a new row is covered without a change here. ``why``: a clause without
    a full stop."""

    why: str
    method: tuple[str, ...] | Callable[[MethodRow], bool] = ()
    quantization: tuple[str, ...] = ()
    strategy: Callable[[StrategyRow], bool] | None = None
    task: Callable[[TaskRow], bool] | None = None


def on_sharded(row: StrategyRow) -> bool:
    return row.sharded


def with_head(row: TaskRow) -> bool:
    return row.has_head


def that_generates(row: TaskRow) -> bool:
    return row.generates


def with_adapter_off(row: TaskRow) -> bool:
    """Returns true if the reference has to be the model with its adapter switched off."""
    return row.has_reference and not row.stores_reference
