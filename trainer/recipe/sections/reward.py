"""Where the reward of a text comes from."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, Field

from trainer.recipe.base import Location, Section

FUNCTION = re.compile(r"(?:[^:]+\.py|[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*):[A-Za-z_]\w*")


def function_name(text: str) -> str:
    """Returns the name of a function; raises ValueError for anything else."""
    if not FUNCTION.fullmatch(text) or "://" in text:
        raise ValueError(
            f"{text!r} names no function; write package.module:function, or path.py:function with a path on this "
            "machine (nothing is loaded from a storage)"
        )
    return text


class RewardSection(Section):
    """The reward of a text: exactly one of the two is given."""

    function: Annotated[str, AfterValidator(function_name)] | None = Field(
        default=None, examples=["trainer.tasks.ppo.rewards:gsm8k"]
    )
    """`package.module:function` or `path.py:function`, relative to the working folder. It is called with the lists of
    texts `prompts`, `completions` and `references` (the answers in the data) of a micro-batch, and returns a list of
    finite numbers, one per completion. It is the recipe's own code: nothing is ever loaded from a run or a
    checkpoint."""

    model: Location | None = Field(default=None, examples=["s3://runs/my-reward"])
    """A run of `task: reward`, the folder of its adapter, or any sequence classifier with one output (folder, URL or
    Hub id). A LoRA adapter whose base model is that of the run, with the same types, shares that base model with the
    policy; any other model is loaded completely, in addition, on each worker."""
