"""The label set of classification: found once, frozen into the preparation, a label's number being its place in it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

from trainer.data.formats.columns import column_of
from trainer.data.label_names import label_name
from trainer.data.readers import rows_of
from trainer.data.sample import RowError
from trainer.data.spec import FrozenSource
from trainer.errors import InputError

MOST_LABELS = 10_000


def label_set(sources: Sequence[FrozenSource]) -> tuple[str, ...]:
    """The labels of all classification sources, in the sources' order: as the recipe names them, or those that the rows
    have, numbers by size and names by the alphabet. InputError for fewer than two, and for what can be none."""
    chosen = [s for s in sources if s.format == "classification"]
    labels = tuple(dict.fromkeys(label for source in chosen for label in source.labels or _found(source)))
    if chosen and len(labels) < 2:
        raise InputError(f"data source {chosen[0].path}: {len(labels)} labels are not enough to tell apart: {labels}")
    return labels


def _found(source: FrozenSource) -> list[str]:
    """Reads every row of the source. Bad ones are left for the preparation to report."""
    column = source.columns.get("label", "label")
    names: set[str] = set()
    for row in rows_of(source):
        name = row if isinstance(row, RowError) else label_name(column_of(row, column, "label"), None)
        if isinstance(name, str):
            names.add(name)
        if len(names) > MOST_LABELS:
            raise InputError(
                f"data source {source.path}: the column {column!r} has more than {MOST_LABELS} different values, "
                f"such as {', '.join(islice(names, 3))!r:.100}; map the one with the labels by columns: {{label: NAME}}"
            )
    return sorted(names, key=_order)


def _order(name: str) -> tuple[bool, int, str]:
    number = name.removeprefix("-").isdecimal()
    return (not number, int(name) if number else 0, name)
