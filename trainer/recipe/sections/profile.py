"""Profiles."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

from pydantic import Field

from trainer.recipe.base import Conflict, Listed, Section

MOST_STEPS = 100


class ProfileSection(Section):
    """Which steps are traced by torch's profiler, into `profiles/` of the run."""

    steps: Listed[Annotated[int, Field(ge=1)]] = Field(default=(), examples=[[10, 13]])
    """The first step that is traced and the last one, both included, counted from the run's first; at most 100 of them.
    Empty traces none. A traced step takes longer, so that its speed says little; what it learns stays the same."""

    ranks: Listed[Annotated[int, Field(ge=0)]] = (0,)
    """The ranks that write a trace, each one of its own."""

    def conflicts(self) -> Iterator[Conflict]:
        paths = (("steps",),)
        if self.steps and len(self.steps) != 2:
            yield Conflict(paths, f"takes the first and the last step, as in [10, 13]; got {len(self.steps)} of them")
        elif self.steps and self.steps[0] > self.steps[1]:
            yield Conflict(paths, f"begins at step {self.steps[0]}, after its end {self.steps[1]}; turn them around")
        elif self.steps and self.steps[1] - self.steps[0] >= MOST_STEPS:
            yield Conflict(paths, f"asks for {self.steps[1] - self.steps[0] + 1} steps; a trace takes {MOST_STEPS}")
        if self.steps and not self.ranks:
            yield Conflict((("ranks",), ("steps",)), "is empty, so that nobody traces these steps; name a rank")
        if len(set(self.ranks)) < len(self.ranks):
            yield Conflict((("ranks",),), f"names a rank twice: {list(self.ranks)}")
