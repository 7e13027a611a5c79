"""Generation of answers for a file of prompts: JSON Lines in, JSON Lines out, in the same order."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from trainer.artifacts.chat import CHAT, Conversation, Prompt, rendered
from trainer.artifacts.generate import Generator
from trainer.data.formats.columns import encodable
from trainer.data.sample import ROW_BYTES, TOO_LONG, RowError
from trainer.errors import InputError, UsageError
from trainer.parsing import JsonReader, Malformed

STDIO = "-"
AT_ONCE = 256
"""Rows whose answers are written together; of these, the longest are answered first."""

Done = Callable[[int, int], None]
"""Takes the number of rows answered so far, and the number of all rows."""


def answer_file(
    writer: Generator,
    talk: Conversation,
    source: str,
    target: str,
    max_new_tokens: int,
    stdout: TextIO | None = None,
    done: Done = lambda done, of: None,
) -> None:
    """Writes an answer for each line of ``source`` to ``target``. A line contains a ``prompt``, which is formatted with
    ``talk``'s frame, or the ``messages`` of a chat; its line in ``target`` repeats it and adds the ``completion``.

    Raises InputError for a line with neither, before anything is written."""
    rows = list(_rows(source))
    # Messages are a chat whatever frame a prompt gets, and their answers end as those of a chat.
    chat = talk if talk.frame == CHAT else Conversation(talk.tokenizer, CHAT)
    asked = [_asked(row, number, talk, chat) for number, row in enumerate(rows, 1)]
    answered = 0

    def more(count: int) -> None:
        nonlocal answered
        answered += count
        done(answered, len(rows))

    with _opened(target, stdout) as file:
        for start in range(0, len(rows), AT_ONCE):
            numbers, texts = range(start, min(start + AT_ONCE, len(rows))), dict[int, str]()
            for one in {id(each): each for each in (talk, chat)}.values():
                mine = [n for n in numbers if asked[n][0] is one]
                written = writer.answers([asked[n][1] for n in mine], max_new_tokens, one.ended, more)
                texts.update(zip(mine, map(one.shown, written), strict=True))
            for n in numbers:
                given = {name: rows[n][name] for name in ("prompt", "messages") if name in rows[n]}
                file.write(json.dumps({**given, "completion": texts[n]}, ensure_ascii=False) + "\n")
            file.flush()


def _rows(source: str) -> Iterator[dict[str, Any]]:
    reader = JsonReader(finite=False)
    for number, line in enumerate(_lines(source), 1):
        if len(line) > ROW_BYTES:
            raise InputError(f"--input {source}, line {number} is {TOO_LONG}")
        if not line.strip():
            continue
        try:
            row = reader.read(line)
        except Malformed as error:
            raise InputError(f"--input {source}, line {number} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise InputError(f'--input {source}, line {number} is no object: write {{"prompt": …}}')
        yield row


def _lines(source: str) -> Iterator[bytes]:
    """Yields the lines of a file. Reads at most one byte more than a row may have, to detect longer ones."""
    try:
        with sys.stdin.buffer if source == STDIO else open(source, "rb") as file:
            while line := file.readline(ROW_BYTES + 1):
                yield line
    except (OSError, ValueError) as error:
        raise InputError(f"--input {source} cannot be read: {error}") from error


def _asked(row: dict[str, Any], number: int, talk: Conversation, chat: Conversation) -> tuple[Conversation, Prompt]:
    prompt, messages = row.get("prompt"), row.get("messages")
    if isinstance(prompt, str):
        text = encodable(prompt)
        if isinstance(text, RowError):
            raise InputError(f"row {number} of --input: {text.reason}")
        talk.clear()
        return talk, talk.ask(text)
    if isinstance(messages, list) and messages and all(isinstance(turn, dict) for turn in messages):
        return chat, rendered(chat.chat, messages)
    raise InputError(
        f"row {number} of --input has neither a prompt (text) nor messages (a list of objects): {str(row)[:80]}"
    )


@contextmanager
def _opened(target: str, stdout: TextIO | None) -> Iterator[TextIO]:
    if target == STDIO:
        yield stdout or sys.stdout
        return
    try:
        file = open(target, "w", encoding="utf-8")  # noqa: SIM115 - closed below
    except OSError as error:
        raise UsageError(f"--output {target} cannot be written: {error.strerror}") from error
    with file:
        yield file
