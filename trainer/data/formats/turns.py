"""Reads conversations: lists of turns with a role and a content, in the layouts that are usual in data sets."""

from __future__ import annotations

from typing import Any

from trainer.data.sample import RowError
from trainer.parsing import Malformed, parse_json

Turn = dict[str, Any]

ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function_response": "tool",
}
"""ShareGPT's names of the roles, with ours. Other names are kept."""


def turns_of(value: Any) -> list[Turn] | RowError:
    """Returns the turns of a conversation: a list of mappings with a role, or with ShareGPT's ``from`` and ``value``.

    Returns a RowError for anything else. Keys whose value is None are removed, at any depth.
    """
    if isinstance(value, RowError):
        return value
    if not isinstance(value, list) or not value:
        return RowError(f"a conversation has to be a list of messages, not {type(value).__name__} ({value!r:.40})")
    turns = [turn_of(turn) for turn in value]
    for i, turn in enumerate(turns):
        if turn is None:
            return RowError(f"message {i + 1} has to be a mapping with role and content, not {value[i]!r:.60}")
    return [turn for turn in turns if turn is not None]


def turn_of(turn: Any) -> Turn | None:
    if not isinstance(turn, dict):
        return None
    if "role" not in turn and isinstance(turn.get("from"), str):
        rest = {k: v for k, v in turn.items() if k not in ("from", "value")}
        turn = {"role": ROLES.get(turn["from"], turn["from"]), "content": turn.get("value"), **rest}
    if not isinstance(turn.get("role"), str):
        return None
    # Parquet stores every key of any turn for all turns.
    pruned: Turn = without_nothing(turn)
    return pruned


def without_nothing(value: Any) -> Any:
    """Returns the value without the keys, at any depth, whose value is None."""
    if isinstance(value, dict):
        return {k: without_nothing(v) for k, v in value.items() if v is not None}
    return [without_nothing(v) for v in value] if isinstance(value, list) else value


def tools_of(value: Any) -> list[Any] | RowError | None:
    """Returns the tools that a conversation may call, from a list or its JSON; None without any."""
    if isinstance(value, str) and value.strip():
        try:
            value = parse_json(value, finite=False)
        except Malformed as error:
            return RowError(f"the tools are not valid JSON ({error})")
    if value is None or value == "" or value == []:
        return None
    if isinstance(value, RowError):
        return value
    pruned = without_nothing(value)
    return pruned if isinstance(pruned, list) else RowError(f"the tools have to be a list, not {type(value).__name__}")
