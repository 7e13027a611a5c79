"""A turn of a conversation, before a chat template renders it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Call:
    """A call of a tool. ``arguments`` is usually a mapping. ``id``: 9 letters or digits where the row has none."""

    name: str
    arguments: Any
    id: str


@dataclass(frozen=True)
class Turn:
    """A turn. ``number``: its place in the row's conversation, from 1; 0 for a system text from a column of its own.
    ``trained``: the row does not exclude it from the loss. ``more``: the turn's other keys, which a template may
    read."""

    number: int
    role: str
    content: str
    reasoning: str = ""
    calls: tuple[Call, ...] = ()
    trained: bool = True
    more: dict[str, Any] = field(default_factory=dict)
