"""The best checkpoint and the early end of a run: which weights are published, and what an interruption changes."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher.monitor.status import read_status
from launcher.monitor.tables import checkpoint_lines, runs_table
from tests.support.nights import few_by_day
from tests.support.training import adapter_bytes, losses, run_of, small_recipe, train_here, write_pairs
from trainer.artifacts import ArtifactRef, find
from trainer.artifacts.inspect import describe
from trainer.checkpoint import Retention, list_commits
from trainer.checkpoint.publish import completed_text, finished
from trainer.errors import CorruptObject
from trainer.progress.ending import last_lines
from trainer.progress.texts import event_text
from trainer.recipe import Recipe
from trainer.run import layout
from trainer.run.events import BestEvent, EarlyStopEvent, EndEvent
from trainer.run.jsonl import read_events
from trainer.run.metrics import EvalMetrics
from trainer.storage import Storage
from trainer.worker import checkpointer
from trainer.worker.async_committer import Committer

Make = Callable[..., Recipe]
KEEP = {"checkpoint.keep_best": "eval_loss"}
STOP = {"training.early_stop": {"metric": "eval_loss", "patience": 2}}
VALUES = {2: 3.0, 4: 1.0, 6: 2.0, 8: 1.0, 10: 0.5}
"""The loss of each evaluation in these tests, by its step."""


@pytest.fixture(autouse=True)
def evaluations(monkeypatch: pytest.MonkeyPatch) -> dict[int, float]:
    values = dict(VALUES)

    def value_of(metrics: EvalMetrics, metric: str) -> float | None:
        assert metric == "eval_loss"
        assert metrics.eval_loss is not None
        return values.get(metrics.step)

    monkeypatch.setattr("trainer.worker.judge.value_of", value_of)
    return values


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("best")
    write_pairs(folder / "data" / "a.jsonl", 30)
    write_pairs(folder / "eval" / "a.jsonl", 4)
    return folder


@pytest.fixture
def make(tiny_model: Path, data: Path, tmp_path: Path) -> Make:
    def recipe(name: str, **changes: Any) -> Recipe:
        usual = {
            "data.eval": [{"path": f"{data}/eval/*.jsonl", "format": "completion"}],
            "training.steps": 8,
            "training.eval_every": 2,
            "checkpoint.every_steps": 3,
            "checkpoint.keep_last": 1,
            "storage": str(tmp_path / "runs"),
        }
        return small_recipe(name, tiny_model, data, **{**usual, **changes})

    return recipe


def steps(run: Storage) -> list[int]:
    return sorted(record.step for record in list_commits(run))


def published(recipe: Recipe) -> dict[str, bytes]:
    """The final adapter's files, without the name of the run in the model card."""
    run = run_of(recipe)
    files = {info.key: run.read(info.key) for info in run.list(layout.ADAPTER)}
    card = files["adapter/README.md"].replace(recipe.storage.encode(), b"HERE").replace(recipe.name.encode(), b"NAME")
    return {**files, "adapter/README.md": card}


def test_the_final_adapter_is_that_of_the_best_evaluation(make: Make, tmp_path: Path) -> None:
    recipe = make("best", **KEEP)
    assert train_here(recipe) == "succeeded"
    run = run_of(recipe)
    assert steps(run) == [4, 8], "the best one stays beside the last one, of which keep_last is 1"
    assert train_here(make("shorter", **{"training.steps": 4})) == "succeeded"
    assert adapter_bytes(recipe) == adapter_bytes(make("shorter"))
    last, best = list_commits(run)
    assert last.files["adapter_model.safetensors"] != best.files["adapter_model.safetensors"]
    assert last.best_key == best.best_key == (1, 4)
    assert json.loads(run.read("adapter/muster.json"))["best"] == {"metric": "eval_loss", "value": 1.0, "step": 4}
    card = run.read("adapter/README.md").decode()
    assert "| chosen as the best evaluation | eval_loss 1.0000 after step 4 |" in card
    assert "| steps | 4 |" in card
    assert [(e.step, e.value) for e in read_events(run) if isinstance(e, BestEvent)] == [(2, 3.0), (4, 1.0)]
    assert (last.step, finished(run, recipe.training)) == (8, last)
    assert losses(recipe).keys() == set(range(1, 9))
    found = describe(run.url)
    assert (found.whole, found.facts["step"]) == (True, 4)
    assert find(ArtifactRef(run=run.url), tmp_path / "found").adapters["default"].name == "adapter"
    status = read_status(run)
    assert status.best == {"metric": "eval_loss", "value": 1.0, "step": 4}
    assert status.early_stop is None
    said = list(last_lines(recipe, run, run.uri(layout.ADAPTER)))
    assert said[1] == "the adapter is that of step 4, the best evaluation: eval_loss 1"
    assert checkpoint_lines(status)[0].plain.endswith(", the best: eval_loss 1.0000:")


def test_without_it_the_final_adapter_is_the_last_one(make: Make) -> None:
    recipe = make("last")
    assert train_here(recipe) == "succeeded"
    run = run_of(recipe)
    (last,) = list_commits(run)
    assert last.step == 8
    assert not {"best", "early_stop", "ended_early"} & last.state.keys()
    assert "best" not in json.loads(run.read("adapter/muster.json"))


class Died(Exception):
    pass


def dies_at(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, call: int, *, after: bool) -> None:
    """Lets a function raise in place of its ``call``-th call, or after it."""
    real, calls = getattr(owner, name), [0]

    def dying(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == call and not after:
            raise Died
        found = real(*args, **kwargs)
        if calls[0] == call:
            raise Died
        return found

    monkeypatch.setattr(owner, name, dying)


def one_after_the_other(patch: pytest.MonkeyPatch) -> None:
    """Lets the loop wait for each commit, so that none is coalesced: steps 2 (best), 3, 4 (best), 6, 8 (last)."""
    submit = Committer.submit

    def waiting(self: Committer, *given: Any) -> None:
        submit(self, *given)
        while self.lag().backlog and self._error is None:
            time.sleep(0.002)

    patch.setattr(Committer, "submit", waiting)


PLACES: list[tuple[Any, str, int, bool]] = [
    (checkpointer, "commit", 3, False),
    (checkpointer, "publish", 1, False),
    (Retention, "apply", 3, True),
    (checkpointer, "put_checkpoint", 3, False),
    (checkpointer, "commit", 3, True),
    (Storage, "delete", 3, True),
    (checkpointer, "commit", 5, True),
    (Retention, "apply", 5, True),
    (Storage, "upload", -1, True),
    (checkpointer, "publish", 1, True),
]


@pytest.mark.parametrize(("owner", "name", "call", "after"), few_by_day(PLACES, 3))
def test_the_same_adapter_wherever_the_process_dies(
    make: Make, straight: Recipe, owner: Any, name: str, call: int, after: bool
) -> None:
    """``call`` -1: the first upload into the final adapter."""
    recipe = make("killed", **KEEP)
    with pytest.MonkeyPatch.context() as patch:
        one_after_the_other(patch)
        if call > 0:
            dies_at(patch, owner, name, call, after=after)
        else:
            die_in_publish(patch)
        with pytest.raises(Died):
            train_here(recipe)
    assert train_here(recipe, takeover=True) == "succeeded"
    run = run_of(recipe)
    assert finished(run, recipe.training) is not None
    assert {1, *steps(run)} >= {4, 8}
    assert published(recipe) == published(straight)


def die_in_publish(patch: pytest.MonkeyPatch) -> None:
    upload = Storage.upload

    def dying(self: Storage, key: str, path: Path) -> None:
        upload(self, key, path)
        if key.startswith(layout.ADAPTER):
            raise Died

    patch.setattr(Storage, "upload", dying)


@pytest.fixture(scope="module")
def straight(tiny_model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """The run that no test interrupts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trainer.worker.judge.value_of", lambda metrics, metric: VALUES.get(metrics.step))
        usual = {
            "data.eval": [{"path": f"{data}/eval/*.jsonl", "format": "completion"}],
            "training.steps": 8,
            "training.eval_every": 2,
            "checkpoint.every_steps": 3,
            "checkpoint.keep_last": 1,
            "storage": str(tmp_path_factory.mktemp("straight") / "runs"),
        }
        recipe = small_recipe("straight", tiny_model, data, **{**usual, **KEEP})
        assert train_here(recipe) == "succeeded"
    return recipe


def test_a_run_ends_when_its_evaluations_do_not_improve(make: Make) -> None:
    recipe = make("early", **STOP, **{"training.steps": 20})
    assert train_here(recipe) == "succeeded"
    run = run_of(recipe)
    last = finished(run, recipe.training)
    assert last is not None
    assert (last.step, steps(run)) == (8, [8])
    assert losses(recipe).keys() == set(range(1, 9))
    (event,) = (event for event in read_events(run) if isinstance(event, EarlyStopEvent))
    assert (event.step, event.best_step, event.value, event.evaluations) == (8, 4, 1.0, 2)
    why = "eval_loss has not improved in 2 evaluations; it was 1.0000 after step 4"
    assert event_text(event) == f"ends early at step 8: {why}"
    assert completed_text(last) == f"has ended early at step 8 ({why})"
    (end,) = (event for event in read_events(run) if isinstance(event, EndEvent))
    assert (end.state, end.step) == ("succeeded", 8)
    status = read_status(run)
    assert (status.state, status.step, status.total_steps) == ("succeeded", 8, 20)
    assert status.early_stop == {"metric": "eval_loss", "value": 1.0, "step": 4, "evaluations": 2}
    assert "8/20 early" in str(next(iter(runs_table([status], 0.0).columns[2].cells)))
    assert train_here(make("shorter", **{"training.steps": 8})) == "succeeded"
    assert adapter_bytes(recipe) == adapter_bytes(make("shorter"))
    before = run.list(layout.COMMITS)
    assert train_here(recipe) == "succeeded"  # another attempt restores it, and has nothing to train
    assert (run.list(layout.COMMITS), losses(recipe).keys()) == (before, set(range(1, 9)))


def test_the_early_end_is_found_by_a_resumed_run_too(make: Make) -> None:
    both = {**STOP, **KEEP, "training.steps": 20}
    assert train_here(make("straight", **both)) == "succeeded"
    resumed = make("resumed", **both)
    for stop in (3, 4, 7):
        assert train_here(make("resumed", **both, **{"training.stop_after": stop})) == "interrupted"
    assert train_here(resumed) == "succeeded"
    last = finished(run_of(resumed), resumed.training)
    assert last is not None
    assert (last.step, steps(run_of(resumed))) == (8, [4, 8])
    assert adapter_bytes(resumed) == adapter_bytes(make("straight"))
    assert published(resumed) == published(make("straight", **both))


@pytest.mark.night
def test_a_run_that_ended_early_continues_with_more_patience(make: Make) -> None:
    longer = {"training.steps": 10}
    assert train_here(make("longer", **STOP, **longer)) == "succeeded"
    run = run_of(make("longer"))
    patient = make("longer", **longer)
    assert finished(run, make("longer", **STOP, **longer).training) is not None
    assert finished(run, patient.training) is None
    assert train_here(patient) == "succeeded"
    assert losses(patient).keys() == set(range(1, 11))
    assert train_here(make("straight", **longer)) == "succeeded"
    assert adapter_bytes(patient) == adapter_bytes(make("straight"))


@pytest.mark.night
def test_another_choice_begins_where_the_run_is(make: Make) -> None:
    """It was switched on after step 5: the evaluation of step 6 is the first that it compares."""
    assert train_here(make("later", **{"training.steps": 6, "training.stop_after": 5})) == "interrupted"
    assert train_here(make("later", **KEEP, **{"training.steps": 6})) == "succeeded"
    run = run_of(make("later"))
    assert json.loads(run.read("adapter/muster.json"))["best"]["step"] == 6
    assert train_here(make("later", **{"training.steps": 8})) == "succeeded"
    (last,) = list_commits(run)
    assert (last.step, last.best_key) == (8, None)
    assert "best" not in json.loads(run.read("adapter/muster.json"))


def test_a_best_checkpoint_that_is_damaged_is_no_adapter(make: Make) -> None:
    recipe = make("damaged", **KEEP)
    assert train_here(recipe) == "succeeded"
    run, weights = run_of(recipe), "adapter_model.safetensors"
    last, best = list_commits(run)
    assert finished(run) == last
    run.write(best.file_key(weights), b"damaged")
    run.write(f"{layout.ADAPTER}/{weights}", b"damaged")
    with pytest.raises(CorruptObject, match=r"the best checkpoint of .*, of step 4, is damaged .* delete .*commits/"):
        finished(run)
    run.delete([best.key])
    assert finished(run) == last
    assert adapter_bytes(recipe) == run.read(last.file_key(weights))
