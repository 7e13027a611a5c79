"""Writes a draft as a recipe: comments on what was decided and what is missing, then the sections in order."""

from __future__ import annotations

import textwrap
from pathlib import Path

import yaml

from launcher.convert.draft import Draft
from trainer.recipe.document import Dumper
from trainer.recipe.root import Recipe
from trainer.redact import redact

WIDTH = 110


def written(draft: Draft, source: str, file: Path) -> str:
    ordered = {key: draft.recipe[key] for key in Recipe.model_fields if key in draft.recipe}
    lines = _comment(f"From {source}'s {file.name}. It is checked by: muster validate RECIPE", "")
    for text in (*draft.decisions, *(f"{key}: {reason}" for key, reason in draft.decided.items())):
        lines += _comment(text, "  ")
    for title, keys in (("May change the result, not carried over:", draft.lost), ("No effect:", draft.idle)):
        if keys:
            lines.append(f"# {title}")
        for key, reason in keys.items():
            lines += _comment(f"{key}: {reason}", "  ")
    for key, value in ordered.items():
        text = yaml.dump({key: value}, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=10**6)
        lines.append(text.rstrip("\n"))
    return "\n".join(lines) + "\n"


def _comment(text: str, indent: str) -> list[str]:
    # The text comes from the user's file and must stay a comment. YAML knows more line breaks than "\n", so every
    # character that is not printable becomes a space.
    text = " ".join("".join(sign if sign.isprintable() else " " for sign in redact(text)).split())
    first, rest = f"# {indent}", f"# {indent}  "
    return textwrap.wrap(text, WIDTH, initial_indent=first, subsequent_indent=rest) or ["#"]
