"""The label set of classification, found once and frozen into the preparation. A label's number is its index there."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

from trainer.data.formats.columns import column_of
from trainer.data.label_names import label_name
from trainer.data.readers import rows_of
from trainer.data.sample import RowError
from trainer.data.spec import FrozenSource
from trainer.errors import InputError
from trainer.recipe.formats import FORMATS

MOST_LABELS = 10_000


def label_set(sources: Sequence[FrozenSource]) -> tuple[str, ...]:
    """Returns the distinct labels of all classification sources, in the sources' order.

    A source's labels are those named in the recipe, or else those in its rows: numbers by value, then names by
    alphabet. Raises InputError for fewer than two labels, and for a column with too many distinct values.
    """
    chosen = [s for s in sources if FORMATS[s.format].gives == "label"]
    labels = tuple(dict.fromkeys(label for source in chosen for label in source.labels or _found(source)))
    if chosen and len(labels) < 2:
        raise InputError(
            f"data source {chosen[0].path}: classification needs at least two labels, and has {len(labels)}: {labels}"
        )
    return labels


def _found(source: FrozenSource) -> list[str]:
    """Reads the labels in every row of the source. Ignores bad rows: the preparation reports them."""
    column = source.columns.get("label", "label")
    names: set[str] = set()
    for row in rows_of(source):
        name = row if isinstance(row, RowError) else label_name(column_of(row, column, "label"), None)
        if isinstance(name, str):
            names.add(name)
        if len(names) > MOST_LABELS:
            raise InputError(
                f"data source {source.path}: the column {column!r} has more than {MOST_LABELS} different values, "
                f"such as {', '.join(islice(names, 3))!r:.100}; map the label column with columns: {{label: NAME}}"
            )
    return sorted(names, key=_order)


def _order(name: str) -> tuple[bool, int, str]:
    number = name.removeprefix("-").isdecimal()
    return (not number, int(name) if number else 0, name)
