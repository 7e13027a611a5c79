"""The shipped reward ``math_answer``, by the library math-verify."""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from typing import Any

from trainer.errors import InputError

try:
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify
except ImportError as error:
    raise InputError(
        f'needs math-verify, which cannot be imported ({error}): pip install "math-verify[antlr4_13_2]"'
    ) from error

TIMEOUT_S = 2
"""Seconds for reading an answer, and for comparing two. The library takes whole seconds."""
MARKED = re.compile(r"\\boxed|\$|\\\(|\\\[")
SENTENCE = re.compile(r"(?<![\\{A-Za-z])(?:[A-Za-z]{4,}|[A-Za-z]{2,}\s+[A-Za-z]{2,})")
EXTRACTED = (LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig())
SHOWN = 200


def math_answer(prompts: Sequence[str], completions: Sequence[str], references: Sequence[str]) -> list[float]:
    """Returns 1 for a text whose answer equals that of the reference as mathematics, 0 for others.

    The answer is in ``\\boxed{}`` or between ``$``; a text without these may be plain LaTeX, a number, or a sentence
    with a number. An answer that takes longer than 2 seconds to read or to compare counts as wrong."""
    # The library keeps its time by signals, which only the main thread gets.
    timeout_s = TIMEOUT_S if threading.current_thread() is threading.main_thread() else None
    read = {text: _read(text, timeout_s) for text in {*completions, *references}}
    for reference in {reference for reference in references if not read[reference]}:
        print(f"math_answer: the reference {reference[:SHOWN]!r} has no answer that can be read; its texts get 0")
    return [
        float(bool(read[reference]) and verify(read[reference], read[text], timeout_seconds=timeout_s))
        for text, reference in zip(completions, references, strict=True)
    ]


def _read(text: str, timeout_s: int | None) -> list[Any]:
    """Returns the answer as math-verify has it, empty for none. Plain LaTeX is read as if it stood between ``$``."""
    if MARKED.search(text):
        forms = [text]
    elif SENTENCE.search(text):
        forms = [text, f"${text}$"]
    else:
        forms = [f"${text}$", text]
    found = (parse(form, EXTRACTED, parsing_timeout=timeout_s) for form in forms)
    return next((answer for answer in found if answer), [])
