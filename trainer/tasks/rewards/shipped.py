"""Built-in reward functions, which a recipe names as ``trainer.tasks.rewards.shipped:NAME``.

A user's own function has the same signature. It gets three lists of text of the same length as keyword arguments, and
returns a list with as many finite numbers. ``math_answer`` is here too (`trainer.tasks.rewards.math_answers`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from trainer.tasks.rewards import sandbox

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
MARK = "####"
PYTHON_BLOCK = re.compile(r"^```(?:python|py)[ \t]*\n(.*?)^```", re.DOTALL | re.MULTILINE)


def gsm8k(prompts: Sequence[str], completions: Sequence[str], references: Sequence[str]) -> list[float]:
    """Returns 1 for a text whose final number equals that of the reference, 0 for others (Cobbe et al. 2021,
    arXiv:2110.14168). The final number is the first one after ``####``, or the last one of a text without ``####``."""
    return [
        float(final_number(text) is not None and final_number(text) == final_number(reference))
        for text, reference in zip(completions, references, strict=True)
    ]


def final_number(text: str) -> float | None:
    _, mark, after = text.rpartition(MARK)
    found = NUMBER.findall(after)
    if not found:
        return None
    return float((found[0] if mark else found[-1]).replace(",", ""))


def python_tests(prompts: Sequence[str], completions: Sequence[str], references: Sequence[str]) -> list[float]:
    """Returns 1 for a text whose code passes the tests of the reference, 0 for others.

    The code is the last block of the text that begins with ```` ```python ````, or the whole text; the reference is
    code with ``assert`` statements, which runs after it. Each program has 5 seconds of a core, 10 seconds in all, 2 GiB
    of memory, files of 16 MiB and, where the kernel allows a namespace of its own, no network. Its working folder and
    home are a new folder, and its output is discarded.

    The limits (`sandbox`) stop accidents and are no security boundary: the code may read all that this user may
    read."""
    programs = [f"{code_of(text)}\n{reference}" for text, reference in zip(completions, references, strict=True)]
    return [float(passed) for passed in sandbox.run_all(programs)]


def code_of(text: str) -> str:
    blocks: list[str] = PYTHON_BLOCK.findall(text)
    return blocks[-1] if blocks else text


def __getattr__(name: str) -> Any:
    # Its library is optional: so it is missed when the function is loaded, and not at the first call.
    if name != "math_answer":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from trainer.tasks.rewards.math_answers import math_answer

    return math_answer
