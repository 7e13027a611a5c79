"""A short run against losses that were kept: what changes them is a change of the training, wanted or not.

The losses are compared to ``TOLERANCE``: another CPU sums in another order, and ten steps let that grow. They are
written anew with ``pytest tests/unit/trainer/worker/test_golden.py --rewrite-golden``, in a commit that says why they
changed.
"""

from __future__ import annotations

import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from tests.support.training import losses, small_recipe, train_here, write_pairs

GOLDEN = Path(__file__).resolve().parents[3] / "golden"
TOLERANCE = 1e-4
RUNS: dict[str, dict[str, Any]] = {
    "lora": {},
    "qdora": {"adapter.method": "dora", "model.quantization": "nf4", "schedule": {"name": "cosine", "warmup_steps": 3}},
}
LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "tokenizers")


@pytest.mark.parametrize("name", RUNS)
def test_a_run_gives_the_losses_that_were_kept(
    name: str, tiny_model: Path, tmp_path: Path, rewrite_golden: bool
) -> None:
    write_pairs(tmp_path / "data" / "a.jsonl", 60)
    # No dropout: how torch draws its masks differs between processor families.
    recipe = small_recipe(name, tiny_model, tmp_path, **{"adapter.dropout": 0.0, **RUNS[name]})
    assert train_here(recipe) == "succeeded"
    got = [loss for _, loss in sorted(losses(recipe).items())]
    file = GOLDEN / f"{name}.json"
    if rewrite_golden:
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps({"losses": got, "origin": origin()}, indent=2) + "\n")
    kept = json.loads(file.read_text())
    assert len(kept["losses"]) == 10
    assert got == pytest.approx(kept["losses"], rel=TOLERANCE), f"kept losses are of {kept['origin']}"


def origin() -> dict[str, Any]:
    return {
        "test": "tests/unit/trainer/worker/test_golden.py",
        "processes": 1,
        "machine": platform.machine(),
        "python": platform.python_version(),
        **{name: version(name) for name in LIBRARIES},
    }
