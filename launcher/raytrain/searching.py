"""The trials of a sweep for Ray Tune, in their order: those that are known, listed ones, or suggestions of Optuna."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ray.tune.search import Searcher

from launcher.raytrain.samplers import sampler
from launcher.raytrain.stopping import VALUE
from trainer.recipe.sections.sweep import RangeSection, SweepSection
from trainer.recipe.sweeps.trials import Values, takes_integers, trial_name
from trainer.run.sweep import RUNNING, TrialRecord, write_trial
from trainer.storage import Storage

AGAIN = "again"
"""The key of a trial's result that says why the whole sweep has to be started again."""


class TrialSearch(Searcher):
    """Gives Tune one trial after another, and writes its record before. ``values``: of all trials, None where Optuna
    chooses them (``optuna``). ``told`` gets the number of each trial that begins or ends."""

    def __init__(
        self,
        sweep: Storage,
        name: str,
        count: int,
        known: Sequence[TrialRecord],
        values: Sequence[Values] | None,
        optuna: OptunaValues | None,
        told: Callable[[int, Mapping[str, Any] | None], None],
    ) -> None:
        super().__init__()
        self._sweep, self._name, self._count = sweep, name, count
        self._known = {trial.number: trial for trial in known}
        self._values, self._optuna, self._told = values, optuna, told
        self._numbers: dict[str, int] = {}
        self.stopped = False

    def suggest(self, trial_id: str) -> Any:
        number = len(self._numbers) + 1
        if self.stopped or number > self._count:
            return Searcher.FINISHED
        suggested = self._optuna.suggest(trial_id) if self._optuna else None
        known = self._known.get(number)
        if known is None:
            values = suggested if suggested is not None else (self._values or ())[number - 1]
            write_trial(self._sweep, TrialRecord(number, trial_name(self._name, number), dict(values)))
        elif not known.is_over:
            write_trial(self._sweep, replace(known, state=RUNNING, cause=""))
        self._numbers[trial_id] = number
        self._told(number, None)
        return {"number": number}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        if self._optuna:
            self._optuna.search.on_trial_result(trial_id, result)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        if self._optuna:
            self._optuna.search.on_trial_complete(trial_id, result, error)
        if not error:  # `launcher.raytrain.tune.Reports` has the cause
            self._told(self._numbers[trial_id], result or {})

    def save(self, checkpoint_path: str) -> None:
        """Nothing to save: the records have it."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing to restore."""


class OptunaValues:
    """Suggestions of a sampler of Optuna. ``known``: the trials before, whose results Tune replays."""

    def __init__(self, section: SweepSection, mode: str, known: Sequence[TrialRecord]) -> None:
        from ray.tune.search.optuna import OptunaSearch

        self._lists = {key for key, found in section.parameters.items() if isinstance(found, tuple)}
        self.search: Any = OptunaSearch(
            {key: _distribution(key, found) for key, found in section.parameters.items()},
            metric=VALUE,
            mode=mode,
            # Another seed for each resume: the same one would draw the first trials again.
            sampler=sampler(section.chosen_search, section.seed + len(known)),
            points_to_evaluate=[
                {key: json.dumps(value) if key in self._lists else value for key, value in trial.values.items()}
                for trial in known
            ],
        )

    def suggest(self, trial_id: str) -> Values:
        found = self.search.suggest(trial_id)
        return {key: json.loads(value) if key in self._lists else value for key, value in found.items()}


def _distribution(key: str, found: tuple[Any, ...] | RangeSection) -> Any:
    import optuna.distributions as kinds

    if isinstance(found, tuple):  # Optuna takes only plain values; a list is one value here
        return kinds.CategoricalDistribution([json.dumps(value) for value in found])
    assert found.min is not None
    assert found.max is not None
    if takes_integers(key):
        step = {} if found.step is None else {"step": int(found.step)}
        return kinds.IntDistribution(int(found.min), int(found.max), log=found.log, **step)
    return kinds.FloatDistribution(found.min, found.max, log=found.log, step=found.step)
