"""Traces of steps: which steps, where they lie, and that nothing of it can stop a run."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import profile

from tests.support.training import losses, run_of, small_recipe, train_here, write_pairs
from trainer.distributed.world import World
from trainer.errors import RecipeError, StorageError
from trainer.run import layout
from trainer.run.events import ProfileEvent
from trainer.run.jsonl import read_rows
from trainer.storage import Storage, open_storage
from trainer.worker.profiler import Profiler

CPU = torch.device("cpu")
TRACE = "profiles/attempt-000007/rank-00000.json.gz"


@pytest.fixture
def run(tmp_path: Path) -> Storage:
    return open_storage(str(tmp_path / "run"))


def profiler(tmp_path: Path, run: Storage, told: list[ProfileEvent], rank: int = 0, **section: Any) -> Profiler:
    changes = {"profile": {"steps": [2, 3], **section}, "resources.workers": 2}
    recipe = small_recipe("r", tmp_path, tmp_path, **changes)
    return Profiler(recipe, World(rank, 2, 0, CPU), run, 7, told.append)


def steps(profiler: Profiler, *numbers: int) -> None:
    for step in numbers:
        with profiler.around_step(step):
            torch.ones(4, 4) @ torch.full((4, 4), float(step))
    profiler.close()


def traced(run: Storage, key: str = TRACE) -> list[int]:
    """The steps that a trace holds, each with its product of matrices."""
    events = json.loads(gzip.decompress(run.read(key)))["traceEvents"]
    names = [event["name"] for event in events if event.get("ph") == "X"]
    found = sorted({int(m[1]) for name in names if (m := re.fullmatch(r"step (\d+)", name))})
    assert names.count("aten::mm") == len(found)
    return found


def test_the_named_steps_are_traced_and_no_others(tmp_path: Path, run: Storage) -> None:
    told: list[ProfileEvent] = []
    steps(profiler(tmp_path, run, told), 1, 2, 3, 4)
    assert traced(run) == [2, 3]
    (event,) = told
    assert (event.rank, event.steps, event.uri, event.cause) == (0, (2, 3), run.uri(TRACE), None)
    assert event.bytes == len(run.read(TRACE))
    assert event.operators is not None
    assert "aten::mm" in [operator.name for operator in event.operators]
    assert "aten::mm" in run.read(TRACE.replace(".json.gz", ".txt")).decode()


@pytest.mark.parametrize(("ran", "want"), [((3, 4), [3]), ((1, 2), [2])])
def test_an_attempt_traces_what_it_has_of_the_range(
    ran: tuple[int, ...], want: list[int], tmp_path: Path, run: Storage
) -> None:
    told: list[ProfileEvent] = []
    steps(profiler(tmp_path, run, told), *ran)
    assert traced(run) == want
    assert told[0].steps == (want[0], want[-1])


@pytest.mark.parametrize(("rank", "ranks"), [(0, [1]), (1, [0])])
def test_other_ranks_trace_nothing(rank: int, ranks: list[int], tmp_path: Path, run: Storage) -> None:
    told: list[ProfileEvent] = []
    steps(profiler(tmp_path, run, told, rank, ranks=ranks), 1, 2, 3, 4)
    assert not told
    assert not list(run.list(layout.PROFILES))


def test_a_rank_writes_its_own(tmp_path: Path, run: Storage) -> None:
    steps(profiler(tmp_path, run, [], 1, ranks=[0, 1]), 2, 3)
    assert traced(run, TRACE.replace("rank-00000", "rank-00001")) == [2, 3]


def test_a_storage_that_fails_is_told_of_and_nothing_more(
    tmp_path: Path, run: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(self: Storage, key: str, path: Any) -> None:
        raise StorageError("the storage is away")

    monkeypatch.setattr(Storage, "upload", fails)
    told: list[ProfileEvent] = []
    steps(profiler(tmp_path, run, told), 1, 2, 3, 4)
    assert told == [ProfileEvent(rank=0, steps=(2, 3), cause="StorageError: the storage is away")]


@pytest.mark.parametrize("call", ["start", "stop", "export_chrome_trace"])
def test_a_profiler_that_fails_is_told_of_and_nothing_more(
    call: str, tmp_path: Path, run: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing(profile):
        pass

    def fails(self: Any, *given: Any) -> None:
        if call == "stop":
            profile.stop(self)
        raise RuntimeError("no access to the counters")

    setattr(Failing, call, fails)
    monkeypatch.setattr("trainer.worker.profiler.profile", Failing)
    told: list[ProfileEvent] = []
    steps(profiler(tmp_path, run, told), 1, 2, 3, 4)
    assert [event.cause for event in told] == ["RuntimeError: no access to the counters"]
    assert not list(run.list(layout.PROFILES))


def test_who_is_told_may_have_ended(tmp_path: Path, run: Storage) -> None:
    def ended(event: ProfileEvent) -> None:
        raise RuntimeError("a row came after this was closed")

    recipe = small_recipe("r", tmp_path, tmp_path, profile={"steps": [1, 1]})
    steps(Profiler(recipe, World(0, 1, 0, CPU), run, 7, ended), 1)
    assert traced(run) == [1]


@pytest.mark.parametrize(
    ("section", "says"),
    [
        ({"steps": [10]}, "takes the first and the last step, as in [10, 13]; got 1 of them"),
        ({"steps": [13, 10]}, "begins at step 13, after its end 10"),
        ({"steps": [1, 200]}, "names 200 steps; a trace takes 100"),
        ({"steps": [11, 13]}, "begins at step 11, and the run has 10 steps"),
        ({"steps": [0, 3]}, "profile.steps.0"),
        ({"steps": [1, 2], "ranks": []}, "no rank traces these steps"),
        ({"steps": [1, 2], "ranks": [2]}, "names rank 2, and ranks count from 0 to 1 here"),
        ({"steps": [1, 2], "ranks": [0, 0]}, "names a rank twice"),
    ],
)
def test_a_bad_range_is_a_mistake_in_the_recipe(section: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=re.escape(says)):
        small_recipe("r", tmp_path, tmp_path, **{"profile": section, "resources.workers": 2})


def test_a_traced_run_learns_the_same(tiny_model: Path, tmp_path: Path) -> None:
    write_pairs(tmp_path / "data" / "a.jsonl", 40)
    plain = small_recipe("plain", tiny_model, tmp_path, **{"training.steps": 4})
    recipe = small_recipe("traced", tiny_model, tmp_path, **{"training.steps": 4, "profile": {"steps": [2, 3]}})
    assert train_here(plain) == train_here(recipe) == "succeeded"
    assert losses(recipe) == losses(plain)
    storage = run_of(recipe)
    (event,) = [e for e in read_rows(storage, layout.EVENTS) if e["event"] == "profile"]
    assert event["steps"] == [2, 3]
    assert event["uri"] == storage.uri(f"{layout.profile(event['attempt'], 0)}.json.gz")
    events = json.loads(gzip.decompress(storage.read(f"{layout.profile(event['attempt'], 0)}.json.gz")))["traceEvents"]
    assert {e["name"] for e in events} >= {"step 2", "step 3"}
    assert {e["name"] for e in events}.isdisjoint({"step 1", "step 4"})
