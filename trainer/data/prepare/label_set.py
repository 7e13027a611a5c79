"""The label set of classification: found once, frozen into the preparation, a label's number being its place in it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any

from trainer.data.formats.columns import column_of
from trainer.data.readers import rows_of
from trainer.data.sample import RowError
from trainer.data.spec import FrozenSource
from trainer.errors import InputError
from trainer.parsing import is_unicode

MOST_LABELS = 10_000
LONGEST_LABEL = 1000


def label_name(value: Any | RowError, names: Sequence[str] | None) -> str | RowError:
    """A label as text; 1, 1.0 and "1" are alike. With ``names``, a value that is none of them is the number of one,
    unless names are numbers themselves."""
    if isinstance(value, RowError):
        return value
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, str | int):
        return RowError(f"a label has to be text or a whole number, not {type(value).__name__} ({value!r:.40})")
    name = str(value).lower() if isinstance(value, bool) else str(value).strip()
    if len(name) > LONGEST_LABEL:
        return RowError(f"a label of {len(name):,} characters ({name!r:.40}…); at most {LONGEST_LABEL} are one")
    if not is_unicode(name):
        return RowError(f"the label {name!r} holds half of a surrogate pair, which is no text")
    if names is None or name in names:
        return name
    if name.isdecimal() and int(name) < len(names) and not any(n.isdecimal() for n in names):
        return names[int(name)]
    return RowError(f"the label {name!r} is neither one of {', '.join(names)} nor the number of one"[:300])


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
