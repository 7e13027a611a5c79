"""Runs that share a base model have the losses, samples and adapters of runs alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch.multiprocessing import ProcessRaisedException

from tests.support.tasks import task_recipe, write_task_data
from tests.support.together import assert_same_runs, train_group
from tests.support.training import (
    losses,
    small_recipe,
    train_in_processes,
    write_pairs,
)
from trainer.recipe import Recipe

DIFFERENT: list[dict[str, Any]] = [
    {"adapter.rank": 4, "optimizer.lr": 1e-2, "adapter.dropout": 0.2},
    {"adapter.rank": 8, "adapter.alpha": 4, "seed": 3, "optimizer.lr": 3e-3, "training.steps": 5},
    {"adapter.method": "rslora", "adapter.rank": 2, "training.global_batch": 6, "schedule.name": "linear"},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("together")
    write_pairs(folder / "data" / "pairs.jsonl", 60)
    return folder


def group(name: str, model: Path, folder: Path, **changes: Any) -> list[Recipe]:
    return [
        small_recipe(f"{name}-{n}", model, folder, **{**changes, **different}) for n, different in enumerate(DIFFERENT)
    ]


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("kind", "ranks"), [("ddp", 1), ("fsdp", 2)])
@pytest.mark.parametrize("packing", [True, False])
def test_runs_together_are_those_alone(kind: str, ranks: int, packing: bool, tiny_model: Path, folder: Path) -> None:
    changes = {"strategy.kind": kind, "data.packing": packing, "samples.count": 2, "data.eval_fraction": 0.2}
    changes |= {"training.eval_every": 2, "training.gradient_checkpointing": packing}
    alone = group(f"alone-{kind}-{packing}", tiny_model, folder, **changes)
    together = group(f"together-{kind}-{packing}", tiny_model, folder, **changes)
    train_in_processes(alone, ranks)
    train_group(together, ranks)
    for one, other in zip(alone, together, strict=True):
        assert_same_runs(one, other)


@pytest.mark.night
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("ranks", "changes"),
    [
        (2, {"strategy.kind": "ddp"}),
        (2, {"exact": True}),
        (2, {"strategy.kind": "fsdp", "model.quantization": "nf4"}),
        (1, {"model.quantization": "nf4", "training.gradient_checkpointing": True}),
        (3, {"strategy.kind": "fsdp", "optimizer.name": "muon", "optimizer.weight_decay": 0.1}),
        (1, {"optimizer.name": "schedule_free_adamw", "schedule.name": "constant", "data.eval_fraction": 0.2}),
    ],
)
def test_strategies_optimizers_and_packed_weights(
    ranks: int, changes: dict[str, Any], tiny_model: Path, folder: Path
) -> None:
    different = [{**one, "schedule.name": "constant"} for one in DIFFERENT] if "schedule.name" in changes else DIFFERENT
    name = "-".join(map(str, [ranks, *changes.values()]))
    alone, together = (
        [
            small_recipe(f"{kind}-{name}-{n}", tiny_model, folder, **{**changes, **one})
            for n, one in enumerate(different)
        ]
        for kind in ("alone", "together")
    )
    train_in_processes(alone, ranks)
    train_group(together, ranks)
    for one, other in zip(alone, together, strict=True):
        assert_same_runs(one, other)


@pytest.mark.night
@pytest.mark.timeout(300)
@pytest.mark.parametrize("task", ["dpo", "kto", "orpo", "simpo"])
def test_tasks_that_compare_answers(task: str, tiny_model: Path, tmp_path: Path) -> None:
    write_task_data(tmp_path, task)
    alone, together = (
        [
            task_recipe(task, f"{kind}-{n}", tiny_model, tmp_path, **{"training.steps": 4, **one})
            for n, one in enumerate(DIFFERENT[:2])
        ]
        for kind in ("alone", "together")
    )
    train_in_processes(alone, 2)
    train_group(together, 2)
    for one, other in zip(alone, together, strict=True):
        assert_same_runs(one, other)


@pytest.mark.timeout(120)
def test_a_run_that_diverges_ends_alone(tiny_model: Path, folder: Path) -> None:
    changes = [{"optimizer.lr": 1e-3}, {"optimizer.lr": 1e30, "training.max_grad_norm": None}]
    recipes = [small_recipe(f"diverges-{n}", tiny_model, folder, **one) for n, one in enumerate(changes)]
    alone = small_recipe("does-not-diverge", tiny_model, folder, **changes[0])
    train_in_processes([alone], 1)
    with pytest.raises(ProcessRaisedException, match=r"run diverges-1: .*not finite"):
        train_group(recipes, 1)
    assert_same_runs(alone, recipes[0])
    assert len(losses(recipes[1])) < 10
