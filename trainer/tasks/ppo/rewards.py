"""Built-in reward functions: `ppo.reward.function: trainer.tasks.ppo.rewards:NAME`.

A user's own function has the same signature. It gets three lists of text of the same length as keyword arguments, and
returns a list with as many finite numbers.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
MARK = "####"


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
