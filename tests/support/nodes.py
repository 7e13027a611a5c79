"""Nodes of a cluster that is played."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from launcher.capacity import Node


def node(number: int, total: Mapping[str, float], free: Mapping[str, float] | None = None, **changes: Any) -> Node:
    """The node ``h<number>`` with ``total`` resources, all of them free unless ``free`` says otherwise."""
    values: dict[str, Any] = {"alive": True, "free": total if free is None else free, **changes}
    return Node(f"n{number}", f"h{number}", f"10.0.0.{number}", total=total, **values)


def nodes(*totals: Mapping[str, float]) -> list[Node]:
    return [node(number, total) for number, total in enumerate(totals)]
