"""The ways to choose the settings of a sweep's trials, and the rules that stop trials early."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from trainer.registry import Choice, Registry


@dataclass(frozen=True)
class SearchRow(Choice):
    """A search's row. ``code``: a function of the sweep's settings that lists the values of all trials
    (`trainer.recipe.sweeps.trials`); or, if it ``learns`` from the trials before, a sampler class of Optuna.
    ``settings``: arguments of that class, besides its seed."""

    learns: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict, hash=False)


SEARCHES = Registry(
    "search",
    {
        "grid": SearchRow("trainer.recipe.sweeps.trials:grid"),
        "random": SearchRow("trainer.recipe.sweeps.trials:random_values"),
        # A sweep has fewer trials than Optuna expects, which draws its first ten at random.
        "tpe": SearchRow("optuna.samplers:TPESampler", learns=True, settings={"n_startup_trials": 5}),
        "gp": SearchRow("optuna.samplers:GPSampler", learns=True, settings={"n_startup_trials": 5}),
    },
)


@dataclass(frozen=True)
class StopRow(Choice):
    """A stopping rule's row. ``code``: a function of the sweep's settings that returns a scheduler of Ray Tune.
    ``uses``: the settings of the section `sweep` that it reads."""

    uses: tuple[str, ...] = ()


STOPS = Registry(
    "stopping rule",
    {
        "none": StopRow("launcher.raytrain.stopping:never"),
        "asha": StopRow("launcher.raytrain.stopping:asha", ("grace_steps", "reduction_factor")),
        "median": StopRow("launcher.raytrain.stopping:median", ("grace_steps",)),
    },
)
