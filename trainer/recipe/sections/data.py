"""The data: its sources, how a row becomes a sample, and how samples fill a pack."""

from __future__ import annotations

import os
import re
import string
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, ValidationInfo, model_validator

from trainer.recipe.base import MAY_CHANGE, STORED, Conflict, Listed, Location, OneOf, Section
from trainer.recipe.formats import CHAT_TEMPLATES, FORMATS
from trainer.recipe.sections.datasets import DATASETS, filled, is_hub_dataset
from trainer.registry import choose_hint


def checked_template(text: str) -> str:
    """Returns the template; raises ValueError unless str.format can fill it in from columns, at a bounded size."""
    try:
        fields = [(name, spec or "") for _, name, spec, _ in string.Formatter().parse(text) if name is not None]
    except ValueError as error:
        raise ValueError(f"is not a template that str.format takes ({error}); write {{{{ for a brace") from None
    names = [name for name, _ in fields]
    odd = [name for name in names if not name.isidentifier()]
    if odd:
        raise ValueError(f"fills in {{{odd[0]}}}, which names no column; write {{column}}, and {{{{ for a brace")
    if any("{" in spec or re.search(r"\d{5}", spec) for _, spec in fields):
        raise ValueError("pads a column to a width that is computed, or of five digits or more; write a smaller one")
    if not names:
        raise ValueError("names no column, so every prompt would be the same; write {column} where its text belongs")
    return text


class SourceSection(Section):
    """One source of rows: `path` and `format`, or the name of a known `dataset`."""

    # A data set's name replaces path and format.
    model_config = ConfigDict(
        json_schema_extra={"required": [], "anyOf": [{"required": ["path", "format"]}, {"required": ["dataset"]}]}
    )

    dataset: str | None = Field(default=None, json_schema_extra={"enum": [*DATASETS, None]})
    """A known data set, which sets path, format, columns and labels. Settings that are given as well take precedence,
    so that `path` may name a copy of it."""

    path: Location = Field(examples=["s3://corpus/train/*.jsonl"])
    """File, folder or glob, local or any fsspec URL: JSON Lines, a JSON array, CSV, TSV, text or parquet by the suffix,
    each also compressed (`.gz`, `.zst`). `hf://owner/name` or `hf://owner/name/config` (`name@revision` pins it) is
    loaded with the datasets library. A path that matches nothing is an error."""

    format: Annotated[str, OneOf(FORMATS)] = Field(examples=["completion"])
    """How a row becomes a sample. `completion`: tokens(prompt) + tokens(completion) + end of text, with the loss on
    completion and end; `messages`: a conversation through the chat template, with the loss on the assistant's turns
    (`sharegpt`, `openai` and `chatml` are other names of it);
    `instruction`: Alpaca's prompt, and the output as its completion; `qa`: `Question: …\\nAnswer:`, and the first
    answer as its completion; `text`: every token, long texts cut into several samples; `preference`: a chosen and a
    rejected answer; `unpaired_preference`: an answer with a label, whether it is good; `classification`: one text or
    two, and a label."""

    split: str | None = None
    """Split of an `hf://` data set; null is `train`. Required under `eval`."""

    # `as` is a keyword of Python, so that the field cannot be written as the others are.
    __annotations__["as"] = Literal["text", "chat"]
    locals()["as"] = Field(
        default="text",
        description="How an `instruction` is framed: `text` is Alpaca's prompt, `chat` the chat template, with the "
        "columns `system` and `history` as turns before it.",
    )

    train_on: Literal["all", "last"] = "all"
    """The assistant's turns in a conversation that have the loss: all of them, or the last one. A turn with `weight: 0`
    or `train: false` has none."""

    limit: int | None = Field(default=None, ge=1)
    """Number of rows of the source that are used, counted from its first; null uses all."""

    nulls: Literal["empty", "fault"] = "empty"
    """Meaning of a null in a column of `template`: an empty text, with a warning, or a fault of its row."""

    columns: dict[str, str] = Field(default_factory=dict)
    """The file's name for each column that the format reads, if the names differ: `{prompt: question}`. A dot selects a
    key of a mapping: `answer.value`."""

    template: Annotated[str, AfterValidator(checked_template)] | None = None
    """Makes the prompt of a `completion` or `instruction`, or the text of a `classification`, from columns, with
    str.format: `"Question: {question}\\nAnswer: "`."""

    labels: Listed[str] | None = None
    """Names of the labels of a `classification`, in the order of their numbers; a row gives the name or the number.
    null takes the values in the data, for which all rows are read once before the preparation."""

    header: Listed[str] | None = None
    """Column names of CSV or TSV files without a header line; null takes them from the first line."""

    sample_by: Literal["line", "document"] = "line"
    """The samples of a text file (`.txt`): each line, or the complete file as one."""

    weight: float = Field(default=1.0, gt=0.0)
    """Copies of each sample per epoch: 2 feeds every sample twice, 0.5 a random half of them,
    another half in each epoch."""

    loss_weight: float = Field(default=1.0, gt=0.0)
    """Factor of the loss of the source's units: target tokens, samples or pairs, whichever the task's loss is the mean
    over. The loss is still divided by the number of units. Unlike `weight`, it changes no data."""

    @model_validator(mode="before")
    @classmethod
    def _fill_dataset(cls, data: Any) -> Any:
        return filled(data) if isinstance(data, dict) else data

    def conflicts(self) -> Iterator[Conflict]:
        if self.dataset is not None and self.dataset not in DATASETS:
            names, hint = ", ".join(DATASETS), choose_hint(self.dataset, tuple(DATASETS))
            yield Conflict((("dataset",),), f"data set {self.dataset!r} is not one of: {names}{hint}")
        yield from self._wrong_columns()
        if self.style != "text" and not FORMATS[self.format].as_chat:
            yield Conflict((("as",), ("format",)), f"has no effect with format {self.format}; leave it out")
        if self.train_on != "all" and self.format != "messages" and self.style != "chat":
            yield Conflict((("train_on",), ("format",)), f"has no effect with format {self.format}; leave it out")
        if self.nulls != "empty" and self.template is None:
            yield Conflict((("nulls",), ("template",)), "has no effect without a template; leave it out")
        if self.split is not None and not self.is_dataset:
            yield Conflict((("split",), ("path",)), "has no effect on files; name those of the split in path")
        if self.labels is not None and FORMATS[self.format].gives != "label":
            yield Conflict((("labels",), ("format",)), f"has no effect with format {self.format}; leave it out")
        elif self.labels is not None and len(set(self.labels)) < max(len(self.labels), 2):
            yield Conflict((("labels",),), "needs two labels or more, each once")

    @property
    def style(self) -> str:
        """The value of `as`."""
        return str(getattr(self, "as"))

    @property
    def is_dataset(self) -> bool:
        return is_hub_dataset(self.path)

    def _wrong_columns(self) -> Iterator[Conflict]:
        known = FORMATS[self.format].reads(self.style)
        templated = [name for name, row in FORMATS.items() if row.templated]
        if self.template is not None and self.format not in templated:
            allowed = ", ".join(templated)
            message = f"has no effect with format {self.format}; only {allowed} take a template, leave it out"
            yield Conflict((("template",), ("format",)), message)
        elif self.template is None:
            for name in self.columns:
                if name not in known:
                    hint = choose_hint(name, known)
                    message = f"format {self.format} reads no column {name!r}, it reads: {', '.join(known)}{hint}"
                    yield Conflict((("columns", name), ("format",), ("template",)), message)


def _some(sources: tuple[SourceSection, ...]) -> tuple[SourceSection, ...]:
    # Not min_length: pydantic counts valid entries only, so an invalid entry would be reported as missing too.
    if not sources:
        raise ValueError("has no source; add one with path: and format:")
    return sources


def _template(value: str | None, info: ValidationInfo) -> str | None:
    """Refuses a plain word that is neither a shipped template nor a file here; `--inputs` looks at all others."""
    stored = (info.context or {}).get(STORED)  # its file may be on the machine that began the run
    word = value is not None and re.fullmatch(r"[\w-]+(\.\d+)*", value)
    if value is None or stored or not word or value in CHAT_TEMPLATES or os.path.exists(value):
        return value
    names = ", ".join(CHAT_TEMPLATES)
    raise ValueError(
        f"{value!r} is none of muster's chat templates ({names}), and no file{choose_hint(value, CHAT_TEMPLATES)}"
    )


class DataSection(Section):
    """Training and evaluation data, and how it is packed."""

    train: Annotated[Listed[SourceSection], AfterValidator(_some)] = Field(json_schema_extra={"minItems": 1})
    """Sources of training samples, mixed by their weights."""

    eval: Listed[SourceSection] = ()
    """Sources of evaluation samples, each sample used once per evaluation; weights have no effect here."""

    sequence_length: int = Field(default=2048, ge=2)
    """Tokens per pack. A longer sample is cut on the right, or dropped if no target tokens are left; both are
    counted. Activation memory grows in proportion."""

    packing: bool = True
    """Fill each pack with several samples that do not attend to each other; false puts one sample in a pack. Packing
    changes how many samples a step contains, not what the model sees of each."""

    eval_fraction: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of the training rows that is held out for evaluation, 0.01 for one in a hundred. A hash of the row decides,
    so the same rows are held out on every machine and after every resume, and equal rows stay together."""

    ledger: Annotated[bool, MAY_CHANGE] = False
    """Record which samples each rank fed to the model at each step, as JSON Lines under `<run>/ledger/`."""

    max_bad_rows: int = Field(default=0, ge=0)
    """Rows per source that may be unreadable; they are skipped and reported. One more stops the preparation."""

    cache_bytes: Annotated[int, MAY_CHANGE] = Field(default=8 << 30, ge=0)
    """Bytes of prepared data that each host keeps on its own disk, shared by its ranks, so that later epochs and
    attempts need not fetch them again. If the cache is full, the block whose next use is furthest in the future is
    deleted first. The folder is `$MUSTER_CACHE/blocks`, or without that variable one in the temporary folder. A full
    disk is a warning; 0 keeps nothing. Local storage needs no cache."""

    chat_template: Annotated[str | None, AfterValidator(_template)] = None
    """The chat template: the name of one of muster's (`chatml`, `llama3`, `qwen3`, `gemma`, `mistral`, `phi`,
    `deepseek`, `glm`, `alpaca`, `vicuna`), a Jinja template, or the path of a file that holds one; null takes the
    tokenizer's own."""

    special_tokens: Literal["tokens", "text"] = "tokens"
    """Reading of a special token's text in a row, for example `<|im_end|>`: as that token, or as the tokens of its
    letters, so that a row cannot end a turn. The text of the chat template itself is not affected."""

    @property
    def has_chats(self) -> bool:
        """True if the chat template frames the rows of a source."""
        return any(FORMATS[source.format].chats or source.style == "chat" for source in self.train)

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts of the data that there are: ``train``, and ``eval`` with evaluation data."""
        return ("train", "eval") if self.evaluates else ("train",)

    @property
    def evaluates(self) -> bool:
        """True with evaluation data: sources of their own, or held-out rows of the training data."""
        return bool(self.eval or self.eval_fraction)

    @property
    def weights(self) -> tuple[float, ...]:
        return tuple(source.weight for source in self.train)

    def conflicts(self) -> Iterator[Conflict]:
        for part, sources in (("train", self.train), ("eval", self.eval)):
            for index, source in enumerate(sources):
                yield from (conflict.under(part, index) for conflict in source.conflicts())
                unpacked = FORMATS[source.format].unpacked
                if self.packing and unpacked:
                    reason = f"{source.format}, {unpacked}"
                    message = f"cannot be used with format {reason}; write packing: false"
                    yield Conflict((("packing",), (part, index, "format")), message)
        if self.eval_fraction and self.eval:
            message = "cannot be used with eval sources; leave one of them out"
            yield Conflict((("eval_fraction",), ("eval",)), message)
        for index, source in enumerate(self.eval):
            if source.loss_weight != 1.0:
                message = "has no effect on an evaluation, in which every source has the weight 1; leave it out"
                yield Conflict((("eval", index, "loss_weight"),), message)
            if source.is_dataset and source.split is None:
                message = "names no split, and the training split would be taken; add split: test (or validation)"
                yield Conflict((("eval", index, "path"), ("eval", index, "split")), message)
