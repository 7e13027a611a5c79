"""Reads conversations: lists of turns with a role and a content, in the layouts that are usual in data sets.

OpenAI's ``role``, ``content``, ``tool_calls`` and ``tool_call_id``; ShareGPT's ``from`` and ``value`` with its turns
``function_call`` and ``observation``; reasoning in ``reasoning_content``, ``reasoning`` or ``thinking``; contents as
text or as a list of parts of type text.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from trainer.chat_templates.turn import Call, Turn
from trainer.data.sample import RowError
from trainer.parsing import Malformed, parse_json

ROLES = {
    "system": "system",
    "developer": "developer",
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "model", "bot", "ai", "bing", "bard"), "assistant"),
    **dict.fromkeys(("function_call", "tool_call"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "ipython"), "tool"),
    **dict.fromkeys(("function_response", "tool_response"), "tool"),
}
"""The names of roles in data sets, in lower case, and the role that chat templates know."""

CALLING = ("function_call", "tool_call")
"""The roles of ShareGPT whose value is a call: JSON with a name and arguments."""
REASONING = ("reasoning_content", "reasoning", "thinking")
TEXT_PARTS = ("text", "input_text", "output_text")
MEDIA = ("images", "image", "audios", "audio", "videos", "video")
ARGUMENTS = ("arguments", "parameters", "args", "input")
"""The keys under which data sets keep a call's arguments."""
MARKS = ("weight", "train", "loss")
"""Keys that exclude an assistant's turn from the loss if they are 0 or false."""
_READ = {"role", "from", "content", "value", "tool_calls", "function_call", *MARKS, *REASONING}


def turns_of(value: Any, system: Any = None, *, empty: bool = False) -> list[Turn] | RowError:
    """Returns the turns of a conversation, with ``system`` as their first if they begin with no such turn.

    Returns a RowError for anything else than a list of turns, and for a turn whose content is no text. ``empty``: an
    assistant's turn may be empty, as a model may have answered.
    """
    if isinstance(value, RowError):
        return value
    if not isinstance(value, list) or not value:
        return RowError(f"a conversation has to be a list of messages, not {type(value).__name__} ({value!r:.40})")
    turns: list[Turn] = []
    for number, given in enumerate(value, 1):
        turn = turn_of(given, number, empty=empty)
        if isinstance(turn, RowError):
            return RowError(f"message {number} {turn.reason}")
        turns.append(turn)
    if system is not None and not isinstance(system, str):
        return RowError(f"the system text has to be text, not {type(system).__name__} ({system!r:.40})")
    if system and system.strip() and turns[0].role not in ("system", "developer"):
        turns.insert(0, Turn(0, "system", system))
    return _answered(turns)


def turn_of(given: Any, number: int, *, empty: bool = False) -> Turn | RowError:
    """Returns the turn; the reason of a RowError continues a sentence that begins with the message's number."""
    # Parquet stores every key of any turn for all turns.
    turn = without_nothing(given) if isinstance(given, dict) else {}
    if not isinstance(name := turn.get("role", turn.get("from")), str):
        return RowError(f"has to be a mapping with role and content, not {given!r:.60}")
    role = ROLES.get(name.strip().lower())
    if role is None:
        return RowError(f"has the role {name!r}, which is not one of: {', '.join(ROLES)}")
    content = turn.get("content", turn.get("value"))
    if name.strip().lower() in CALLING:
        calls, content = _calls(_listed(content)), ""
    else:
        given_calls = [*_listed(turn.get("tool_calls") or []), *_listed(turn.get("function_call") or [])]
        calls = _calls(given_calls)
    if isinstance(calls, RowError):
        return calls
    reasoning = next((turn[key] for key in REASONING if turn.get(key)), "")
    text = content_of(content)
    for part in (reasoning := content_of(reasoning), text):
        if isinstance(part, RowError):
            return part
    wordless = not (str(text).strip() or reasoning or calls)
    if wordless and (content is None or (role == "assistant" and not empty)):
        return RowError(f"has no content, no reasoning and no calls; its keys: {', '.join(map(ascii, given))}")
    if media := [key for key in MEDIA if turn.get(key)]:
        return RowError(f"has {media[0]}; only text can be trained on")
    marks = [turn[key] for key in MARKS if key in turn]
    if wrong := [mark for mark in marks if mark not in (0, 1)]:
        return RowError(f"has the {' or '.join(MARKS)} {wrong[0]!r}, which has to be 0 or 1 (false or true)")
    more = {key: value for key, value in turn.items() if key not in _READ}
    return Turn(number, role, str(text), str(reasoning), calls, all(marks), more)


def content_of(value: Any) -> str | RowError:
    """Returns a content's text, that of its parts joined; a RowError for a content with anything else than text."""
    if value is None or isinstance(value, str):
        return value or ""
    if not isinstance(value, list):
        return RowError(f"has a content that is no text but {type(value).__name__} ({value!r:.40})")
    texts = []
    for part in value:
        kind = part.get("type", "text" if "text" in part else None) if isinstance(part, dict) else None
        text = part if isinstance(part, str) else part.get("text") if kind in TEXT_PARTS else None
        if not isinstance(text, str):
            what = f"a part of type {kind}" if isinstance(kind, str) else f"the part {part!r:.40}"
            return RowError(f"has a content with {what}; only text can be trained on")
        texts.append(text)
    return "".join(texts)


def _listed(value: Any) -> Any:
    """Returns calls as a list; they may be JSON, and one call may stand alone."""
    if isinstance(value, str):
        try:
            value = parse_json(value, finite=False)
        except Malformed:
            return [value]
    return value if isinstance(value, list) else [value]


def _calls(given: list[Any]) -> tuple[Call, ...] | RowError:
    found = []
    for call in given:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            return RowError(f"has a call that is no mapping with a name and arguments ({call!r:.60})")
        arguments: Any = next((function[key] for key in ARGUMENTS if key in function), {})
        if isinstance(arguments, str):
            try:
                arguments = parse_json(arguments, finite=False) if arguments.strip() else {}
            except Malformed as error:
                return RowError(f"has a call of {function['name']} whose arguments are not valid JSON ({error})")
        found.append(Call(function["name"], arguments, str(call.get("id") or "")))
    return tuple(found)


def _answered(turns: list[Turn]) -> list[Turn]:
    """Returns the turns with ids for the calls without one, and the results with the id and the name of their call."""
    done: list[Turn] = []
    open_calls: list[Call] = []
    count = 0
    for turn in turns:
        if turn.calls:
            calls = tuple(Call(c.name, c.arguments, c.id or f"call{count + i:05d}") for i, c in enumerate(turn.calls))
            count += len(calls)
            open_calls = list(calls)
            turn = replace(turn, calls=calls)
        elif turn.role == "tool" and open_calls:
            named = next((c for c in open_calls if c.id == turn.more.get("tool_call_id")), open_calls[0])
            open_calls.remove(named)
            turn = replace(turn, more={"name": named.name, **turn.more, "tool_call_id": named.id})
        done.append(turn)
    return done


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
    if not isinstance(pruned, list):
        return RowError(f"the tools have to be a list, not {type(value).__name__}")
    tools = [tool for one in pruned for tool in (_listed(one) if isinstance(one, str) else [one])]
    if wrong := [tool for tool in tools if not isinstance(tool, dict)]:
        return RowError(f"a tool has to be a mapping, not {wrong[0]!r:.60}")
    return [{"type": "function", "function": tool} if "name" in tool else tool for tool in tools]
