"""Data formats: each converts rows to tokens and targets. Each has a file, and an entry in
``trainer.recipe.formats.FORMATS``."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, cast

from trainer.data.sample import Row, RowError, Sample
from trainer.data.spec import FrozenSource, PreparationSpec
from trainer.errors import InputError
from trainer.recipe.formats import FORMATS


class Format(Protocol):
    """A data format, built once per source. ``encode`` returns a sample, several, or a RowError per row, in the rows'
    order.

    Formats neither truncate samples nor check for targets; only labelled samples are truncated here. The constructor
    raises InputError if the tokenizer lacks something that the format needs.
    """

    def __init__(self, source: FrozenSource, tokenizer: Any, spec: PreparationSpec) -> None: ...

    def encode(self, rows: Sequence[Row]) -> Sequence[Sample | list[Sample] | RowError]: ...


def open_format(source: FrozenSource, tokenizer: Any, spec: PreparationSpec) -> Format:
    """Raises InputError for a plug-in's format whose code has changed since the source was frozen."""
    kind = cast("type[Format]", FORMATS.load(source.format))
    if source.code != plugin_code(source.format):
        raise InputError(
            f"the code of format {source.format} has changed since this run was started, and its prepared data is not "
            "complete; install the version that the run was started with, or start a run under another name"
        )
    return kind(source, tokenizer, spec)


def plugin_code(format: str) -> str:
    """Returns a hash (sha256, first 16 hex digits) of the file of a plug-in's format, which decides the tokens; empty
    for muster's own formats, whose changes increase `trainer.data.spec.FORMAT_VERSION`."""
    if FORMATS.is_own(format) or FORMATS.is_held(format):
        return ""
    found = importlib.util.find_spec(FORMATS[format].code.partition(":")[0])
    if found is None or not found.has_location or found.origin is None:
        return ""
    return hashlib.sha256(Path(found.origin).read_bytes()).hexdigest()[:16]
