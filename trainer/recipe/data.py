"""The data: sources, how a row becomes a sample, and how samples fill a pack."""

from __future__ import annotations

import string
from collections.abc import Iterator
from typing import Annotated

from pydantic import AfterValidator, Field

from trainer.recipe.base import Conflict, Listed, Location, OneOf, Section
from trainer.registry import FORMATS, choose_hint

COLUMNS: dict[str, tuple[str, ...]] = {
    "completion": ("prompt", "completion"),
    "messages": ("messages",),
}
"""The columns that each format reads; `columns` maps these names to those of the file."""

TEMPLATED = ("completion",)
"""Formats whose prompt a `template` may render."""


def _template(text: str) -> str:
    try:
        names = [name for _, name, _, _ in string.Formatter().parse(text) if name is not None]
    except ValueError as error:
        raise ValueError(f"is not a template that str.format takes ({error}); write {{{{ for a brace") from None
    odd = [name for name in names if not name.isidentifier()]
    if odd:
        raise ValueError(f"fills in {{{odd[0]}}}, which names no column; write {{column}}, and {{{{ for a brace")
    if not names:
        raise ValueError("names no column, so every prompt would be the same; write {column} where its text belongs")
    return text


class SourceSection(Section):
    """One source of rows."""

    path: Location = Field(examples=["s3://corpus/train/*.jsonl"])
    """File, folder or glob of JSON Lines or parquet, local or any fsspec URL. One that matches nothing is an error."""

    format: Annotated[str, OneOf(FORMATS)] = Field(examples=["completion"])
    """How a row becomes a sample. `completion`: tokens(prompt) + tokens(completion) + end of text, with the loss on
    completion and end; `messages`: a conversation through the chat template, with the loss on the assistant's turns."""

    columns: dict[str, str] = Field(default_factory=dict)
    """The file's name for each column that the format reads, where they differ: `{prompt: question}`."""

    template: Annotated[str, AfterValidator(_template)] | None = None
    """Makes the prompt of a `completion` out of columns, by str.format: `"Question: {question}\\nAnswer: "`."""

    weight: float = Field(default=1.0, gt=0.0)
    """Copies of each sample per epoch: 2 feeds every sample twice, 0.5 a random half of them,
    another half in each epoch."""

    def conflicts(self) -> Iterator[Conflict]:
        known = COLUMNS.get(self.format, ())
        if self.template is not None and self.format not in TEMPLATED:
            allowed = " and ".join(TEMPLATED)
            message = f"has no effect with format {self.format}; only {allowed} takes a template, leave it out"
            yield Conflict((("template",), ("format",)), message)
        elif self.template is None:
            for name in self.columns:
                if name not in known:
                    hint = choose_hint(name, known)
                    message = f"format {self.format} reads no column {name!r}, it reads: {', '.join(known)}{hint}"
                    yield Conflict((("columns", name), ("format",), ("template",)), message)


def _some(sources: tuple[SourceSection, ...]) -> tuple[SourceSection, ...]:
    # Not min_length: pydantic counts valid entries, so that a bad one would be reported as a missing one too.
    if not sources:
        raise ValueError("has no source; add one with path: and format:")
    return sources


class DataSection(Section):
    """Training and evaluation data, and how it is packed."""

    train: Annotated[Listed[SourceSection], AfterValidator(_some)] = Field(json_schema_extra={"minItems": 1})
    """Sources of training samples, mixed by their weights."""

    eval: Listed[SourceSection] = ()
    """Sources of evaluation samples, each fed once per evaluation; weights are without effect here."""

    sequence_length: int = Field(default=2048, ge=2)
    """Tokens per pack. A longer sample is cut on the right, or dropped when nothing to predict is left; both are
    counted. Activation memory grows in proportion."""

    packing: bool = True
    """Fill each pack with several samples that do not see each other; false puts one sample in a pack. Packing changes
    how many samples a step holds, not what the model sees of each."""

    ledger: bool = False
    """Write down which samples each rank fed to the model at each step, as JSON Lines under `<run>/ledger/`."""

    max_bad_rows: int = Field(default=0, ge=0)
    """Rows per source that may be unreadable; they are skipped and reported. One more ends the preparation."""

    cache_bytes: int = Field(default=8 << 30, ge=0)
    """Bytes of prepared data that each host keeps on its own disk, shared by its ranks, so that later epochs and
    attempts need not fetch them again; what the plan uses latest makes room. They lie under `$MUSTER_CACHE/blocks`, or
    else in the temporary folder; a full disk is a warning, and 0 keeps nothing. Local storage needs no cache."""

    chat_template: str | None = None
    """Jinja template for `messages`, or the path of a file that holds one; null takes the tokenizer's own."""

    def conflicts(self) -> Iterator[Conflict]:
        for part, sources in (("train", self.train), ("eval", self.eval)):
            for index, source in enumerate(sources):
                yield from (conflict.under(part, index) for conflict in source.conflicts())
