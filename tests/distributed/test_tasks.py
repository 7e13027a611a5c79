"""Every task gives the same run on any number of ranks: losses and metrics to 1e-5, the same samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.ranks import run_ranks
from tests.support.tasks import make_encoder, task_recipe, write_task_data
from tests.support.training import adapter_bytes, ledger, run_of, train_in_processes, train_rank
from trainer.recipe import Recipe
from trainer.recipe.tasks import TASKS, compared_metrics
from trainer.run import layout
from trainer.run.jsonl import read_rows
from trainer.tasks.lm_head_loss import TargetHead

PLACES = [("ddp", 1), ("ddp", 2), ("fsdp", 2), ("zero3", 2), ("fsdp", 3)]
BY_DAY = [("ddp", 1), ("fsdp", 2)]
ALSO_BY_DAY = ("sft", ("ddp", 2))
# Three micro-batches a step: on two ranks, one of them gets a micro-batch of weight zero.
ENCODER = "classification of an encoder"
WRITING = ("sft", "dpo", "ppo")
SAMPLES = {"count": 3, "max_new_tokens": 6}
TIMES = {
    *("time", "step_s", "eval_s", "stall_s", "checkpoint_age_s", "backlog", "world_size", "attempt", "memory_bytes"),
    *(
        "tokens_per_s",
        "rollout_s",
        "tokens_per_s_per_worker",
        "slowest_rank",
        "slowest_rank_s",
        "mean_rank_s",
        "rank_s",
        "memory_rank",
    ),
}


@pytest.fixture(scope="module")
def runs(
    request: pytest.FixtureRequest, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str, int], Recipe]:
    folder = tmp_path_factory.mktemp("tasks")
    by_night = any(item.get_closest_marker("night") for item in request.session.items)
    encoder = make_encoder(folder / "encoder")
    bases = {task: (task, tiny_model) for task in TASKS.names()} | {ENCODER: ("classification", encoder)}
    for task in TASKS.names():
        write_task_data(folder, task)
    made: dict[tuple[str, str, int], Recipe] = {}
    for ranks in (1, 2, 3):
        batch = {
            (key, kind, ranks): task_recipe(
                task,
                f"{model.name}-{kind}-{ranks}",
                model,
                folder,
                **{"strategy.kind": kind, "training.steps": 6, "samples": SAMPLES if task in WRITING else {"count": 0}},
            )
            for key, (task, model) in bases.items()
            for kind in ("ddp", "fsdp", "zero3")
            if (kind, ranks) in (PLACES if by_night else BY_DAY) or (key, (kind, ranks)) == ALSO_BY_DAY
        }
        train_in_processes(list(batch.values()), ranks)
        made |= batch
    return made


def rows_of(recipe: Recipe) -> list[dict[str, Any]]:
    rows = read_rows(run_of(recipe), layout.METRICS)
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


def samples_of(recipe: Recipe) -> list[tuple[Any, ...]]:
    events = [e for e in read_rows(run_of(recipe), layout.EVENTS) if e["event"] == "texts" and "when" in e]
    return [(e["step"], e["when"], [(text["sample"], text["text"]) for text in e["texts"]]) for e in events]


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("task", "kind", "ranks"),
    [
        pytest.param(task, *place, marks=[] if place in BY_DAY or (task, place) == ALSO_BY_DAY else pytest.mark.night)
        for task in (*TASKS.names(), ENCODER)
        for place in PLACES[1:]
    ],
)
def test_a_task_does_not_know_how_many_ranks_there_are(runs: Any, task: str, kind: str, ranks: int) -> None:
    one, many = runs[task, "ddp", 1], runs[task, kind, ranks]
    wanted, got = rows_of(one), rows_of(many)
    assert sum("eval_loss" in row for row in wanted) == 2
    assert compared_metrics(one).keys() <= next(row for row in wanted if "eval_loss" in row).keys()
    for want, row in zip(wanted, got, strict=True):
        assert row == pytest.approx(want, rel=1e-4, abs=1e-5)
        for name in {"loss", "eval_loss"} & want.keys():
            assert row[name] == pytest.approx(want[name], rel=1e-5)
    assert ledger(many) == ledger(one)
    assert samples_of(many) == samples_of(one)
    told = [(step, when, len(texts)) for step, when, texts in samples_of(one)]
    assert told == ([(0, "before", 3), (6, "after", 3)] if task in WRITING else [])


@pytest.mark.night
@pytest.mark.timeout(900)
def test_an_exact_run_is_the_same_on_any_number_of_ranks(tiny_model: Path, tmp_path: Path) -> None:
    exact = {"exact": True, "training.steps": 3, "training.eval_every": None}
    recipes: dict[int, list[Recipe]] = {1: [], 2: []}
    for task in TASKS.names():
        write_task_data(tmp_path, task)
        for ranks, its in recipes.items():
            its.append(task_recipe(task, f"exact-{ranks}", tiny_model, tmp_path, **exact))
    for ranks, its in recipes.items():
        train_in_processes(its, ranks)
    differ = [a.task for a, b in zip(*recipes.values(), strict=True) if adapter_bytes(a) != adapter_bytes(b)]
    assert differ == []


def train_with_a_rank_that_cannot_write(rank: int, recipes: list[Recipe]) -> None:
    """Under ddp one of them fails, in its third forward; where forwards meet, both do."""
    plain = TargetHead.last_logits
    for recipe in recipes:
        calls: list[int] = []

        def failing(self: TargetHead, module: Any, calls: list[int] = calls, **inputs: Any) -> Any:
            calls.append(1)
            made = plain(self, module, **inputs)
            if len(calls) == 3 and (rank == 1 or recipe.strategy.kind == "fsdp"):  # noqa: B023 - called at once
                raise TypeError("a cache of another kind")
            return made

        TargetHead.last_logits = failing  # type: ignore[method-assign]
        train_rank(rank, [recipe])
        assert len(calls) == 3


@pytest.mark.timeout(120)
def test_ranks_that_cannot_write_train_on_together(runs: Any) -> None:
    broken = {}
    for kind in ("ddp", "fsdp"):
        whole = runs["sft", kind, 2]
        broken[kind] = whole.model_copy(update={"name": f"broken-{kind}"})
    run_ranks(train_with_a_rank_that_cannot_write, 2, list(broken.values()))
    for kind, recipe in broken.items():
        assert samples_of(recipe) == []
        assert rows_of(recipe) == rows_of(runs["sft", kind, 2])
