"""The last lines of a run: what it learned, and commands that can be copied."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest

from tests.storage.doubles import faulty, unreachable
from tests.support.training import small_recipe
from tests.unit.trainer.progress.test_progress import step_row, write_rows
from trainer.progress.ending import last_lines
from trainer.storage import Storage, open_storage


@pytest.fixture
def run(tmp_path: Path) -> Storage:
    return open_storage(str(tmp_path / "runs" / "mine"))


def evaluation(step: int, loss: float | None, attempt: int = 1) -> dict[str, Any]:
    return {"attempt": attempt, "step": step, "eval_loss": loss, "eval_s": 4.0}


def test_a_run_ends_with_a_summary_and_three_commands(run: Storage, tmp_path: Path) -> None:
    rows = [step_row(n, loss=9.0 - n, tokens=1000, stall_s=0.5) for n in range(1, 4)]
    again = [step_row(n, attempt=2, loss=8.5 - n, tokens=1100) for n in range(3, 13)]
    write_rows(run, "metrics/a000001-000000.jsonl", *rows, evaluation(2, 6.1), evaluation(3, 7.0))
    write_rows(run, "metrics/a000002-000000.jsonl", *again, evaluation(12, 5.25, attempt=2))
    adapter = run.uri("adapter")
    summary, *commands = last_lines(small_recipe("mine", Path("base"), tmp_path), run, adapter)
    assert summary == "loss 8 → -3.5, eval 6.1 → 5.25, 12 steps, 0:20, 13,000 tokens"
    assert [shlex.split(command)[:2] for command in commands] == [
        ["muster", "chat"],
        ["muster", "report"],
        ["vllm", "serve"],
    ]
    assert commands[:2] == [f"muster chat --run {run.url}", f"muster report {run.url}"]
    assert adapter in commands[2]


def test_what_is_not_known_is_left_out_and_what_does_not_work_too(run: Storage, tmp_path: Path) -> None:
    write_rows(run, "metrics/a000001-000000.jsonl", step_row(1, tokens=10))
    pairs = {"data": {"train": [{"path": "d.jsonl", "format": "preference"}], "packing": False}, "task": "reward"}
    recipe = small_recipe("mine", Path("base"), tmp_path, **pairs)
    measured = f"muster evaluate --run {run.url} 'data.eval=[{{path: FILE, format: preference}}]'"
    assert list(last_lines(recipe, run, "a")) == [
        "loss 2, 1 step, 0:00, 10 tokens",
        measured,
        f"muster report {run.url}",
    ]


def test_a_storage_that_fails_costs_the_summary_only(tmp_path: Path) -> None:
    storage, backend = faulty(deadline_s=0.1)
    backend.before = unreachable
    recipe = small_recipe("mine", Path("base"), tmp_path)
    assert [line.split()[0] for line in last_lines(recipe, storage, "a")] == ["muster", "muster", "vllm"]
