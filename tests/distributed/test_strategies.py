"""Every strategy on any number of ranks trains like one process: losses to 1e-5 over 10 steps, the same samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.training import adapter_bytes, ledger, losses, run_of, small_recipe, train_in_processes, write_pairs
from trainer.recipe import Recipe
from trainer.recipe.strategies import STRATEGIES
from trainer.run import layout
from trainer.run.jsonl import read_rows

MODELS: dict[str, dict[str, Any]] = {
    "lora": {
        "adapter.method": "lora",
        # What is of training only, and must not be in an evaluation.
        **{"sft.neftune_alpha": 5.0, "sft.label_smoothing": 0.1, "data.eval_fraction": 0.2, "training.eval_every": 5},
    },
    "dora": {"adapter.method": "dora"},
    "full": {"adapter.method": "none", "optimizer.lr": 1e-3},
    "qlora": {"adapter.method": "lora", "model.quantization": "nf4"},
    "qdora": {"adapter.method": "dora", "model.quantization": "nf4"},
    "lora-int8": {"adapter.method": "lora", "model.quantization": "int8"},
    "bfloat16": {"model.dtype": "bfloat16"},
    "full-bfloat16": {"adapter.method": "none", "optimizer.lr": 1e-3, "model.dtype": "bfloat16"},
    "float16": {"model.dtype": "float16"},
    "checkpointing": {"training.gradient_checkpointing": True},
}
PLACES: dict[str, dict[str, Any]] = {
    **{kind: {"strategy.kind": kind} for kind in STRATEGIES.names()},
    "fsdp-offload": {"strategy": {"kind": "fsdp", "offload": True, "reshard_after_forward": False}},
    "zero2-offload": {"strategy": {"kind": "zero2", "deepspeed": "zero2_offload"}},
    "zero3-offload": {"strategy": {"kind": "zero3", "deepspeed": "zero3_offload"}},
}
OFFLOADED = ("lora", "full", "qlora")
TOLERANCE = 1e-5
# Rounding in the forward depends on nothing but the micro-batch; what differs is the order in which gradients add up,
# and what that does to numbers that are rounded to 8 or 11 bits afterwards. Under ZeRO, full fine-tuning in bfloat16
# computes in bfloat16 throughout, where the others have autocast.
MIXED_TOLERANCE = {"bfloat16": 5e-3, "full-bfloat16": 5e-3, "float16": 5e-3}


def _recipe(model: str, place: str, ranks: int, tiny_model: Path, folder: Path) -> Recipe:
    return small_recipe(f"{model}-{place}-{ranks}", tiny_model, folder, **MODELS[model], **PLACES[place])


def _allowed(model: str, place: str) -> bool:
    row = STRATEGIES[place.removesuffix("-offload")]
    if (model == "float16" and row.zero_stage) or (model == "lora-int8" and row.shards != "nothing"):
        return False  # the recipe refuses it
    return not place.endswith("-offload") or model in OFFLOADED


def _ranks(model: str, place: str) -> tuple[int, ...]:
    """Three ranks where a method's tensors are cut unevenly, two everywhere."""
    row = STRATEGIES.get(place)
    return (2, 3) if row and row.shards != "nothing" and model in ("lora", "qdora", "full") else (2,)


EVERY = [(m, place, n) for m in MODELS for place in PLACES if _allowed(m, place) for n in _ranks(m, place)]
"""All of them for the night; by day those that have caught something, or that nothing else stands for."""
BY_DAY = [
    *(("lora", place, 2) for place in PLACES),
    ("full", "fsdp", 2),
    ("qdora", "fsdp", 3),
    ("qdora", "zero3", 3),
    ("full-bfloat16", "zero3", 2),
]
CELLS = [pytest.param(*cell, marks=[] if cell in BY_DAY else [pytest.mark.night]) for cell in EVERY]


@pytest.fixture(scope="module")
def runs(
    request: pytest.FixtureRequest, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str, int], Recipe]:
    folder = tmp_path_factory.mktemp("strategies")
    write_pairs(folder / "data" / "a.jsonl", 90)
    by_night = any(item.get_closest_marker("night") for item in request.session.items)
    cells = [*((model, "ddp", 1) for model in MODELS), *(EVERY if by_night else BY_DAY)]
    made = {cell: _recipe(*cell, tiny_model, folder) for cell in cells}
    for ranks in (1, 2, 3):
        train_in_processes([recipe for (_, _, n), recipe in made.items() if n == ranks], ranks)
    return made


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("model", "place", "ranks"), CELLS)
def test_trains_like_one_process(runs: dict[tuple[str, str, int], Recipe], model: str, place: str, ranks: int) -> None:
    one, many = runs[model, "ddp", 1], runs[model, place, ranks]
    want, got = losses(one), losses(many)
    assert list(want) == list(got) == list(range(1, 11))
    assert want[10] < want[1], "it learns"
    worst = max(abs(got[s] - want[s]) / want[s] for s in want)
    assert worst <= MIXED_TOLERANCE.get(model, TOLERANCE), f"{worst:.1e}"
    assert ledger(many) == ledger(one)
    assert len(_evaluated(one)) == 2 * ("training.eval_every" in MODELS[model])
    assert _evaluated(many) == pytest.approx(_evaluated(one), rel=MIXED_TOLERANCE.get(model, TOLERANCE))


def _evaluated(recipe: Recipe) -> list[float]:
    return [row["eval_loss"] for row in read_rows(run_of(recipe), layout.METRICS) if "eval_loss" in row]


def _started(recipe: Recipe) -> dict[str, Any]:
    return next(e for e in read_rows(run_of(recipe), layout.EVENTS) if e["event"] == "start")["strategy"]


def test_what_was_wrapped_is_what_the_recipe_asks_for(runs: dict[tuple[str, str, int], Recipe]) -> None:
    ddp, fsdp = _started(runs["lora", "ddp", 2]), _started(runs["qdora", "fsdp", 3])
    assert ddp["sharded_bytes"] == [ddp["total_bytes"]] * 2
    assert sum(fsdp["sharded_bytes"]) == pytest.approx(fsdp["total_bytes"], rel=0.03)
    assert max(fsdp["sharded_bytes"]) < fsdp["total_bytes"] / 3 * 1.2
    assert any("layers.1" in name for name in fsdp["wrapped"])
    assert "" in fsdp["wrapped"]


def test_zero_says_what_it_keeps_whole(runs: dict[tuple[str, str, int], Recipe]) -> None:
    zero2, zero3 = _started(runs["lora", "zero2", 2]), _started(runs["full-bfloat16", "zero3", 2])
    assert zero2["sharded_bytes"] == [zero2["total_bytes"]] * 2
    assert max(zero3["sharded_bytes"]) < zero3["total_bytes"] / 2 * 1.2
    assert zero3["wrapped"] == ["", "model.layers.0", "model.layers.1"]
    # Adapters this small stay whole beside their slices, and are counted.
    assert sum(_started(runs["lora", "zero3", 2])["sharded_bytes"]) > _started(runs["lora", "zero3", 2])["total_bytes"]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("model", ["lora", pytest.param("full-bfloat16", marks=pytest.mark.night)])
def test_a_run_moves_between_strategies_and_world_sizes(model: str, tiny_model: Path, tmp_path: Path) -> None:
    """With its optimizer state: forgetting the moments would show in the first step after a move."""
    write_pairs(tmp_path / "data" / "a.jsonl", 90)
    moves = [("ddp", 2), ("fsdp", 3), ("zero2", 2), ("zero3", 3), ("fsdp-offload", 1), ("zero3-offload", 2)]
    for i, (place, ranks) in enumerate(moves):
        stop = {} if i == len(moves) - 1 else {"training.stop_after": 2 * (i + 1)}
        changes = {**MODELS[model], **PLACES[place], "training.steps": 2 * len(moves), **stop}
        train_in_processes([small_recipe("moving", tiny_model, tmp_path, **changes)], ranks)
    staying = small_recipe("staying", tiny_model, tmp_path, **MODELS[model], **{"training.steps": 2 * len(moves)})
    train_in_processes([staying], 1)
    want, got = losses(staying), losses(small_recipe("moving", tiny_model, tmp_path))
    assert list(want) == list(got)
    worst = max(abs(got[s] - want[s]) / want[s] for s in want)
    assert worst <= MIXED_TOLERANCE.get(model, TOLERANCE), f"{worst:.1e}"


@pytest.mark.parametrize("kind", [pytest.param("zero2", marks=pytest.mark.night), "zero3"])
def test_the_same_run_resumed_gives_the_same_bytes(kind: str, tiny_model: Path, tmp_path: Path) -> None:
    write_pairs(tmp_path / "data" / "a.jsonl", 90)
    saved = []
    for name, stops in (("whole", [None]), ("halved", [3, None])):
        for stop in stops:
            changes = {"strategy.kind": kind, "training.steps": 6, "training.stop_after": stop}
            recipe = small_recipe(name, tiny_model, tmp_path, **changes)
            train_in_processes([recipe], 2)
        saved.append(adapter_bytes(recipe))
    assert saved[0] == saved[1]


def test_exact_gives_the_same_bytes_on_any_number_of_ranks(tiny_model: Path, tmp_path: Path) -> None:
    write_pairs(tmp_path / "data" / "a.jsonl", 90)
    saved = []
    for ranks in (1, 3):
        recipe = small_recipe(f"exact-{ranks}", tiny_model, tmp_path, exact=True)
        train_in_processes([recipe], ranks)
        saved.append(adapter_bytes(recipe))
    assert saved[0] == saved[1]


def test_the_same_run_twice_gives_the_same_bytes(
    runs: dict[tuple[str, str, int], Recipe], tiny_model: Path, tmp_path: Path
) -> None:
    write_pairs(tmp_path / "data" / "a.jsonl", 90)
    again = small_recipe("again", tiny_model, tmp_path, **MODELS["lora"])
    train_in_processes([again], 2)
    assert adapter_bytes(again) == adapter_bytes(runs["lora", "ddp", 2])
