"""Made-up rows for every kind of samples that a task may learn from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from .training import PHRASES, write_pairs, write_rows

LABELS = ("bread", "ferry", "hills", "lighthouse")
"""Of `write_texts`, in the order of their numbers."""


def write_texts(path: Path, rows: int) -> None:
    """Texts and pairs of texts of differing lengths; the last word of the first decides the label."""
    lines = [
        {"text": f"{i}: {PHRASES[i % 4]}", "text_pair": "and so on " * (i % 3) or None, "label": LABELS[i % 4]}
        for i in range(rows)
    ]
    write_rows(path, lines)


def write_preferences(path: Path, rows: int) -> None:
    """Prompts with two answers of differing lengths: what is chosen knows the phrase. Some have a margin."""
    lines = [
        {
            "prompt": f"Q{i}: {PHRASES[i % 4].split()[1]}? ",
            "chosen": " ".join(PHRASES[i % 4 : i % 4 + 1 + i % 2]),
            "rejected": f"no idea {i} " * (1 + i % 3),
            **({"margin": 0.5} if i % 3 == 0 else {}),
        }
        for i in range(rows)
    ]
    write_rows(path, lines)


def write_rated(path: Path, rows: int) -> None:
    """Prompts with one answer each: good ones know the phrase."""
    lines = [
        {
            "prompt": f"Q{i}: {PHRASES[i % 4].split()[1]}? ",
            "completion": PHRASES[i % 4] if i % 2 else f"no idea {i} " * (1 + i % 3),
            "label": bool(i % 2),
        }
        for i in range(rows)
    ]
    write_rows(path, lines)


def write_plain(path: Path, rows: int) -> None:
    """Texts of differing lengths."""
    lines = [{"text": " ".join([f"{i}:", *PHRASES[: 1 + i % 4]])} for i in range(rows)]
    write_rows(path, lines)


KINDS: Mapping[str, tuple[str, Callable[[Path, int], None]]] = {
    "prompted": ("completion", write_pairs),
    "text": ("text", write_plain),
    "preference": ("preference", write_preferences),
    "rated": ("unpaired_preference", write_rated),
    "label": ("classification", write_texts),
}
"""For each kind of samples a format of muster's, and the function that writes rows of it."""
