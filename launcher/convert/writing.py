"""A draft as a recipe's text: sections in the model's order, and above them what was decided and what is missing."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from launcher.convert.draft import Draft
from trainer.recipe.document import Dumper
from trainer.recipe.root import Recipe
from trainer.redact import redact

WIDTH = 110


def written(draft: Draft, source: str, file: Path) -> str:
    ordered = {key: draft.recipe[key] for key in Recipe.model_fields if key in draft.recipe}
    lines = list(_comments(draft, source, file))
    for key, value in ordered.items():
        text = yaml.dump({key: value}, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=10**6)
        lines.append(text.rstrip("\n"))
    return "\n".join(lines) + "\n"


def _comments(draft: Draft, source: str, file: Path) -> Iterator[str]:
    yield from _wrapped(f"From {source}'s {file.name}. It is checked by: muster validate RECIPE", "")
    for text in draft.decisions:
        yield from _wrapped(text, "  ")
    for title, keys in (("May change the result, not carried over:", draft.lost), ("Without bearing:", draft.idle)):
        yield from _listed(title, keys)


def _listed(title: str, keys: Mapping[str, Any]) -> Iterator[str]:
    if keys:
        yield f"# {title}"
    for key, reason in keys.items():
        yield from _wrapped(f"{key}: {reason}", "  ")


def _wrapped(text: str, indent: str) -> list[str]:
    """As comments: whatever a file holds, no line of it becomes YAML, which knows more ends of a line than ``\\n``."""
    text = " ".join("".join(sign if sign.isprintable() else " " for sign in redact(text)).split())
    first, rest = f"# {indent}", f"# {indent}  "
    return textwrap.wrap(text, WIDTH, initial_indent=first, subsequent_indent=rest) or ["#"]
