"""Writes recipes for their new owner: the choices with their reasons, or a shipped recipe."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from launcher.init.choices import Choice
from trainer.recipe.document import Dumper

COLUMN, WIDTH = 34, 80
"""Where the reasons begin and end. A terminal would continue a longer line in the middle of a word."""
OWN = "my.yaml"


def written(found: Sequence[Choice], model: str, data: str) -> str:
    """Returns the recipe's text."""
    lines = [
        *_comment(f"Written by muster init after a look at {model} and {data}. Saved as {OWN}:"),
        *(f"# muster {command} {OWN}" for command in ("preview", "plan", "run")),
    ]
    section = ""
    for choice in found:
        *above, key = choice.path.split(".")
        if above and above[0] != section:
            lines.append(f"{above[0]}:")
        section = above[0] if above else ""
        indent = "  " if above else ""
        lines += _lines(indent, key, choice)
    return "\n".join(lines) + "\n"


def _lines(indent: str, key: str, choice: Choice) -> list[str]:
    if isinstance(choice.value, list):
        first, *rest = [f"{name}: {_scalar(value)}" for name, value in choice.value[0].items()]
        return [
            *_reasoned(f"{indent}{key}:", choice.why),
            f"{indent}  - {first}",
            *(f"{indent}    {one}" for one in rest),
        ]
    return _reasoned(f"{indent}{key}: {_scalar(choice.value)}", choice.why)


def _reasoned(line: str, why: str) -> list[str]:
    """Returns the line with its reason next to it, and more lines for what does not fit there."""
    lines = _comment(why, " " * COLUMN)
    if not lines or len(line) >= COLUMN:
        return [line, *lines]
    return [line + lines[0][len(line) :], *lines[1:]]


def _comment(text: str, indent: str = "") -> list[str]:
    line = f"{indent}# "
    return textwrap.wrap(
        _one_line(text),
        WIDTH,
        initial_indent=line,
        subsequent_indent=line,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _scalar(value: Any) -> str:
    text = yaml.dump(value, Dumper=Dumper, default_flow_style=True, allow_unicode=True, width=10**6, sort_keys=False)
    return str(text).removesuffix("...\n").strip()


def _one_line(text: str) -> str:
    return "".join(sign if sign.isprintable() else " " for sign in text)


def owned(recipe: Path) -> str:
    """Returns a shipped recipe's text for a file of one's own: without the line that leads an editor to the schema
    next to it, and with the commands for that file."""
    text = recipe.read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if not line.startswith("# yaml-language-server:")]
    return "\n".join(lines).replace(f"recipes/{recipe.name}", OWN) + "\n"
