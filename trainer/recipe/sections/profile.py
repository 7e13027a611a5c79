"""Profiles."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

from pydantic import Field

from trainer.recipe.base import Conflict, Listed, Section

MOST_STEPS = 100


class ProfileSection(Section):
    """The steps that torch's profiler traces, into `profiles/` of the run."""

    steps: Listed[Annotated[int, Field(ge=1)]] = Field(default=(), examples=[[10, 13]])
    """The first and the last step that are traced, both included, counted from the run's first step; at most 100 steps.
    Empty traces none. A traced step takes longer, so its speed is not representative; its result stays the same."""

    ranks: Listed[Annotated[int, Field(ge=0)]] = (0,)
    """The ranks that write a trace, one file per rank."""

    def conflicts(self) -> Iterator[Conflict]:
        paths = (("steps",),)
        if self.steps and len(self.steps) != 2:
            yield Conflict(paths, f"takes the first and the last step, as in [10, 13]; got {len(self.steps)} of them")
        elif self.steps and self.steps[0] > self.steps[1]:
            yield Conflict(paths, f"begins at step {self.steps[0]}, after its end {self.steps[1]}; exchange them")
        elif self.steps and self.steps[1] - self.steps[0] >= MOST_STEPS:
            yield Conflict(paths, f"names {self.steps[1] - self.steps[0] + 1} steps; a trace takes {MOST_STEPS}")
        if self.steps and not self.ranks:
            yield Conflict((("ranks",), ("steps",)), "is empty, so that no rank traces these steps; name a rank")
        if len(set(self.ranks)) < len(self.ranks):
            yield Conflict((("ranks",),), f"names a rank twice: {list(self.ranks)}")
