"""A sweep: many runs that differ in a few settings."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import Field, Strict

from trainer.recipe.base import Conflict, OneOf, Section, takes
from trainer.recipe.sweeps.searches import SEARCHES, STOPS

STOP_SETTINGS = ("grace_steps", "reduction_factor")
DEFAULT_TRIALS = 10
LIST_OR_RANGE = "a list of values, or a mapping with min and max (log, step), or with mean and std"


class RangeSection(Section):
    """The values of a setting as a range: between `min` and `max`, or around a mean."""

    min: float | int | None = None
    """Lowest value."""

    max: float | int | None = None
    """Highest value."""

    log: bool = False
    """Every factor is as likely as any other, as is right for learning rates."""

    step: float | int | None = Field(default=None, gt=0)
    """Distance of the values from each other, counted from `min`."""

    mean: float | int | None = None
    """Mean of normally distributed values. `min` and `max` may bound them."""

    std: float | int | None = Field(default=None, gt=0)
    """Standard deviation of normally distributed values."""

    @property
    def is_normal(self) -> bool:
        return self.mean is not None

    def mistake(self) -> str:
        """Returns what is wrong, as the part of a sentence; empty if nothing is."""
        bounds = (self.min, self.max)
        if (self.mean is None) != (self.std is None):
            return "needs both mean and std"
        if self.is_normal and (self.log or self.step is not None):
            return "takes log and step only with min and max, and not with mean and std"
        if not self.is_normal and None in bounds:
            return "needs both min and max, or both mean and std"
        if self.min is not None and self.max is not None and self.min >= self.max:
            return f"has its min {self.min:g} not below its max {self.max:g}; exchange or correct them"
        if self.log and (self.min or 0) <= 0:
            return f"cannot be log from a min of {self.min:g}, which has to be above 0"
        if self.log and self.step is not None:
            return "takes log or step, and not both"
        return ""


Choices = Annotated[tuple[Any, ...], Strict(False), Field(min_length=1)]
Parameter = Annotated[Choices | RangeSection, takes(LIST_OR_RANGE)]


class SweepSection(Section):
    """A sweep: `muster sweep` trains the recipe once for each of several combinations of settings; each trial is a run.
    Other commands ignore it."""

    parameters: dict[str, Parameter] = Field(default_factory=dict, examples=[{"optimizer.lr": [1e-4, 3e-4]}])
    """The settings that vary, by their dotted path: a list of values (`adapter.rank: [8, 16, 32]`), or a range
    (`optimizer.lr: {min: 1.0e-5, max: 1.0e-3, log: true}`, `{mean: 0.1, std: 0.02}`; `step` gives a distance). Of a
    setting that takes integers, a range gives integers. `muster sweep RECIPE KEY=V1,V2` adds lists to them. See
    [sweeps.md](sweeps.md)."""

    search: Annotated[str, OneOf(SEARCHES)] | None = None
    """How the trials are chosen: `grid` takes every combination of lists, `random` draws from lists and ranges, `tpe`
    and `gp` are samplers of Optuna, which learn from the trials before. null is `grid` for lists without `trials`, else
    `random`."""

    trials: int | None = Field(default=None, ge=1)
    """Number of trials; null is 10, and all combinations for `grid`. It may grow when the sweep is resumed."""

    metric: str = "eval_loss"
    """Metric of the evaluations that compares the trials; the task decides if lower or higher is better."""

    stop: Annotated[str, OneOf(STOPS)] = "none"
    """The rule that stops trials early: `asha` stops those that are not among the best `1/reduction_factor` at
    `grace_steps`, at `grace_steps` times the factor, and so on; `median` those that are worse than the median of the
    others. Needs `training.eval_every`."""

    grace_steps: int | None = Field(default=None, ge=1)
    """Optimizer steps that every trial may train before it can be stopped; null is `training.eval_every`."""

    reduction_factor: float = Field(default=3.0, gt=1)
    """With `stop: asha`: one of so many trials continues at each of its checks."""

    together: bool = False
    """All trials in the same processes, on one base model that they share: each forward has rows of all of them. For
    LoRA adapters under `ddp` and `fsdp`. See [sweeps.md](sweeps.md#together)."""

    parallel: int | None = Field(default=None, ge=1)
    """Trials that train at the same time; null is as many as the cluster has room for."""

    seed: int = Field(default=17, ge=0)
    """Decides the random choices of the search. It does not change the seed of the trials' training."""

    @property
    def chosen_search(self) -> str:
        """The name of the search, also where `search` is null."""
        lists = self.trials is None and all(isinstance(found, tuple) for found in self.parameters.values())
        return self.search or ("grid" if lists else "random")

    def conflicts(self) -> Iterator[Conflict]:
        ranges = {key: found for key, found in self.parameters.items() if isinstance(found, RangeSection)}
        search = self.chosen_search
        for key, found in self.parameters.items():
            path = ("parameters", key)
            if isinstance(found, RangeSection):
                if said := found.mistake():
                    yield Conflict((path,), said)
                elif search == "grid":
                    yield Conflict((path, ("search",)), "is a range, and search grid takes lists; use random")
                elif SEARCHES[search].learns and found.is_normal:
                    message = f"has mean and std, which search {search} does not know; give min and max, or use random"
                    yield Conflict((path, ("search",)), message)
            elif len({json.dumps(value, default=str) for value in found}) < len(found):
                yield Conflict((path,), f"names a value twice: {', '.join(map(str, found))}")
        if self.together:
            yield from self._against_together(search)
        if search == "grid" and self.trials is not None:
            message = "has no effect with search grid, which takes every combination; leave it out, or use random"
            yield Conflict((("trials",), ("search",)), message)
        if (
            search == "random"
            and not ranges
            and self.parameters
            and (self.trials or DEFAULT_TRIALS) > self.combinations
        ):
            asked = self.trials or f"null, which is {DEFAULT_TRIALS}"
            message = f"is {asked}, and the lists have {self.combinations} combinations; lower it, or use search: grid"
            yield Conflict((("trials",), ("search",)), message)
        for name in STOP_SETTINGS:
            if name in self.given() and name not in STOPS[self.stop].uses:
                yield Conflict(((name,), ("stop",)), f"has no effect with stop {self.stop}; leave it out")

    def _against_together(self, search: str) -> Iterator[Conflict]:
        if SEARCHES[search].learns:
            message = f"chooses trials by the results of others ({search}), and together all begin at once; use random"
            yield Conflict((("search",), ("together",)), message)
        if self.stop != "none":
            yield Conflict((("stop",), ("together",)), "has no effect on trials together; use training.early_stop")
        if self.parallel is not None:
            yield Conflict((("parallel",), ("together",)), "has no effect on trials together; leave it out")

    @property
    def combinations(self) -> int:
        """The number of combinations of the lists."""
        count = 1
        for found in self.parameters.values():
            count *= len(found) if isinstance(found, tuple) else 1
        return count
