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
from trainer.recipe.optimizers import OPTIMIZERS
from trainer.recipe.rules.compatibility import across_sections
from trainer.recipe.strategies import STRATEGIES

RATES = {"sgd": 0.2, "lion": 5e-4, "lion_8bit": 5e-4, "adafactor": 5e-2}
BY_DAY = [("adamw_8bit", "fsdp"), ("schedule_free_adamw", "fsdp"), ("muon", "fsdp")]
STEPS, STOP = 4, 2


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


Cell = tuple[str, str]
Runs = dict[str, dict[Cell, Recipe]]


def trained(cells: Sequence[Cell], model: Path, folder: Path) -> Runs:
    """Each optimizer's run without a stop, with one on as many ranks, and with one before it moves to more."""
    write_pairs(folder / "data" / "a.jsonl", 60)

    def of(what: str, **more: Any) -> list[Recipe]:
        return [recipe_of(name, kind, what, model, folder, **more) for name, kind in cells]

    stop = {"training.stop_after": STOP}
    run_ranks(train_eagerly, 2, [*of("straight"), *of("same", **stop), *of("more", **stop)])
    run_ranks(train_eagerly, 2, of("same"))
    run_ranks(train_eagerly, 3, of("more"))
    return {what: dict(zip(cells, of(what), strict=True)) for what in ("straight", "same", "more")}


def check(cell: Cell, runs: Runs) -> None:
    straight, same, more = (runs[what][cell] for what in ("straight", "same", "more"))
    assert losses(same) == losses(straight)
    assert adapter_bytes(same) == adapter_bytes(straight)
    assert list(losses(more)) == list(range(1, STEPS + 1))
    assert losses(more) == pytest.approx(losses(straight), abs=2e-2 if OPTIMIZERS[cell[0]].quantised else 1e-5)
    assert losses(straight)[STEPS] < losses(straight)[1] - 0.02, "it learns"


@pytest.fixture(scope="module")
def runs(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return trained(BY_DAY, tiny_model, tmp_path_factory.mktemp("optimizers"))


@pytest.mark.parametrize(("name", "kind"), BY_DAY)
def test_a_run_moves_between_the_shards_of_its_optimizer(name: str, kind: str, runs: Runs) -> None:
    check((name, kind), runs)


@pytest.mark.night
@pytest.mark.parametrize(("name", "kind"), [cell for cell in CELLS if cell not in BY_DAY])
def test_every_run_does(name: str, kind: str, tiny_model: Path, tmp_path: Path) -> None:
    check((name, kind), trained([(name, kind)], tiny_model, tmp_path))


EXACT_BY_DAY = ("lion_8bit",)
EXACT = [
    pytest.param(name, marks=[] if name in EXACT_BY_DAY else [pytest.mark.night]) for name, k in CELLS if k == "ddp"
]


@pytest.mark.parametrize("name", EXACT)
def test_an_exact_run_does_not_depend_on_the_ranks(name: str, tiny_model: Path, tmp_path: Path) -> None:
    write_pairs(tmp_path / "data" / "a.jsonl", 30)
    short = {"exact": True, "training.steps": 3}
    made = {n: recipe_of(name, "ddp", f"exact-{n}", tiny_model, tmp_path, **short) for n in (1, 2)}
    for ranks, recipe in made.items():
        run_ranks(train_eagerly, ranks, [recipe])
    assert losses(made[1]) == losses(made[2])
    assert adapter_bytes(made[1]) == adapter_bytes(made[2])


@pytest.mark.night
@pytest.mark.parametrize("name", sorted({name for name, _ in CELLS}))
def test_a_run_moves_from_strategy_to_strategy(name: str, tiny_model: Path, tmp_path: Path) -> None:
    """From two replicas of two shards to every other strategy that the optimizer works with."""
    write_pairs(tmp_path / "data" / "a.jsonl", 60)
    others = [kind for one, kind in CELLS if one == name]
    meshed = {"strategy": {"kind": "fsdp", "replicas": 2}, "resources.workers": 4}

    def of(what: str, **more: Any) -> Recipe:
        return recipe_of(name, "fsdp", what, tiny_model, tmp_path, **meshed | more)

    straight = of("straight")
    first = [of(f"to-{kind}", **{"training.stop_after": STOP}) for kind in others]
    run_ranks(train_eagerly, 4, [straight, *first])
    then = [of(f"to-{kind}", **{"strategy": {"kind": kind}, "resources.workers": 3}) for kind in others]
    run_ranks(train_eagerly, 3, then)
    for recipe in then:
        near = 2e-2 if OPTIMIZERS[name].quantised else 1e-5
        assert losses(recipe) == pytest.approx(losses(straight), abs=near), recipe.name


@pytest.mark.night
def test_compiled_updates_resume_to_the_byte_too(tiny_model: Path, tmp_path: Path) -> None:
    write_pairs(tmp_path / "data" / "a.jsonl", 60)
    names = [name for name, row in OPTIMIZERS.items() if row.library == "torchao"]

    def of(what: str, **more: Any) -> list[Recipe]:
        return [recipe_of(name, "fsdp", what, tiny_model, tmp_path, **more) for name in names]

    run_ranks(train_rank, 2, [*of("straight"), *of("same", **{"training.stop_after": STOP})])
    run_ranks(train_rank, 2, of("same"))
    for straight, same in zip(of("straight"), of("same"), strict=True):
        assert adapter_bytes(same) == adapter_bytes(straight), straight.name
