"""Which trial comes next: the known ones first, each with its record written before it begins."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from ray.tune.search import Searcher

from launcher.raytrain import samplers
from launcher.raytrain.searching import OptunaValues, TrialSearch
from trainer.errors import InputError, StorageError
from trainer.recipe.sections.sweep import SweepSection
from trainer.recipe.sweeps.trials import Values, listed
from trainer.run.sweep import TrialRecord, folder_of, read_trials, write_trial
from trainer.storage import Storage, open_storage

LEARNED = {
    "optimizer.lr": {"min": 1e-5, "max": 1e-2, "log": True},
    "adapter.rank": {"min": 2, "max": 64},
    "adapter.target_modules": [["q_proj"], ["q_proj", "v_proj"], "all-linear"],
}


@pytest.fixture
def sweep(tmp_path: Path) -> Storage:
    return folder_of(open_storage(str(tmp_path)), "toy")


def search(sweep: Storage, section: SweepSection, told: list[Any] | None = None) -> TrialSearch:
    known, values = read_trials(sweep), listed(section)
    optuna = OptunaValues(section, "min", known) if values is None else None

    def tell(number: int, result: Mapping[str, Any] | None) -> None:
        if told is not None:
            told.append((number, result))

    return TrialSearch(sweep, "toy", section.trials or 4, known, values, optuna, tell)


def test_trials_are_recorded_before_they_begin(sweep: Storage) -> None:
    told: list[Any] = []
    section = SweepSection.model_validate({"parameters": {"adapter.rank": [2, 4], "optimizer.lr": [0.1, 0.2]}})
    found = search(sweep, section, told)
    assert found.suggest("a") == {"number": 1}
    assert read_trials(sweep) == [TrialRecord(1, "toy-001", {"adapter.rank": 2, "optimizer.lr": 0.1})]
    assert [found.suggest(name) for name in "bcde"] == [{"number": 2}, {"number": 3}, {"number": 4}, Searcher.FINISHED]
    found.on_trial_complete("b", {"done": True})
    assert told == [(1, None), (2, None), (3, None), (4, None), (2, {"done": True})]


def test_a_storage_that_does_not_answer_begins_no_trial(sweep: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise StorageError("no answer")

    section = SweepSection.model_validate({"parameters": {"adapter.rank": [2, 4]}})
    found = search(sweep, section)
    monkeypatch.setattr(Storage, "write_json", fail)
    with pytest.raises(StorageError):
        found.suggest("a")


def test_resumed_it_gives_the_same_numbers_and_tries_a_failed_one_again(sweep: Storage) -> None:
    section = SweepSection.model_validate({"parameters": {"adapter.rank": [2, 4, 8, 16]}})
    first = search(sweep, section)
    for name in "ab":
        first.suggest(name)
    write_trial(sweep, TrialRecord(1, "toy-001", {"adapter.rank": 2}, "failed", 3, "a node was lost"))
    again = search(sweep, section)
    assert [again.suggest(name) for name in "abcd"] == [{"number": number} for number in (1, 2, 3, 4)]
    assert [trial.values["adapter.rank"] for trial in read_trials(sweep)] == [2, 4, 8, 16]
    assert [trial.state for trial in read_trials(sweep)] == ["running"] * 4


def test_a_stopped_sweep_begins_no_trial(sweep: Storage) -> None:
    found = search(sweep, SweepSection.model_validate({"parameters": {"adapter.rank": [2, 4]}}))
    found.stopped = True
    assert found.suggest("a") == Searcher.FINISHED
    assert read_trials(sweep) == []


@pytest.mark.parametrize("name", ["tpe", "gp"])
def test_optuna_learns_from_the_trials_before_and_draws_none_of_them_again(sweep: Storage, name: str) -> None:
    section = SweepSection.model_validate({"parameters": LEARNED, "search": name, "trials": 10})

    def go_on(found: TrialSearch, numbers: range) -> None:
        for number in numbers:
            assert found.suggest(f"t{number}") == {"number": number}
            values = read_trials(sweep)[number - 1].values
            step = {"value": value_of(values), "step": 10, "training_iteration": 1}
            found.on_trial_result(f"t{number}", step)
            found.on_trial_complete(f"t{number}", {**step, "done": True})

    go_on(search(sweep, section), range(1, 5))
    before = read_trials(sweep)
    go_on(search(sweep, section), range(1, 11))  # a new driver
    after = read_trials(sweep)
    assert after[:4] == before
    assert len({str(trial.values) for trial in after}) == 10
    for trial in after:
        assert 1e-5 <= trial.values["optimizer.lr"] <= 1e-2
        assert isinstance(trial.values["adapter.rank"], int)
        assert trial.values["adapter.target_modules"] in LEARNED["adapter.target_modules"]  # type: ignore[operator]


def value_of(values: Values) -> float:
    return float(abs(values["optimizer.lr"] - 1e-3) + abs(values["adapter.rank"] - 16))


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(InputError, match="pip install optuna"):
        samplers.sampler("tpe", 1)
