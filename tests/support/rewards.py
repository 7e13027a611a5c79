"""Reward functions of the tests. The processes that call them import nothing else."""

from __future__ import annotations

import json
import os
from pathlib import Path

CALLS = "REWARD_CALLS"
"""The environment variable that names the file for the calls of `length` and `declining`."""


def share_of_vowels(prompts: list[str], completions: list[str], references: list[str]) -> list[float]:
    """How much of a text are the vowels of English."""
    assert len(prompts) == len(completions) == len(references)
    return [sum(text.count(v) for v in "aeiou") / max(1, len(text)) for text in completions]


def length(prompts: list[str], completions: list[str], references: list[str]) -> list[float]:
    write_call(prompts, completions, references)
    return [float(len(text)) for text in completions]


def declining(prompts: list[str], completions: list[str], references: list[str]) -> list[float]:
    """One less in each call."""
    write_call(prompts, completions, references)
    return [-float(len(calls()))] * len(completions)


def broken(prompts: list[str], completions: list[str], references: list[str]) -> list[float]:
    return [float("nan")] * len(completions)


def broken_on_the_second_rank(prompts: list[str], completions: list[str], references: list[str]) -> list[float]:
    return [float("nan") if os.environ["RANK"] == "1" else 0.0] * len(completions)


def raising(prompts: list[str], completions: list[str], references: list[str]) -> list[float]:
    raise KeyError("judge")


def hundredths(prompts: list[str], completions: list[str], references: list[str]) -> list[float]:
    assert prompts[0].startswith("Q0: ")
    return [len(text) / 100 for text in completions]


def share_of_e(prompts: list[str], completions: list[str], references: list[str]) -> list[float]:
    return [text.count("e") / max(1, len(text)) for text in completions]


def write_call(prompts: list[str], completions: list[str], references: list[str]) -> None:
    with open(os.environ[CALLS], "a") as file:
        file.write(json.dumps({"prompts": prompts, "completions": completions, "references": references}) + "\n")


def calls() -> list[dict[str, list[str]]]:
    """The calls so far."""
    return [json.loads(line) for line in Path(os.environ[CALLS]).read_text().splitlines()]
