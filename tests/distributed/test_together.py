"""Runs that share a base model have the losses, samples and adapters of runs alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch.multiprocessing import ProcessRaisedException

from tests.support.tasks import task_recipe, write_task_data
from tests.support.together import ALL, assert_same_runs, texts, train_group
from tests.support.training import losses, run_of, small_recipe, train_in_processes, write_pairs
from trainer.recipe import Recipe
from trainer.run import layout
from trainer.run.jsonl import read_rows

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
@pytest.mark.parametrize(
    ("kind", "ranks", "packing"), [pytest.param("ddp", 1, False, marks=pytest.mark.night), ("fsdp", 2, True)]
)
def test_runs_together_are_those_alone(kind: str, ranks: int, packing: bool, tiny_model: Path, folder: Path) -> None:
    changes = {"strategy.kind": kind, "data.packing": packing, "data.eval_fraction": 0.2}
    changes |= {"samples.count": 2, "samples.max_new_tokens": 8}  # short enough for the packs
    changes |= {"training.eval_every": 2, "training.gradient_checkpointing": packing}
    alone = group(f"alone-{kind}-{packing}", tiny_model, folder, **changes)
    together = group(f"together-{kind}-{packing}", tiny_model, folder, **changes)
    train_in_processes(alone, ranks)
    train_group(together, ranks)
    for one, other in zip(alone, together, strict=True):
        assert len(texts(one)) == 2, "texts before and after training"
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
        (4, {"strategy.kind": "fsdp", "strategy.replicas": 2, "resources.workers": 4}),
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
    with pytest.raises(ProcessRaisedException, match=r"run diverges-1: .*not finite"):
        train_group(recipes, 1)  # the other is complete


@pytest.mark.night
@pytest.mark.timeout(300)
def test_runs_that_begin_from_an_adapter_and_stop_early(tiny_model: Path, folder: Path) -> None:
    before = small_recipe("before", tiny_model, folder, **{"training.steps": 3})
    train_in_processes([before], 1)
    changes = {
        "adapter.from": before.run_uri,
        "data.eval_fraction": 0.2,
        "training.eval_every": 1,
        "training.early_stop": {"metric": "eval_loss", "patience": 1},
        "checkpoint.keep_best": "eval_loss",
        "optimizer.lr": 0.1,
    }
    alone, together = (
        [small_recipe(f"{kind}-begun-{n}", tiny_model, folder, **changes, seed=n) for n in range(3)]
        for kind in ("alone", "together")
    )
    train_in_processes(alone, 2)
    train_group(together, 2)
    assert len({len(losses(one)) for one in alone} | {10}) > 1, "one stops early"
    for one, other in zip(alone, together, strict=True):
        assert_same_runs(one, other)


@pytest.mark.night
@pytest.mark.timeout(300)
def test_a_run_that_is_stopped_leaves_and_continues_later(tiny_model: Path, folder: Path) -> None:
    alone = [small_recipe(f"whole-{n}", tiny_model, folder, seed=n) for n in range(3)]
    together = [small_recipe(f"stopped-{n}", tiny_model, folder, seed=n) for n in range(3)]
    train_in_processes(alone, 1)
    with pytest.raises(ProcessRaisedException, match="run stopped-1: stopped after step 4"):
        train_group(together, 1, stops={1: 4})
    assert [len(losses(one)) for one in together] == [10, 4, 10]
    train_group(together, 2)
    for one, other in zip(alone, together, strict=True):
        assert_same_runs(one, other)
    attempts = {row["attempt"] for row in read_rows(run_of(together[0]), layout.EVENTS)}
    assert attempts == {1}, "a run that is complete is left out"


@pytest.mark.timeout(120)
def test_a_group_whose_runs_are_complete_has_nothing_to_do(tiny_model: Path, folder: Path) -> None:
    """As after the death of a rank behind the last commit."""
    recipes = [small_recipe(f"complete-{n}", tiny_model, folder, **{"training.steps": 2}) for n in range(2)]
    train_group(recipes, 1)
    train_group(recipes, 1)


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("whose", "said"),
    [("all", r"Interrupted: run asked-all-0: stopped after step"), ("one", r"NonFiniteLoss: run asked-one-1: ")],
)
def test_a_request_to_all_runs_is_no_failure_of_one(whose: str, said: str, tiny_model: Path, folder: Path) -> None:
    """The middle run diverges at once; the first one is asked to stop later, alone or together with the others."""
    changes = {"optimizer.lr": 1e-3, "training.steps": 30}
    diverges = {"optimizer.lr": 1e30, "training.max_grad_norm": None, "training.steps": 30}
    recipes = [
        small_recipe(f"asked-{whose}-{n}", tiny_model, folder, **one)
        for n, one in enumerate([changes, diverges, {**changes, "training.steps": 30 if whose == "all" else 3}])
    ]
    with pytest.raises(ProcessRaisedException, match=said):
        train_group(recipes, 1, stops={ALL: 40} if whose == "all" else {0: 15})
