"""The reward of texts that the model generates: functions, a model, or a weighted sum of them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from trainer.recipe.base import MAY_CHANGE, Conflict, Listed, Location, Section

FUNCTION = re.compile(r"(?:[^:]+\.py|[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*):[A-Za-z_]\w*")
MODEL = "model"
"""The name of the reward of the model."""


def function_name(text: str) -> str:
    """Returns the name of a function; raises ValueError for anything else."""
    if not FUNCTION.fullmatch(text) or "://" in text:
        raise ValueError(
            f"{text!r} names no function; write package.module:function, or path.py:function with a path on this "
            "machine (nothing is loaded from a storage)"
        )
    return text


def _row_name(text: str) -> str:
    if not text.isidentifier():
        raise ValueError(f"{text!r} names no reward; use letters, digits and '_', with a letter first")
    return text


class RewardFunctionSection(Section):
    """A reward function, with its weight in the sum. Its name in place of the section gives it the weight 1."""

    shorthand = "function"

    function: Annotated[str, AfterValidator(function_name)] = Field(examples=["my_rewards.py:short"])
    """`package.module:function` or `path.py:function`, as in `reward.function`."""

    weight: float = 1.0
    """Factor of its values in the sum; a negative one makes it a penalty."""

    timeout_s: Annotated[float, MAY_CHANGE] = Field(default=60.0, gt=0.0)
    """Seconds that a call may take, for all texts of a rank in a step. After that its process is killed and the run
    fails."""

    name: Annotated[str, AfterValidator(_row_name)] | None = None
    """Name of the reward among the others; null is the function's own."""

    @property
    def label(self) -> str:
        """The name of the reward."""
        return self.name or self.function.rpartition(":")[2]


def _or_function(shape: dict[str, Any]) -> None:
    """Adds a text to the JSON Schema of the entries (see `Section.shorthand`)."""
    shape["items"] = {"anyOf": [shape["items"], {"type": "string"}]}


class RewardSection(Section):
    """The reward of a text: the weighted sum of the functions and of the model that are given, at least one of them."""

    function: Annotated[str, AfterValidator(function_name)] | None = Field(
        default=None, examples=["trainer.tasks.rewards.shipped:gsm8k"]
    )
    """`package.module:function` or `path.py:function`, relative to the working folder; `def` or `async def`. It is
    called with the lists of texts `prompts`, `completions` and `references` (the answers in the data), all of a rank in
    a step, and returns a list of finite numbers, one per completion. It is the recipe's own code, which runs in a
    process of its own: nothing is ever loaded from a run or a checkpoint."""

    functions: Listed[RewardFunctionSection] = Field(default=(), json_schema_extra=_or_function)
    """More functions: `[{function: my_rewards.py:short, weight: 0.2}]`, or their names alone for the weight 1. The
    functions of a call run at the same time, as far as there are `processes`."""

    model: Location | None = Field(default=None, examples=["s3://runs/my-reward"])
    """A run of `task: reward`, the folder of its adapter, or any sequence classifier with one output (folder, URL or
    Hub id). A LoRA adapter whose base model is that of the run, with the same types, shares that base model with the
    policy; any other model is loaded completely, in addition, on each worker."""

    model_weight: float = 1.0
    """Factor of the model's scores in the sum."""

    processes: Annotated[int, MAY_CHANGE] = Field(default=1, ge=1)
    """Processes per rank in which the functions run."""

    @property
    def rows(self) -> tuple[RewardFunctionSection, ...]:
        """All functions; `function` is the first one, with the weight 1."""
        single = () if self.function is None else (RewardFunctionSection(function=self.function),)
        return (*single, *self.functions)

    @property
    def weights(self) -> dict[str, float]:
        """The weight of each reward by its name, that of the model last."""
        weights = {row.label: row.weight for row in self.rows}
        return weights if self.model is None else {**weights, MODEL: self.model_weight}

    def conflicts(self) -> Iterator[Conflict]:
        names = Counter([*(row.label for row in self.rows), *([MODEL] if self.model is not None else [])])
        for name in (name for name, count in names.items() if count > 1):
            yield Conflict(
                (("functions",), ("function",), ("model",)),
                f"has two rewards of the name {name!r}; give one of the functions another name:",
            )
        if self.model is None and self.model_weight != 1.0:
            yield Conflict((("model_weight",), ("model",)), "has no effect without a model; leave it out")
        if self.processes != 1 and not self.rows:
            yield Conflict((("processes",), ("functions",)), "has no effect without functions; leave it out")
