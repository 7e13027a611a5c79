"""Data sets that a recipe may name (``dataset: gsm8k``): their path on the Hub, and how their rows are read.

Settings of the recipe take precedence, so that a copy in a folder or a bucket can be read with the same columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class NamedDataset(NamedTuple):
    """A known data set. ``columns``: the format's column to the data set's name for it. ``labels``: in the order of
    their numbers."""

    path: str
    format: str
    columns: Mapping[str, str] = {}
    labels: tuple[str, ...] | None = None


_QA = {"question": "question", "answer": "answer"}
_UNKNOWN = NamedDataset("hf://unknown/unknown", "text")

DATASETS: dict[str, NamedDataset] = {
    "alpaca": NamedDataset(
        "hf://tatsu-lab/alpaca",
        "instruction",
        {"instruction": "instruction", "input": "input", "output": "output"},
    ),
    "code_feedback": NamedDataset("hf://m-a-p/Code-Feedback", "messages", {"messages": "messages"}),
    "glue/mrpc": NamedDataset(
        "hf://nyu-mll/glue/mrpc",
        "classification",
        {"text": "sentence1", "text_pair": "sentence2", "label": "label"},
        ("not_equivalent", "equivalent"),
    ),
    "glue/qqp": NamedDataset(
        "hf://nyu-mll/glue/qqp",
        "classification",
        {"text": "question1", "text_pair": "question2", "label": "label"},
        ("not_duplicate", "duplicate"),
    ),
    "glue/sst2": NamedDataset(
        "hf://nyu-mll/glue/sst2",
        "classification",
        {"text": "sentence", "label": "label"},
        ("negative", "positive"),
    ),
    "gsm8k": NamedDataset("hf://openai/gsm8k/main", "qa", _QA),
    "imdb": NamedDataset("hf://stanfordnlp/imdb", "classification", {"text": "text", "label": "label"}, ("neg", "pos")),
    "metamath_qa": NamedDataset(
        "hf://meta-math/MetaMathQA", "instruction", {"instruction": "query", "output": "response"}
    ),
    "nq_open": NamedDataset("hf://google-research-datasets/nq_open", "qa", _QA),
    "trivia_qa": NamedDataset(
        "hf://mandarjoshi/trivia_qa/rc.nocontext",
        "qa",
        {"question": "question", "answer": "answer.value", "aliases": "answer.aliases"},
    ),
}


def is_hub_dataset(path: str) -> bool:
    """Returns true if the `datasets` library loads the path, which then has splits and slices of them."""
    # ``hf://datasets/…`` names files on the Hub, which fsspec reads.
    return path.startswith("hf://") and not path.startswith("hf://datasets/")


def filled(source: dict[str, Any]) -> dict[str, Any]:
    """Returns a source with the settings of its ``dataset`` filled in; settings that the source gives itself stay.

    An unknown name gets a placeholder path and format, so that the name is the only mistake that is reported.
    """
    name = source.get("dataset")
    if not isinstance(name, str):
        return source
    named = DATASETS.get(name, _UNKNOWN)
    given = {"path": named.path, "format": named.format} | source
    if given["format"] != named.format:
        return given
    own = given.get("columns")
    columns = dict(named.columns) | own if isinstance(own, dict) else own
    given["columns"] = dict(named.columns) if own is None else columns
    if given.get("labels") is None and named.labels is not None:
        given["labels"] = list(named.labels)
    return given
