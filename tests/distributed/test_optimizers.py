"""A run moves between the shards of its optimizer: to the byte on as many ranks, within its precision on more."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.ranks import run_ranks
from tests.support.training import adapter_bytes, losses, small_recipe, train_rank, write_pairs
from trainer.recipe import Recipe
from trainer.recipe.base import Conflict
from trainer.recipe.compatibility import across_sections
from trainer.recipe.optimizers import OPTIMIZERS
from trainer.recipe.strategies import STRATEGIES

RATES = {"sgd": 0.2, "lion": 5e-4, "lion_8bit": 5e-4, "adafactor": 5e-2}
BY_DAY = [("adamw_8bit", "fsdp"), ("adamw_torchao_4bit", "fsdp"), ("schedule_free_adamw", "fsdp"), ("muon", "fsdp")]
STEPS, STOP = 6, 3


def recipe_of(name: str, kind: str, what: str, model: Path, folder: Path, **more: Any) -> Recipe:
    optimizer = {"name": name, "lr": RATES.get(name, 2e-3), "weight_decay": 0.01}
    return small_recipe(
        f"{name}-{kind}-{what}",
        model,
        folder,
        **{
            "adapter": {"method": "none"},
            "optimizer": optimizer,
            "strategy.kind": kind,
            "training.steps": STEPS,
            **more,
        },
    )


def refused(name: str, kind: str) -> list[Conflict]:
    fields = {"optimizer": {"name": name, "lr": 1e-3}, "strategy.kind": kind}
    try:
        return list(across_sections(small_recipe("x", Path("m"), Path("f"), **fields)))
    except Exception as error:
        return [Conflict((), str(error))]


CELLS = [(name, kind) for name in OPTIMIZERS.names() for kind in STRATEGIES.names() if not refused(name, kind)]


def train_eagerly(rank: int, recipes: Sequence[Recipe]) -> None:
    with torch.compiler.set_stance("force_eager"):  # torchao compiles its updates, for half a minute each
        train_rank(rank, recipes)


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("optimizers")
    write_pairs(folder / "data" / "a.jsonl", 60)
    by_night = any(item.get_closest_marker("night") for item in request.session.items)
    cells = CELLS if by_night else BY_DAY

    def of(what: str, **more: Any) -> list[Recipe]:
        return [recipe_of(name, kind, what, tiny_model, folder, **more) for name, kind in cells]

    stop = {"training.stop_after": STOP}
    run_ranks(train_eagerly, 2, [*of("straight"), *of("same", **stop), *of("more", **stop)])
    run_ranks(train_eagerly, 2, of("same"))
    run_ranks(train_eagerly, 3, of("more"))
    return {what: dict(zip(cells, of(what), strict=True)) for what in ("straight", "same", "more")}


PARAMETERS = [pytest.param(*cell, marks=[] if cell in BY_DAY else [pytest.mark.night]) for cell in CELLS]


@pytest.mark.parametrize(("name", "kind"), PARAMETERS)
def test_a_resumed_run_is_the_same_to_the_byte(name: str, kind: str, runs: Any) -> None:
    straight, same = runs["straight"][name, kind], runs["same"][name, kind]
    assert losses(same) == losses(straight)
    assert adapter_bytes(same) == adapter_bytes(straight)


@pytest.mark.parametrize(("name", "kind"), PARAMETERS)
def test_a_run_moves_to_other_shards(name: str, kind: str, runs: Any) -> None:
    straight, more = losses(runs["straight"][name, kind]), losses(runs["more"][name, kind])
    quantised = OPTIMIZERS[name].quantised
    assert list(more) == list(range(1, STEPS + 1))
    assert more == pytest.approx(straight, abs=2e-2 if quantised else 1e-5)
    assert straight[STEPS] < straight[1] - 0.02, "it learns"
