"""Distillation on several ranks: the losses and metrics of one, whatever the strategy, for both kinds of teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.tasks import make_teacher, task_recipe, write_task_data
from tests.support.training import adapter_bytes, run_of, train_here, train_in_processes
from trainer.recipe import Recipe
from trainer.run import layout
from trainer.run.jsonl import read_rows

PLACES = [("ddp", 1), ("ddp", 2), ("fsdp", 2), ("zero2", 2), ("zero3", 2), ("fsdp", 3)]
BY_DAY = [("adapted", "zero2", 2), ("stored", "fsdp", 2)]
METRICS = ("eval_loss", "eval_perplexity", "eval_teacher_perplexity", "eval_agreement")
TEACHERS: dict[str, dict[str, Any]] = {
    "model": {"distill.top_k": 20},
    "nf4": {"distill.quantization": "nf4"},
    "shared": {"distill.loss": "reverse_kl", "distill.beta": 0.5},
    "adapted": {},
    "stored": {"distill.top_k": 20, "distill.store": True},
}
"""The kinds of teacher, and what else differs: a second model, the same in 4 bits, an adapter on the student's base
model, an adapter on another one, and a second model whose outputs each run computes and stores."""
FEW = {"training.steps": 4, "training.eval_every": None, "checkpoint.every_steps": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    folder = tmp_path_factory.mktemp("distill")
    for task in ("distill", "sft"):
        write_task_data(folder, task)
    return folder


@pytest.fixture(scope="module")
def teachers(tiny_model: Path, folder: Path) -> dict[str, str]:
    other = make_teacher(folder / "teacher", tiny_model)
    few = {"optimizer.lr": 2e-2, "training.eval_every": None, "training.steps": 3}
    runs = {
        "shared": task_recipe("sft", "teacher", tiny_model, folder, **few),
        "adapted": task_recipe("sft", "adapted", other, folder, **few, **{"adapter": {"method": "dora", "rank": 2}}),
    }
    for recipe in runs.values():
        assert train_here(recipe) == "succeeded"
    places = {kind: run_of(recipe).url for kind, recipe in runs.items()}
    return {**places, **dict.fromkeys(("model", "nf4", "stored"), str(other))}


@pytest.fixture(scope="module")
def runs(
    request: pytest.FixtureRequest, tiny_model: Path, folder: Path, teachers: dict[str, str]
) -> dict[tuple[str, str, int], Recipe]:
    by_night = any(item.get_closest_marker("night") for item in request.session.items)
    cells = [(teacher, *place) for teacher in TEACHERS for place in PLACES]
    if not by_night:
        cells = [*BY_DAY, *{(teacher, "ddp", 1) for teacher, *_ in BY_DAY}]
    made: dict[tuple[str, str, int], Recipe] = {}
    for ranks in (1, 2, 3):
        some = {
            (teacher, kind, ranks): task_recipe(
                "distill",
                f"{teacher}-{kind}-{ranks}",
                tiny_model,
                folder,
                **{**FEW, **TEACHERS[teacher], "distill.teacher": teachers[teacher], "strategy.kind": kind},
                storage=str(folder / f"{teacher}-{kind}-{ranks}"),
            )
            for teacher, kind, n in cells
            if n == ranks
        }
        if some:
            train_in_processes(list(some.values()), ranks)
        made |= some
    return made


def rows_of(recipe: Recipe, name: str) -> list[dict[str, Any]]:
    return [row for row in read_rows(run_of(recipe), layout.METRICS) if name in row]


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("teacher", "kind", "ranks"),
    [
        pytest.param(teacher, *place, marks=[] if (teacher, *place) in BY_DAY else pytest.mark.night)
        for teacher in TEACHERS
        for place in PLACES[1:]
    ],
)
def test_one_rank_and_several_learn_the_same(runs: Any, teacher: str, kind: str, ranks: int) -> None:
    one, many = runs[teacher, "ddp", 1], runs[teacher, kind, ranks]
    losses = [[row["loss"] for row in rows_of(recipe, "loss")] for recipe in (one, many)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    ((want,), (got,)) = (rows_of(recipe, "eval_loss") for recipe in (one, many))
    assert {name: got[name] for name in METRICS} == pytest.approx({name: want[name] for name in METRICS}, rel=1e-5)
    begun = next(e for e in read_rows(run_of(many), layout.EVENTS) if e["event"] == "start")
    assert begun["models"]["teacher"]["location"] == many.distill.teacher


@pytest.mark.night
@pytest.mark.timeout(600)
@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize(("kind", "ranks"), [("ddp", 1), ("ddp", 2), ("fsdp", 2)])
@pytest.mark.parametrize("teacher", ["model", "shared"])
def test_stored_outputs_teach_as_the_teacher_does(
    tiny_model: Path, folder: Path, teachers: dict[str, str], teacher: str, kind: str, ranks: int, packing: bool
) -> None:
    changes = {**FEW, "distill.teacher": teachers[teacher], "distill.top_k": 20, "distill.loss": "forward_kl"}
    changes |= {"distill.beta": 0.5, "strategy.kind": kind, "data.packing": packing}
    name = f"{teacher}-{kind}-{ranks}-{packing}"
    online, stored = (
        task_recipe(
            "distill", name, tiny_model, folder, **changes, **{"distill.store": s, "storage": f"{folder}/{name}-{s}"}
        )
        for s in (False, True)
    )
    train_in_processes([online, stored], ranks)
    for metric in ("loss", *METRICS):
        want, got = ([row[metric] for row in rows_of(recipe, metric)] for recipe in (online, stored))
        assert got == pytest.approx(want, rel=1e-5), metric


@pytest.mark.night
@pytest.mark.timeout(300)
@pytest.mark.parametrize("teacher", ["shared", "adapted"])
def test_exact_holds_for_it_too(tiny_model: Path, folder: Path, teachers: dict[str, str], teacher: str) -> None:
    changes = {**FEW, "exact": True, "training.steps": 2, "distill.teacher": teachers[teacher]}
    recipes = [task_recipe("distill", f"exact-{teacher}-{n}", tiny_model, folder, **changes) for n in (1, 2)]
    for ranks, recipe in enumerate(recipes, 1):
        train_in_processes([recipe], ranks)
    assert adapter_bytes(recipes[0]) == adapter_bytes(recipes[1])
