"""In what runs differ, and the columns and the order of `muster ls`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from launcher.cli import status as commands
from launcher.cli.app import app
from launcher.monitor.compare import (
    ListedRun,
    by_loss,
    cell,
    differing,
    ordered,
    settings_of,
    short_name,
    values_of,
)
from launcher.monitor.status import Status
from launcher.monitor.tables import runs_table
from tests.support.made_up_run import make_up
from trainer.errors import UsageError
from trainer.recipe import dump, load
from trainer.storage import Storage, open_storage

STATUS = Status(
    name="a", uri="runs/a", state="succeeded", step=4, total_steps=4, attempts=1, world_size=2, samples=8, epoch=0,
    holder=None, job=None, checkpoints=(), metrics={},
)  # fmt: skip


def settings(*changes: str) -> dict[str, Any]:
    return settings_of(dump(load(Path("recipes/quickstart.yaml"), list(changes))))


def test_settings_are_named_by_dotted_keys_and_a_plain_list_is_one_value() -> None:
    found = settings("optimizer.betas=[0.9, 0.95]")
    assert found["optimizer.betas"] == [0.9, 0.95]
    assert found["data.train.0.format"] == "qa"
    assert found["tracking"] == []
    assert "data" not in found
    assert settings_of("data: [") == settings_of("- a list") == {}


def test_runs_differ_in_what_their_recipes_say_and_not_in_where_they_are() -> None:
    one = settings("name=a", "optimizer.lr=1e-4")
    assert differing([one, settings("name=b", "storage=elsewhere", "optimizer.lr=1e-4")]) == []
    assert differing([one, settings("optimizer.lr=3e-4"), settings("adapter.rank=8")]) == [
        "adapter.rank",
        "optimizer.lr",
    ]
    assert differing([one, {}]) == [], "a recipe that cannot be read says nothing"


def test_what_an_older_recipe_lacks_counts_as_its_default() -> None:
    old, now = settings(), settings()
    for key in ("samples.count", "samples.max_new_tokens", "seed", "optimizer.betas", "data.eval.0.weight"):
        del old[key]
    assert differing([old, now]) == []
    assert differing([old, settings("samples.count=2")]) == ["samples.count"]
    assert differing([old, settings("data.train.0.columns={question: q}")]) != []


def test_sources_that_only_one_recipe_has_differ() -> None:
    assert "data.eval.0.path" in differing([settings(), settings("data.eval=[]", "training.eval_every=null")])


def test_the_shortest_name_is_one_that_means_a_single_setting() -> None:
    recipes = [settings()]
    assert short_name("optimizer.lr", recipes) == "lr"
    assert short_name("optimizer.name", recipes) == "optimizer.name"
    assert short_name("seed", recipes) == "seed"


def listed(name: str = "a", recipe: dict[str, Any] | None = None, **metrics: float) -> ListedRun:
    return ListedRun(replace(STATUS, name=name, metrics=metrics), recipe or settings())


def test_a_column_is_a_setting_a_metric_or_a_field() -> None:
    runs = [listed(loss=2.0, lr=0.0), listed(recipe=settings("optimizer.lr=1e-4"), loss=1.0, lr=0.0)]
    assert values_of("lr", runs) == [5e-3, 1e-4], "the setting, not the rate of the last step"
    assert values_of("adapter.rank", runs) == [16, 16]
    assert values_of("loss", runs) == [2.0, 1.0]
    assert values_of("step", runs) == [4, 4]


def test_of_several_settings_with_an_end_the_one_that_differs_is_meant() -> None:
    runs = [listed(), listed(recipe=settings("strategy.kind=ddp"))]
    assert values_of("kind", runs) == ["fsdp", "ddp"]
    with pytest.raises(UsageError, match=r"steps names several settings; write one of training.steps, profile.steps"):
        values_of("steps", runs)


def test_a_name_of_nothing_is_refused_with_a_hint() -> None:
    with pytest.raises(
        UsageError, match="eval_los is no setting and no metric of these runs; did you mean 'eval_loss'"
    ):
        values_of("eval_los", [listed(eval_loss=1.0)])


def names(runs: list[ListedRun]) -> list[str]:
    return [run.status.name for run in runs]


def test_runs_are_ordered_and_those_without_the_value_come_last() -> None:
    runs = [listed("none"), listed("high", eval_loss=10.0), listed("low", eval_loss=9.0)]
    assert names(ordered(runs, "eval_loss")) == ["low", "high", "none"]
    assert names(ordered(runs, "-eval_loss")) == ["high", "low", "none"]


def test_texts_and_lists_have_an_order_too() -> None:
    runs = [listed("two", settings("tracking=[wandb]")), listed("one", settings("tracking=[mlflow]"))]
    assert names(ordered(runs, "tracking")) == ["one", "two"]


def test_runs_are_best_first_by_the_loss_that_all_have() -> None:
    both = [{"loss": 1.0, "eval_loss": 3.0}, {"loss": 2.0, "eval_loss": 2.0}]
    assert by_loss([replace(STATUS, metrics=metrics) for metrics in both]) == [1, 0]
    some = [{"loss": 2.0, "eval_loss": 1.0}, {"loss": 1.0}, {}, {"loss": "bad"}]
    assert by_loss([replace(STATUS, metrics=metrics) for metrics in some]) == [1, 0, 2, 3]


def test_cells_are_short() -> None:
    assert [*map(cell, (None, 1e-5, 0.25, 12345.0, 12345, True, [0.9, 0.95], [], "x"))] == [
        "-", "1e-5", "0.25", "12,345", "12,345", "true", "0.9, 0.95", "-", "x",
    ]  # fmt: skip


def test_the_last_columns_give_way_to_the_settings_that_differ() -> None:
    def titles(width: int) -> list[str]:
        table = runs_table([STATUS], 0.0, [("lr", ["0.001"])], width)
        return [str(column.header) for column in table.columns]

    assert titles(200) == ["run", "state", "progress", "loss", "eval", "lr", "age", "workers", "attempts"]
    assert titles(70)[-2:] == ["age", "workers"]
    assert titles(20) == ["run", "state", "progress", "loss", "eval"]


@pytest.fixture
def runs(tmp_path: Path) -> Storage:
    """Three runs of which the second has the lowest rate, with a change of rank in one."""
    storage = open_storage(str(tmp_path / "runs"))
    for name, lr, rank in (("a", 3e-4, 16), ("b", 1e-4, 16), ("c", 1e-3, 8)):
        make_up(storage.child(name), lr=lr)
        changes = [f"name={name}", f"optimizer.lr={lr}", f"adapter.rank={rank}"]
        storage.child(name).write("recipe.yaml", dump(load(Path("recipes/quickstart.yaml"), changes)).encode())
    return storage


def listing(*arguments: str) -> list[list[str]]:
    done = CliRunner().invoke(app, ["ls", *arguments], catch_exceptions=False)
    assert done.exit_code == 0
    return [line.split() for line in done.stdout.splitlines() if line.strip(" ─")]


def test_ls_shows_the_settings_in_which_the_runs_differ(runs: Storage) -> None:
    head, *rows = listing(runs.url)
    assert head[5:7] == ["rank", "lr"]
    assert [[row[0], *row[6:8]] for row in rows] == [["a", "16", "0.0003"], ["b", "16", "0.0001"], ["c", "8", "0.001"]]


def test_ls_names_the_settings_if_they_are_many(runs: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "MOST_SETTINGS", 1)
    done = CliRunner().invoke(app, ["ls", runs.url])
    assert "lr" not in done.stdout
    assert "the recipes differ in 2 settings; --columns shows some: adapter.rank,optimizer.lr" in done.stderr


def test_ls_shows_chosen_columns_in_a_chosen_order(runs: Storage) -> None:
    head, *rows = listing(runs.url, "--columns", "lr, eval_loss", "--sort", "-lr")
    assert head == ["run", "state", "lr", "eval_loss"]
    assert [row[0] for row in rows] == ["c", "a", "b"]
    assert rows[0][2:] == ["0.001", "1.224"]


def test_ls_as_json_keeps_its_fields_and_gains_the_columns(runs: Storage) -> None:
    def told(*arguments: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads(CliRunner().invoke(app, ["ls", runs.url, "--json", *arguments]).stdout)
        return found

    plain, chosen = told(), told("--columns", "lr,rank", "--sort", "lr")
    assert [row["name"] for row in chosen] == ["b", "a", "c"]
    assert [row.pop("columns") for row in chosen][-1] == {"lr": 1e-3, "rank": 8}
    assert sorted(chosen, key=lambda row: str(row["name"])) == plain


def test_ls_reads_no_recipe_where_there_are_many_runs(runs: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "MOST_COMPARED", 2)
    assert "lr" not in listing(runs.url)[0]
