"""A run whose data is still being prepared when it begins trains on the samples that it would have trained on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.jobs import muster_run
from tests.support.training import run_of, small_recipe
from trainer.data import PreparationSpec, PreparedDataset, Stream, open_prepared
from trainer.run import layout
from trainer.run.frozen import read_recipe
from trainer.run.jsonl import read_rows
from trainer.storage import open_storage

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

ROWS, PADDING = 60, 1_700_000
STEPS = 13


def write_wide_rows(path: Path) -> None:
    """Few samples in many bytes: three windows, which cost nothing to tokenise."""
    path.parent.mkdir(parents=True)
    with path.open("w") as file:
        for i in range(ROWS):
            row = {"prompt": f"Q{i}? ", "completion": "a ferry " * (1 + i % 5), "unused": "x" * PADDING}
            file.write(json.dumps(row) + "\n")


@pytest.mark.night
def test_it_trains_on_what_it_would_have_trained_on(joined: str, tiny_model: Path, tmp_path: Path) -> None:
    write_wide_rows(tmp_path / "data" / "wide.jsonl")
    changes = {"data.packing": False, "training": {"steps": STEPS, "global_batch": 4, "micro_batch": 2}}
    recipe = small_recipe("early", tiny_model, tmp_path, **changes, **{"resources.workers": 2})
    command = muster_run(recipe, tmp_path)
    assert command.wait() == 0, command.output()[-3000:]
    # Whether the other windows are still missing when training begins depends on the machine; that it may begin without
    # them is shown by tests/unit/trainer/data/test_early.py. What is fed is the same either way.
    run = run_of(recipe)
    shared = open_storage(recipe.storage).child(layout.PREPARED)
    spec = PreparationSpec.from_json(run.read_json(layout.DATA)["train"])
    prepared = open_prepared(shared, spec.fingerprint)
    assert prepared is not None
    assert prepared.count == 3
    fed = {(r["step"], r["micro_batch"]): r["samples"] for r in read_rows(run, layout.LEDGER)}
    assert fed == planned(prepared, read_recipe(run).seed)


def planned(prepared: PreparedDataset, seed: int) -> dict[tuple[int, int], list[str]]:
    stream = Stream(
        prepared,
        open_storage("memory://planned-here"),
        seed=seed,
        sequence_length=prepared.spec.sequence_length,
        packing=False,
        weights=[1.0],
        global_batch=4,
        micro_batch=2,
    )
    with stream.prefetch(stream.start(), 0, 1, steps=STEPS) as steps:
        return {(n, b.index): b.sample_ids for n, step in enumerate(steps, 1) for b in step.batches}
