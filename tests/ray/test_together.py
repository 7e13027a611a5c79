"""Runs that share a base model on Ray: killed in the middle, they are still what each of them would be alone."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.support.jobs import muster_run, wait_for_step, workers
from tests.support.together import assert_same_runs
from tests.support.training import small_recipe, train_in_processes, write_pairs
from trainer.recipe import Recipe, dump
from trainer.recipe.document import read_yaml
from trainer.recipe.sweeps.variants import variants
from trainer.run import layout
from trainer.run.jsonl import read_rows
from trainer.run.lease import read_lease
from trainer.storage import open_storage

ADAPTERS: dict[str, dict[str, Any]] = {
    f"{n}": {"optimizer.lr": 1e-3 * n, "adapter.rank": [2, 4, 8][n % 3], "seed": n, "training.steps": 40 + n}
    for n in range(1, 9)
}


@pytest.mark.night
@pytest.mark.ray
@pytest.mark.timeout(900)
def test_eight_runs_killed_twice_are_eight_runs_alone(tiny_model: Path, tmp_path: Path) -> None:
    write_pairs(tmp_path / "data" / "pairs.jsonl", 60)
    changes: dict[str, Any] = {"strategy.kind": "fsdp", "resources.workers": 2, "checkpoint.every_steps": 7}
    group = small_recipe("group", tiny_model, tmp_path, **changes, adapters=ADAPTERS)
    runs = of_group(group)
    command = muster_run(group, tmp_path)
    wait_for_step(runs[0], 12, command)
    os.kill(workers(runs[0])[1], signal.SIGKILL)  # a worker: the driver starts the others again
    wait_for_step(runs[3], 25, command)
    command.kill(workers(runs[0]))  # the driver
    again = muster_run(group, tmp_path)
    assert again.wait(600) == 0, again.output()
    alone = [
        recipe.model_copy(update={"name": f"alone-{n}", "storage": str(tmp_path / "alone")})
        for n, recipe in enumerate(runs)
    ]
    train_in_processes(alone, 2)
    for one, other in zip(alone, runs, strict=True):
        assert_same_runs(one, other)
        run = open_storage(other.run_uri)
        lease = read_lease(run)
        assert lease is not None
        assert lease.state == "succeeded"
        assert {row["attempt"] for row in read_rows(run, layout.METRICS)} >= {1, 2, 3}


def of_group(group: Recipe) -> list[Recipe]:
    data = read_yaml(dump(group)).data
    return variants(data)
