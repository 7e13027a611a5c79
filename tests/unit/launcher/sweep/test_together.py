"""The ends of trials that are trained together, each with its own state."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launcher.attempt import AttemptFailed
from launcher.sweep import together as module
from launcher.sweep.together import train_trials
from launcher.sweep.trial import CANCELLED
from trainer.errors import Interrupted, StorageError, WorkerFailed
from trainer.recipe import loads
from trainer.recipe.sweeps.trials import as_text
from trainer.run.failure import Failure
from trainer.run.lease import Lease, request_end
from trainer.run.sweep import folder_of, read_trials
from trainer.storage import Storage, open_storage


class Group:
    """A sweep of four trials, whose runs are played."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.base: dict[str, Any] = {
            "name": "toy",
            "model": {"path": "model"},
            "data": {"train": [{"path": "a", "format": "text"}], "eval_fraction": 0.1, "sequence_length": 64},
            "training": {"steps": 40, "global_batch": 6, "micro_batch": 2, "eval_every": 10},
            "optimizer": {"name": "adamw", "lr": 5e-3},
            "storage": str(folder / "runs"),
            "sweep": {"parameters": {"adapter.rank": [2, 4, 8, 16]}, "together": True},
        }
        self.storage = open_storage(self.base["storage"])
        self.sweep = folder_of(self.storage, "toy")
        self.complete: set[str] = set()
        self.error: Exception | None = None
        self.takeover: list[bool] = []

        def finished(run: Storage, length: Any) -> Any:
            return SimpleNamespace(step=40) if run.url.rpartition("/")[2] in self.complete else None

        def run_together(recipes: Any, progress: Any, *, takeover: bool, signals: Any) -> None:
            self.takeover.append(takeover)
            if self.error is not None:
                raise self.error

        monkeypatch.setattr(module, "finished", finished)
        monkeypatch.setattr(module, "run_together", run_together)

    def train(self, **settings: Any) -> None:
        nothing: Any = SimpleNamespace(say=lambda text: None)
        train_trials(loads(as_text(self.base)), self.base, self.sweep, nothing, nothing, **settings)

    @property
    def states(self) -> list[str]:
        return [trial.state for trial in read_trials(self.sweep)]


@pytest.fixture
def group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Group:
    return Group(tmp_path, monkeypatch)


def diverged(*names: str) -> WorkerFailed:
    text = "rank 0 on h: " + "\n".join(f"run {name}: step 3: the loss is not finite" for name in names)
    error = WorkerFailed(text)
    error.__cause__ = AttemptFailed(Failure(text, fatal=True))
    return error


def test_a_failure_belongs_to_the_trials_that_it_names(group: Group) -> None:
    group.complete, group.error = {"toy-001", "toy-003"}, diverged("toy-002", "toy-004")
    group.train()
    assert group.states == ["complete", "failed", "complete", "failed"]
    second, last = read_trials(group.sweep)[1::2]
    assert (second.cause, second.final) == ("rank 0 on h: run toy-002: step 3: the loss is not finite", True)
    assert last.cause == "run toy-004: step 3: the loss is not finite"


def test_a_trial_that_was_stopped_while_another_diverged_is_resumed(group: Group) -> None:
    group.complete, group.error = {"toy-001"}, diverged("toy-002")
    with pytest.raises(WorkerFailed):
        group.train()
    assert group.states == ["complete", "failed", "running", "running"]


def test_an_interruption_leaves_trials_open_and_keeps_what_is_complete(group: Group) -> None:
    group.complete, group.error = {"toy-004"}, Interrupted("stopped on request")
    with pytest.raises(Interrupted):
        group.train()
    assert group.states == ["running"] * 3 + ["complete"]


def test_a_trial_that_was_cancelled_alone_counts_as_stopped(group: Group) -> None:
    group.complete, group.error = {"toy-001", "toy-002", "toy-003"}, Interrupted("stopped on request")
    run = group.storage.child("toy-004")
    lease = Lease.acquire(run)
    request_end(run, lease.driver)
    lease.release("interrupted")
    group.train()
    assert group.states == ["complete"] * 3 + ["stopped"]
    assert read_trials(group.sweep)[3].cause == CANCELLED


def test_a_storage_that_has_gone_does_not_hide_the_error(group: Group, monkeypatch: pytest.MonkeyPatch) -> None:
    def finished(run: Storage, length: Any) -> Any:
        raise StorageError("no answer")

    group.error = Interrupted("stopped on request")
    monkeypatch.setattr(module, "finished", finished)
    with pytest.raises(Interrupted):
        group.train()


def test_a_takeover_is_one_of_the_runs_too(group: Group) -> None:
    group.complete = {"toy-001", "toy-002", "toy-003", "toy-004"}
    group.train(takeover=True)
    assert group.takeover == [True]
    assert group.states == ["complete"] * 4
