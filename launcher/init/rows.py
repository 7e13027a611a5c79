"""A look at the first rows of a data file: their columns, the format that reads them, and their lengths."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from trainer.data.prepare.freeze import freeze
from trainer.data.readers import rows_of
from trainer.data.sample import Row, RowError
from trainer.errors import InputError
from trainer.recipe.formats import FORMATS
from trainer.recipe.sections.data import SourceSection

ROWS = 2000
MESSAGES = ("messages", "conversations", "conversation")
TURN_KEYS = ({"role", "content"}, {"from", "value"})
QUESTIONS = ("prompt", "instruction", "question", "query", "input", "problem", "user")
ANSWERS = ("completion", "output", "response", "answer", "solution", "target", "assistant", "reply")
LABELLED = ("text", "sentence", "sentence1", "text1", "question1", "review", "premise", "content")
PARTNERS = ("text_pair", "sentence2", "text2", "question2", "hypothesis")
LABELS = ("label", "labels", "category", "class")
HINT = (
    "a conversation under messages; prompt and completion, with a label that is true or false where answers are rated; "
    "question and answer; instruction and output; prompt, chosen and rejected; text and label; or text"
)


@dataclass(frozen=True)
class Rows:
    """``format``: the name of the recipe's format. ``columns``: its columns by the file's names. ``pair``: a question
    and its answer, which the chat template can frame. ``rows``: how many there are, about so many if not ``exact``.
    ``texts``: the text of one sample of each row that was read."""

    path: str
    format: str
    columns: Mapping[str, str] = field(default_factory=dict)
    pair: bool = False
    rows: int = 0
    exact: bool = True
    texts: tuple[str, ...] = ()


def look(path: str) -> Rows:
    """Raises InputError when there are no rows at the path, or none that a format reads."""
    frozen = freeze([SourceSection.model_validate({"path": path, "format": "text"})])[0]
    read: list[Row] = []
    for number, row in enumerate(islice(rows_of(frozen), ROWS)):
        if isinstance(row, RowError):
            raise InputError(f"{path}: row {number} cannot be read: {row.reason}")
        read.append(row)
    if not read:
        raise InputError(f"{path} holds no rows")
    kind, columns = format_of(read[0])
    if kind is None:
        raise InputError(f"{path}: no format reads the columns {', '.join(sorted(read[0]))}; rows may have {HINT}")
    names = {columns.get(name, name) for name in FORMATS[kind].columns} - {"rejected"} | set(MESSAGES)
    texts = tuple("\n".join(_strings([row[name] for name in row if name in names])) for row in read)
    rows, exact = len(read), len(read) < ROWS
    if not exact and not frozen.is_hub:
        size = sum(len(json.dumps(row, ensure_ascii=False).encode()) for row in read)
        estimate = sum(one.size for one in frozen.objects) / size * len(read)
        rows = max(rows, int(float(f"{estimate:.2g}")))
    pair = kind in ("instruction", "qa") or (kind == "completion" and bool(columns))
    return Rows(path, kind, columns, pair, rows, exact, texts)


def format_of(row: Mapping[str, Any]) -> tuple[str | None, dict[str, str]]:
    """Returns the format that reads such rows, with the columns that have other names; None if no format does."""
    talks = [name for name in (*MESSAGES, *row) if _is_talk(row.get(name))]
    first, second = (next((n for n in names if n in row), "") for names in (QUESTIONS, ANSWERS))
    text, label = (next((n for n in names if n in row), "") for names in (LABELLED, LABELS))
    if "chosen" in row and "rejected" in row:
        return "preference", {} if "prompt" in row or not first else {"prompt": first}
    if isinstance(row.get(label), bool) and (talks or (first and second)):
        answer = {"prompt": first, "completion": second} if first and second else {"completion": talks[0]}
        return "unpaired_preference", _renamed(**answer, label=label)
    if talks:
        return "messages", {} if talks[0] in MESSAGES else {"messages": talks[0]}
    if "instruction" in row and second:
        return "instruction", {} if second == "output" else {"output": second}
    if "question" in row and "answer" in row:
        return "qa", {}
    if first and second:
        return "completion", _renamed(prompt=first, completion=second)
    if text and label:
        partner = next((name for name in PARTNERS if name in row), None)
        return "classification", _renamed(text=text, label=label, **({"text_pair": partner} if partner else {}))
    if text and isinstance(row[text], str):
        return "text", _renamed(text=text)
    return None, {}


def _renamed(**columns: str) -> dict[str, str]:
    return {ours: theirs for ours, theirs in columns.items() if ours != theirs}


def _is_talk(value: Any) -> bool:
    if not isinstance(value, list) or not value:
        return False
    return all(isinstance(turn, dict) and any(keys <= turn.keys() for keys in TURN_KEYS) for turn in value)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _strings(part)
