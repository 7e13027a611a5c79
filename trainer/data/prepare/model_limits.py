"""Reads from a model's files which tokens stop generation, and how many tokens have embeddings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def stop_tokens(tokenizer: Any) -> tuple[int, ...]:
    """Returns the ids of the tokens that stop generation: generation_config.json's, else config.json's."""
    for name in ("generation_config.json", "config.json"):
        found = _read(tokenizer, name).get("eos_token_id")
        ids = found if isinstance(found, list) else [found]
        if stops := sorted({n for n in ids if isinstance(n, int)}):
            return tuple(stops)
    return ()


def vocabulary(tokenizer: Any) -> int | None:
    """Returns the number of the model's embeddings, if the tokenizer has tokens beyond them."""
    config = _read(tokenizer, "config.json")
    size = config.get("vocab_size", (config.get("text_config") or {}).get("vocab_size"))
    if not isinstance(size, int):
        return None
    return size if max(tokenizer.get_vocab().values(), default=0) >= size else None


def _read(tokenizer: Any, name: str) -> dict[str, Any]:
    """Returns a file of the folder that the tokenizer was loaded from; an empty one if there is none."""
    folder = getattr(tokenizer, "name_or_path", "")
    try:
        found = json.loads((Path(folder) / name).read_text()) if folder else {}
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
