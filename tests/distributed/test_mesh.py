"""Replicas and context parallelism: every shape of the mesh trains like one process, and a run moves between shapes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.training import ledger, losses, small_recipe, train_in_processes, write_pairs
from trainer.recipe import Recipe

SHAPES: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "replicas": (4, {"strategy": {"kind": "fsdp", "replicas": 2}}),
    "context-ddp": (2, {"strategy": {"kind": "ddp", "context_parallel": 2}}),
    "context-fsdp": (2, {"strategy": {"kind": "fsdp", "context_parallel": 2}}),
    "replicas-context": (4, {"strategy": {"kind": "fsdp", "replicas": 2, "context_parallel": 2}}),
}
MODELS: dict[str, dict[str, Any]] = {
    "lora": {},
    "qlora": {"model.quantization": "nf4"},
    "checkpointing": {"training.gradient_checkpointing": True},
    "full": {"adapter": {"method": "none"}, "optimizer.lr": 1e-3},
}
TOLERANCE = 1e-5


def _recipe(model: str, shape: str, tiny_model: Path, folder: Path, **more: Any) -> Recipe:
    ranks, changes = SHAPES[shape]
    dropout = {} if model == "full" else {"adapter.dropout": 0.0}
    return small_recipe(
        f"{shape}-{model}",
        tiny_model,
        folder,
        **dropout,
        **MODELS[model],
        **changes,
        **{"resources.workers": ranks},
        **more,
    )


@pytest.fixture(scope="module")
def runs(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Recipe]:
    folder = tmp_path_factory.mktemp("mesh")
    write_pairs(folder / "data" / "a.jsonl", 90)
    made = {(model, shape): _recipe(model, shape, tiny_model, folder) for model in MODELS for shape in SHAPES}
    for ranks in (1, 2, 4):
        train_in_processes([made[m, s] for m, s in made if SHAPES[s][0] == ranks], ranks)
    return made


@pytest.mark.timeout(600)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape != "one"])
def test_trains_like_one_process(runs: dict[tuple[str, str], Recipe], model: str, shape: str) -> None:
    one, many = runs[model, "one"], runs[model, shape]
    want, got = losses(one), losses(many)
    assert list(want) == list(got) == list(range(1, 11))
    assert want[10] < want[1], "it learns"
    worst = max(abs(got[s] - want[s]) / want[s] for s in want)
    assert worst <= TOLERANCE, f"{worst:.1e}"
    assert ledger(many) == ledger(one)
