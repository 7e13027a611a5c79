"""The specification of prepared data: frozen inputs, tokenizer, template, lengths. Its hash names the prepared data."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from trainer.records import Count, read_record

FORMAT_VERSION = 2
"""Increased whenever a change of the code prepares the same inputs into other tokens or another layout."""

ORDER_VERSION = 1
"""Increased whenever a change of the code puts the same data into another order."""

_PROBE = "A probe: 12 résumés, 3.5 % of \n\tthem naïve."


_LATER: dict[str, Any] = {
    "header": None,
    "sample_by": "line",
    "labels": None,
    "style": "text",
    "train_on": "all",
    "limit": None,
    "nulls": "empty",
    "eval_fraction": 0.0,
    "part": "train",
    "code": "",
}
_LATER_SPEC: dict[str, Any] = {
    "labels": (),
    "stops": (),
    "vocabulary": None,
    "date": None,
    "special_tokens": "tokens",
}
"""Settings of a source, and of `PreparationSpec`, with their defaults. They were added later and are written only when
they differ from these, so that older fingerprints stay valid."""


class FrozenObject(NamedTuple):
    """An input object as it was when the run started. ``etag`` changes whenever its bytes change; ``size`` is in bytes,
    for a Hub dataset in rows."""

    url: str
    size: Count
    etag: str


@dataclass(frozen=True)
class FrozenSource:
    """A source of the recipe with its resolved objects. Its weight is not included: no token depends on it.

    ``header`` names the columns of CSV and TSV files without a header line. ``sample_by`` is the unit of a text file
    that makes a sample. ``labels`` are the names of a classification source's labels. ``style``, ``train_on``,
    ``limit``, ``nulls``: as the recipe's source has them. ``eval_fraction``, ``part``: the share of rows that is held
    out, and which part of the rows this is. ``code``: of a plug-in's format, the hash of its file.
    """

    path: str
    format: str
    objects: tuple[FrozenObject, ...]
    columns: Mapping[str, str] = field(default_factory=dict)
    template: str | None = None
    header: tuple[str, ...] | None = None
    sample_by: str = "line"
    labels: tuple[str, ...] | None = None
    style: str = "text"
    train_on: str = "all"
    limit: Count | None = None
    nulls: str = "empty"
    eval_fraction: float = 0.0
    part: str = "train"
    code: str = ""

    @property
    def is_hub(self) -> bool:
        """True for a source that the `datasets` library reads."""
        # hf://datasets/… names files on the Hub, which fsspec reads.
        return self.path.startswith("hf://") and not self.path.startswith("hf://datasets/")

    def to_json(self) -> dict[str, Any]:
        data = dataclasses.asdict(self)
        return {name: value for name, value in data.items() if name not in _LATER or value != _LATER[name]}


@dataclass(frozen=True)
class PreparationSpec:
    """Everything that the prepared tokens depend on. ``chat_template`` is the template's text, None for the tokenizer's
    own. ``labels`` is the label set of classification; a label's number is its index there. ``stops``: the tokens that
    stop generation, as the model's files name them. ``vocabulary``: the number of its embeddings, where the tokenizer
    has tokens beyond them. ``date``: that which the chat template writes, in ISO format, if it writes one.
    ``special_tokens``: how texts that hold them are tokenised."""

    sources: tuple[FrozenSource, ...]
    tokenizer: str
    sequence_length: Count
    packing: bool = True
    task: str = "sft"
    chat_template: str | None = None
    max_bad_rows: Count = 0
    version: Count = FORMAT_VERSION
    labels: tuple[str, ...] = ()
    stops: tuple[Count, ...] = ()
    vocabulary: Count | None = None
    date: str | None = None
    special_tokens: str = "tokens"

    def to_json(self) -> dict[str, Any]:
        data = dataclasses.asdict(self) | {"sources": [s.to_json() for s in self.sources]}
        return {name: value for name, value in data.items() if name not in _LATER_SPEC or value != _LATER_SPEC[name]}

    @classmethod
    def from_json(cls, data: Any) -> PreparationSpec:
        """Raises Malformed for anything else than a specification, and for settings that this version does not know."""
        # An unknown setting must not be ignored: the data would be prepared without it.
        return read_record(cls, data, exact=True)

    @cached_property
    def fingerprint(self) -> str:
        """The first 32 hex digits of the sha256 of the canonical JSON."""
        return _hash_json(self.to_json())[:32]

    @cached_property
    def order_key(self) -> str:
        """Seeds every permutation. It depends on the sizes of the inputs but on no URL or ETag, so that a copy of the
        same data elsewhere is trained on in the same order."""
        sizes = [[o.size for o in s.objects] for s in self.sources]
        return _hash_json([ORDER_VERSION, sizes])[:32]


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Returns a hash (sha256, first 32 hex digits) of everything that a tokenizer's output depends on, with its chat
    template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        rules: Any = sorted(tokenizer.get_vocab().items())
    else:
        rules = json.loads(backend.to_str())
        # State of the tokenizer's last call; preparation neither truncates nor pads with the tokenizer.
        rules.pop("truncation", None)
        rules.pop("padding", None)
    probe = tokenizer(_PROBE)["input_ids"]
    return _hash_json([rules, probe, tokenizer.eos_token_id, tokenizer.chat_template])[:32]


def _hash_json(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()
