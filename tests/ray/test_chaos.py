"""A run that is killed again and again ends with the bytes and the samples of one that nobody touched.

The short one is part of the tests and always draws the same. The long one is `make chaos`; CHAOS_KILLS and CHAOS_SEED
set its length and its seed, which it prints.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.storm import Storm, rage, settings
from tests.support.training import adapter_bytes, ledger, small_recipe, train_in_processes, write_pairs

pytestmark = pytest.mark.ray
STEPS_PER_KILL = 300  # a fast machine takes a hundred of them before the metrics of the first are stored
SHORT_SEED = 9


def survive(model: Path, folder: Path, kills: int, seed: int, capsys: pytest.CaptureFixture[str]) -> Storm:
    def say(text: str) -> None:
        with capsys.disabled():
            print(text, flush=True)

    write_pairs(folder / "data" / "a.jsonl", 90)
    changes = {
        "training.steps": STEPS_PER_KILL * (kills + 1),
        "checkpoint.every_steps": 10,
        "resources": {"workers": 2, "max_failures": 1000},
    }
    undisturbed = small_recipe("undisturbed", model, folder, **changes)
    train_in_processes([undisturbed], 2)
    recipe = small_recipe("storm", model, folder, **changes)
    say(f"\n{kills} kills, seed {seed}")
    storm = rage(recipe, folder, kills, seed, say)
    say(str(storm))
    assert adapter_bytes(recipe) == adapter_bytes(undisturbed)
    assert ledger(recipe) == ledger(undisturbed)
    return storm


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
