"""A run that is killed again and again has the bytes and the samples of one that nobody touched.

The short one is one of the tests of the night and always draws the same. The long one is `make chaos`; CHAOS_KILLS and
CHAOS_SEED set its length and its seed, which it prints.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.storm import Storm, rage, settings
from tests.support.training import ledger, run_of, small_recipe, train_in_processes, write_pairs
from trainer.checkpoint import list_commits
from trainer.recipe import Recipe

pytestmark = pytest.mark.ray
STEPS = 100_000  # more than any machine takes before the last kill; the run is stopped after it
SHORT_SEED = 9


def survive(model: Path, folder: Path, kills: int, seed: int, capsys: pytest.CaptureFixture[str]) -> Storm:
    def say(text: str) -> None:
        with capsys.disabled():
            print(text, flush=True)

    write_pairs(folder / "data" / "a.jsonl", 90)
    changes = {
        "training.steps": STEPS,
        "checkpoint.every_steps": 10,
        "resources": {"workers": 2, "max_failures": 1000},
    }
    recipe = small_recipe("storm", model, folder, **changes)
    say(f"\n{kills} kills, seed {seed}")
    storm = rage(recipe, folder, kills, seed, say)
    say(str(storm))
    undisturbed = small_recipe("undisturbed", model, folder, **changes, **{"training.stop_after": storm.steps})
    train_in_processes([undisturbed], 2)
    assert newest_files(recipe, storm.steps) == newest_files(undisturbed, storm.steps)
    assert ledger(recipe) == ledger(undisturbed)
    return storm


def newest_files(recipe: Recipe, step: int) -> dict[str, str]:
    """{file: sha256} of what training goes on from, in the newest checkpoint, which is that of ``step``."""
    [newest] = list_commits(run_of(recipe), newest=1)
    assert newest.step == step
    return {name: entry["sha256"] for name, entry in newest.files.items() if name.endswith(".safetensors")}


@pytest.mark.night
@pytest.mark.timeout(600)
def test_three_kills(joined: str, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    storm = survive(tiny_model, tmp_path, 3, SHORT_SEED, capsys)
    assert len(set(storm.kills)) > 1, "another seed kills more than one kind"


@pytest.mark.chaos
@pytest.mark.timeout(7200)
def test_as_many_kills_as_you_like(
    joined: str, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    survive(tiny_model, tmp_path, *settings(), capsys)
