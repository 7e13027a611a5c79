"""The chat templates: a tokenizer's own, and those of muster's that a recipe may name."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def template_of(tokenizer: Any) -> str | None:
    """Returns the tokenizer's chat template; of several, the one that transformers takes without tools."""
    template = tokenizer.chat_template
    return template.get("default") if isinstance(template, dict) else template


def named_template(name: str) -> str:
    """Returns one of `trainer.recipe.formats.CHAT_TEMPLATES`."""
    return (Path(__file__).parent / f"{name}.jinja").read_text()
