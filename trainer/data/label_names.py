"""The names of labels: text and whole numbers of rows, as one form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trainer.data.sample import RowError
from trainer.parsing import is_unicode

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
