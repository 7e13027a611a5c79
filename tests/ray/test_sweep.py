"""`muster sweep` as users start it: trials on one Ray, also after its driver was killed, stopped or cancelled."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from launcher.submit.cancel import cancel_run
from tests.support.jobs import ROOT, Command, start
from tests.support.training import write_pairs
from tests.support.waiting import wait_for
from trainer.recipe import load
from trainer.recipe.sweeps.trials import as_text
from trainer.run.jsonl import read_events
from trainer.run.lease import read_lease
from trainer.run.sweep import TrialRecord, folder_of, read_trials
from trainer.storage import Storage, open_storage

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]
LRS = ("1e-4", "3e-4", "1e-3", "3e-3", "1e-2", "3e-2")
TWELVE = (f"optimizer.lr={','.join(LRS)}", "adapter.rank=2,4", "--stop", "asha", "--parallel", "2")


class SweepFolder:
    """A folder with a recipe of the tiny model, and sweeps of it."""

    def __init__(self, folder: Path, model: Path) -> None:
        write_pairs(folder / "data" / "a.jsonl", 90)
        write_pairs(folder / "held" / "b.jsonl", 20)
        self.folder, self._model = folder, model
        self.storage = open_storage(str(folder / "runs"))

    def start(self, name: str, *words: str, steps: int, **changes: Any) -> Command:
        recipe = {
            "name": name,
            "model": {"path": str(self._model), "dtype": "float32"},
            "adapter": {"method": "lora", "rank": 4, "alpha": 8, "dropout": 0.0},
            "data": {
                "train": [{"path": f"{self.folder}/data/*.jsonl", "format": "completion"}],
                "eval": [{"path": f"{self.folder}/held/*.jsonl", "format": "completion"}],
                "sequence_length": 64,
            },
            "training": {"steps": steps, "global_batch": 6, "micro_batch": 2, "eval_every": 20},
            "optimizer": {"name": "adamw", "lr": 5e-3},
            "strategy": {"kind": "ddp"},
            "storage": self.storage.url,
            "checkpoint": {"every_steps": 20},
            "samples": {"count": 0},
            **changes,
        }
        file = self.folder / f"{name}.yaml"
        file.write_text(as_text(recipe))
        return start(["-m", "launcher", "sweep", str(file), *words], {"PYTHONPATH": str(ROOT)}, self.folder)

    def sweep(self, name: str) -> Storage:
        return folder_of(self.storage, name)

    def trials(self, name: str) -> list[TrialRecord]:
        return read_trials(self.sweep(name))


@pytest.fixture
def folder(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> SweepFolder:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return SweepFolder(tmp_path, tiny_model)


def json_of(command: Command) -> list[dict[str, Any]]:
    """The rows that ``--json`` has printed among the messages."""
    (line,) = (line for line in command.output().splitlines() if line.startswith("[{"))
    found: list[dict[str, Any]] = json.loads(line)
    return found


def until(command: Command, text: str) -> None:
    def said() -> bool:
        assert command.process.poll() is None or re.search(text, command.output()), command.output()[-3000:]
        return re.search(text, command.output()) is not None

    wait_for(said, repr(text), timeout_s=240, logs=command.output)


@pytest.mark.night
def test_trials_are_compared_and_one_that_fails_costs_only_itself(folder: SweepFolder, joined: str) -> None:
    words = ("optimizer.lr=1e-3,1e-2", "adapter.from=null,/nowhere", "--parallel", "2", "--json")
    command = folder.start("compared", *words, steps=40)
    assert command.wait(300) == 1, command.output()
    rows = json_of(command)
    assert [row["state"] for row in rows] == ["complete", "complete", "failed", "failed"]
    assert [row["values"]["optimizer.lr"] for row in rows[:2]] == [1e-2, 1e-3]
    assert rows[0]["value"] < rows[1]["value"]
    assert "/nowhere" in rows[2]["cause"]
    assert "the best: compared-" in command.output()
    assert load(folder.folder / "compared-best.yaml").optimizer.lr == 1e-2


@pytest.mark.night
def test_interrupted_it_commits_and_a_cancelled_sweep_resumes(folder: SweepFolder, joined: str) -> None:
    words = ("optimizer.lr=1e-4,1e-3", "--parallel", "2")
    first = folder.start("stopped", *words, steps=600)
    until(first, "after step 40")
    second = folder.start("stopped", *words, steps=600)
    assert second.wait(60) == 2, second.output()
    assert re.search("holds .* and is alive|is starting", second.output())
    first.process.send_signal(signal.SIGINT)
    assert first.wait(60) == 3, first.output()
    assert "the same command resumes the sweep" in first.output().splitlines()[-1]
    states = [read_lease(folder.storage.child(trial.run)) for trial in folder.trials("stopped")]
    assert [lease and lease.state for lease in states] == ["interrupted", "interrupted"]
    third = folder.start("stopped", *words, steps=600)
    until(third, "after step [0-9]{3}")
    cancel_run(f"{folder.storage.url}/stopped", print)
    assert third.wait(60) == 3, third.output()
    assert all(trial.state == "running" for trial in folder.trials("stopped"))
    begun = [event for event in read_events(folder.storage.child("stopped-001")) if event.kind == "start"]
    assert getattr(begun[1], "step", 0) > 0  # from a checkpoint


@pytest.mark.night
@pytest.mark.timeout(1800)
def test_killed_in_the_middle_the_same_command_ends_with_the_table_of_all(folder: SweepFolder) -> None:
    """The acceptance: twelve trials with ASHA on two workers, on a Ray of this machine's own."""
    command = folder.start("killed", *TWELVE, steps=300)
    wait_for(lambda: len(folder.trials("killed")) >= 5, "the fifth trial", timeout_s=400, logs=command.output)
    before = {trial.number: trial for trial in folder.trials("killed") if trial.is_over}
    psutil.Process(command.process.pid).kill()
    again = folder.start("killed", *TWELVE, "--json", steps=300)
    assert again.wait(900) == 0, again.output()
    rows = json_of(again)
    assert sorted(row["number"] for row in rows) == list(range(1, 13))
    assert {row["state"] for row in rows} == {"complete", "stopped"}
    for trial in folder.trials("killed"):
        assert before.get(trial.number, trial) == trial or trial.state == "stopped"
        assert trial.values == {
            "adapter.rank": 2 if trial.number < 7 else 4,
            "optimizer.lr": float(LRS[(trial.number - 1) % 6]),
        }
    values = [row["value"] for row in rows]
    assert values == sorted(values)


@pytest.mark.night
@pytest.mark.timeout(1800)
def test_killed_or_not_the_result_is_the_same(folder: SweepFolder) -> None:
    """Without a stopping rule a sweep is deterministic: each trial's value is that of an undisturbed one."""
    words = ("optimizer.lr=1e-4,1e-3,1e-2", "--parallel", "1", "--json")
    whole = folder.start("whole", *words, steps=100)
    assert whole.wait(300) == 0, whole.output()
    for moment in (r"-001: optimizer", r"-002: eval_loss .* after step 40"):
        command = folder.start("broken", *words, steps=100)
        until(command, moment)
        psutil.Process(command.process.pid).kill()
        command.process.wait(20)
    last = folder.start("broken", *words, steps=100)
    assert last.wait(300) == 0, last.output()
    assert results(json_of(last)) == results(json_of(whole))


def results(rows: Sequence[dict[str, Any]]) -> list[tuple[Any, ...]]:
    return [(row["number"], row["values"], row["step"], row["value"], row["best"]) for row in rows]


@pytest.mark.night
def test_a_trial_whose_driver_is_killed_continues(folder: SweepFolder) -> None:
    """Also while its checkpoint commits: there is one every 20 steps."""
    command = folder.start("actor", "optimizer.lr=1e-4,1e-3", "--parallel", "1", steps=300)
    until(command, "actor-001: eval_loss .* after step 40")
    holder = read_lease(folder.storage.child("actor-001"))
    assert holder is not None
    psutil.Process(holder.holder.pid).kill()
    assert command.wait(300) == 0, command.output()
    assert [trial.state for trial in folder.trials("actor")] == ["complete", "complete"]


@pytest.mark.night
def test_a_search_of_optuna_with_ranges_and_elastic_trials(folder: SweepFolder, joined: str) -> None:
    sweep = {
        "parameters": {
            "optimizer.lr": {"min": 1e-4, "max": 1e-1, "log": True},
            "adapter.rank": {"min": 2, "max": 8},
            "adapter.target_modules": [["q_proj"], ["q_proj", "v_proj"]],
        },
        "search": "tpe",
        "stop": "median",
        "trials": 6,
        "parallel": 2,
    }
    command = folder.start("learned", "--json", steps=60, sweep=sweep, resources={"workers": [1, 4]})
    assert command.wait(400) == 0, command.output()
    rows = json_of(command)
    assert len(rows) == 6
    assert "with 1 to 2 workers each" in command.output()
    assert len({json.dumps(row["values"]) for row in rows}) == 6
    again = folder.start("learned", "--json", "--trials", "7", steps=60, sweep=sweep, resources={"workers": [1, 4]})
    assert again.wait(300) == 0, again.output()
    assert len(json_of(again)) == 7
    known = {row["number"]: row["values"] for row in rows}
    assert {row["number"]: row["values"] for row in json_of(again) if row["number"] < 7} == known
