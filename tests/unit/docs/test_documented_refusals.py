"""docs/methods.md lists what a method does not work with: exactly what the recipe's matrix refuses."""

from __future__ import annotations

import re
from pathlib import Path

from trainer.recipe.matrix import refusals, sides_of, values_of

PAGE = Path(__file__).resolve().parents[3] / "docs" / "methods.md"
NO_CELL = {("adalora", "float16")}
"""Refused by a rule of its own: the matrix has no side for the type."""


def listed() -> set[tuple[str, str]]:
    """Each method with each thing that a row says it does not go with."""
    (body,) = re.findall(r"^## What does not work\n(.*?)^## ", PAGE.read_text(), flags=re.S | re.M)
    rows = [line.split("|")[1:3] for line in body.splitlines() if line.startswith("| `")]
    return {
        (method, other.strip())
        for methods, others in rows
        for method in re.findall(r"`(\w+)`", methods)
        for other in others.split(",")
    }


def test_the_page_lists_what_is_refused() -> None:
    refused = {
        (method, other)
        for one in refusals()
        for method in (values_of(one, "method") if one.method else ())
        for side in sides_of(one)
        if side != "method"
        for other in values_of(one, side)
    }
    assert listed() == refused | NO_CELL
