"""What is frozen before any worker starts, what may still be mended, and what is refused."""

from __future__ import annotations

import errno
import importlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.storage.doubles import unreadable
from tests.support.plugins import ROW, install, no_plugins
from tests.support.training import prepare, run_of, small_recipe, write_pairs
from trainer.checkpoint import CommitRecord, claim_attempt, claim_driver, commit, put_checkpoint
from trainer.data.run_data import check_rows, open_data, prepare_data, try_open_data
from trainer.errors import CorruptObject, InputError, RecipeChanged, RecipeError, StorageError, UsageError
from trainer.model import load_tokenizer
from trainer.recipe import Recipe, dump
from trainer.recipe.plugins import TABLES
from trainer.recipe.tasks import TASKS
from trainer.registry import IMPORTED
from trainer.run import layout
from trainer.run.frozen import check_same_recipe, freeze_recipe, provenance, read_recipe, resumed_recipe
from trainer.run.recipe_url import recipe_at
from trainer.storage import Storage, open_storage

__all__ = ["no_plugins"]
Make = Callable[..., Recipe]


@pytest.fixture
def make(tiny_model: Path, tmp_path: Path) -> Make:
    write_pairs(tmp_path / "data" / "a.jsonl", 20)
    return lambda **changes: small_recipe("run", tiny_model, tmp_path, **changes)


def committed(run: Storage) -> None:
    driver = claim_driver(run, {})
    attempt = claim_attempt(run, driver, {})
    unique, files = put_checkpoint(run, {"x": b"x"}, attempt=attempt, step=1)
    commit(run, CommitRecord(1, attempt, driver, "n", unique, files, {}, "2026-01-02T03:04:05+00:00"))


def shared(recipe: Recipe) -> Storage:
    return open_storage(recipe.storage).child(layout.PREPARED)


def prepared(recipe: Recipe) -> Any:
    return prepare(recipe, open_storage(recipe.storage))


def no_tokenizer() -> Any:
    raise AssertionError("nothing is to be tokenised")


def test_a_recipe_comes_back_resolved_and_without_stop_after(make: Make) -> None:
    recipe = make(**{"training.stop_after": 3})
    freeze_recipe(run_of(recipe), recipe)
    frozen = read_recipe(run_of(recipe))
    assert frozen.training.stop_after is None
    assert frozen == make()
    assert "weight_decay: 0.0" in run_of(recipe).read(layout.RECIPE).decode(), "defaults are written out"


def test_a_run_that_is_not_there_is_said(make: Make) -> None:
    run = run_of(make())
    with pytest.raises(InputError, match=r"there is no run at (.*)/run; `muster ls \1` lists the runs there"):
        read_recipe(run)
    check_same_recipe(run, make())


def test_before_the_first_commit_a_mended_recipe_takes_its_place(make: Make) -> None:
    run = run_of(make())
    freeze_recipe(run, make(**{"optimizer.lr": 1.0}))
    freeze_recipe(run, make())
    assert read_recipe(run).optimizer.lr == 5e-3


def test_a_broken_frozen_recipe_binds_nobody_before_the_first_commit(make: Make) -> None:
    run = run_of(make())
    run.write(layout.RECIPE, b"name: [torn")
    freeze_recipe(run, make())
    assert read_recipe(run) == make()


def test_after_it_another_recipe_is_refused_with_the_difference(make: Make) -> None:
    run = run_of(make())
    freeze_recipe(run, make())
    committed(run)
    before = run.read(layout.RECIPE)
    with pytest.raises(RecipeChanged) as refused:
        freeze_recipe(run, make(**{"optimizer.lr": 1.0, "adapter.rank": 8}))
    for words in ("optimizer.lr: 0.005 -> 1.0", "adapter.rank: 4 -> 8", "give the new recipe another name"):
        assert words in str(refused.value)
    assert run.read(layout.RECIPE) == before


@pytest.mark.parametrize(("number", "error"), [(errno.EACCES, InputError), (errno.EIO, StorageError)])
def test_commits_that_cannot_be_seen_are_not_taken_for_none(
    make: Make, monkeypatch: pytest.MonkeyPatch, number: int, error: type[Exception]
) -> None:
    """Else another learning rate would overwrite the frozen recipe and begin at step 0."""
    run = run_of(make())
    freeze_recipe(run, make())
    committed(run)
    for call in (check_same_recipe, freeze_recipe):
        with monkeypatch.context() as patched:
            unreadable(patched, Path(run.url, layout.COMMITS), number)
            with pytest.raises(error):
                call(run.within(0.05), make(**{"optimizer.lr": 1.0}))
    assert read_recipe(run).optimizer.lr == 5e-3


@pytest.mark.parametrize(
    "change",
    [
        {"strategy.kind": "fsdp"},
        {"resources": {"workers": 3}},
        {"checkpoint.every_steps": 1},
        {"training.stop_after": 2},
    ],
)
def test_what_may_change_between_attempts_is_taken_and_not_frozen(make: Make, change: dict[str, Any]) -> None:
    run = run_of(make())
    freeze_recipe(run, make())
    committed(run)
    freeze_recipe(run, make(**change))
    assert read_recipe(run) == make()


def test_provenance_holds_versions_and_no_environment(monkeypatch: pytest.MonkeyPatch, make: Make) -> None:
    for name in ("AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "MUSTER_SOMETHING"):
        monkeypatch.setenv(name, f"secret-{name.lower()}")
    monkeypatch.setattr("sys.argv", ["/usr/bin/muster", "run", "s3://user:password@bucket"])
    found = provenance()
    text = json.dumps(found)
    assert "secret-" not in text
    assert "password" not in text
    for value in os.environ.values():
        assert len(value) < 20 or value not in text
    import torch

    assert (
        found["packages"]["torch"] == torch.__version__.split("+")[0] or found["packages"]["torch"] == torch.__version__
    )
    assert found["packages"]["peft"]
    assert found["command"] == "muster"
    assert found["muster"]
    freeze_recipe(run_of(make()), make())
    assert run_of(make()).read_json(layout.PROVENANCE)["packages"] == found["packages"]


def test_data_is_prepared_once_and_opened_from_then_on(make: Make) -> None:
    recipe = make(**{"training": {"epochs": 2, "global_batch": 6, "micro_batch": 2}})
    run = run_of(recipe)
    assert try_open_data(recipe, run, shared(recipe)) is None
    with pytest.raises(InputError, match="is not complete"):
        open_data(recipe, run, shared(recipe))
    data = prepared(recipe)
    assert data.train.totals.samples == 20
    assert data.eval is None
    assert data.total_steps >= 2
    assert data.total_steps % 2 == 0
    again = open_data(recipe, run, shared(recipe))
    assert again.train.fingerprint == data.train.fingerprint
    assert again.total_steps == data.total_steps


def test_steps_are_the_recipes_own_when_it_gives_them(make: Make) -> None:
    assert prepared(make(**{"training.steps": 123})).total_steps == 123


def test_before_the_first_commit_mended_data_takes_its_place(make: Make, tmp_path: Path) -> None:
    first = prepared(make()).train
    write_pairs(tmp_path / "data" / "a.jsonl", 25)
    second = prepared(make()).train
    assert (first.totals.samples, second.totals.samples) == (20, 25)
    assert open_data(make(), run_of(make()), shared(make())).train.fingerprint == second.fingerprint


def test_after_it_the_run_keeps_the_data_that_it_began_with(make: Make, tmp_path: Path) -> None:
    recipe = make()
    first = prepared(recipe).train
    committed(run_of(recipe))
    write_pairs(tmp_path / "data" / "a.jsonl", 25)
    again = prepare_data(recipe, run_of(recipe), shared(recipe), no_tokenizer)
    assert again.train.fingerprint == first.fingerprint


def test_data_that_changed_and_is_to_be_prepared_anew_is_refused(make: Make, tmp_path: Path) -> None:
    recipe = make()
    prepared(recipe)
    committed(run_of(recipe))
    shared(recipe).delete([o.key for o in shared(recipe).list()])
    same = prepared(recipe)
    assert same.train.totals.samples == 20, "unchanged data is prepared again"
    shared(recipe).delete([o.key for o in shared(recipe).list()])
    write_pairs(tmp_path / "data" / "a.jsonl", 25)
    with pytest.raises(InputError, match=r"a\.jsonl"):
        prepared(recipe)


def test_another_tokenizer_cannot_take_the_place_of_lost_data(make: Make, tiny_model: Path, tmp_path: Path) -> None:
    recipe = make()
    prepared(recipe)
    committed(run_of(recipe))
    shared(recipe).delete([o.key for o in shared(recipe).list()])
    other = load_tokenizer(tiny_model)
    other.add_tokens(["something new"])
    with pytest.raises(InputError, match="the tokenizer or the chat template is not the one"):
        prepare_data(recipe, run_of(recipe), shared(recipe), lambda: other)


def test_checkpoints_without_their_data_json_are_said(make: Make) -> None:
    recipe = make()
    prepared(recipe)
    committed(run_of(recipe))
    run_of(recipe).delete([layout.DATA])
    with pytest.raises(CorruptObject, match=r"has checkpoints but no data\.json"):
        prepare_data(recipe, run_of(recipe), shared(recipe), no_tokenizer)


def test_first_rows_of_evaluation_data_are_looked_at_too(make: Make, tiny_model: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiny_model)
    check_rows(make(), tokenizer)
    (tmp_path / "eval.jsonl").write_text('{"question": "x"}\n')
    recipe = make(**{"data.eval": [{"path": f"{tmp_path}/eval.jsonl", "format": "completion"}]})
    with pytest.raises(InputError, match=r"eval\.jsonl.*question|question.*eval\.jsonl"):
        check_rows(recipe, tokenizer)


@pytest.mark.usefixtures("no_plugins")
def test_a_run_names_the_package_of_a_plug_in_that_is_not_there_any_more(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site, mark = tmp_path / "site", tmp_path / "imported"
    files = {"plugged.py": ROW.format(mark=str(mark), module="plugged")}
    install(site, "muster-plugged", files, {"muster.tasks": {"focal": "plugged:ROW"}})
    monkeypatch.syspath_prepend(str(site))
    recipe = make(task="focal", focal={"gamma": 3.0})
    (tmp_path / "own.yaml").write_text(dump(recipe))
    run = run_of(recipe)
    freeze_recipe(run, recipe)
    assert run.read_json(layout.PROVENANCE)["plugins"] == [
        {"key": "task", "name": "focal", "package": "muster-plugged 1.2"}
    ]
    assert resumed_recipe(run, trust=True) == recipe
    site.rename(tmp_path / "gone")
    for table in TABLES.values():
        table._plugged.clear()
    mark.unlink()
    monkeypatch.delenv(IMPORTED)
    importlib.invalidate_caches()
    assert read_recipe(run).task == "focal", "what only reads a run needs no plug-in"
    with pytest.raises(UsageError, match="would run the plug-in task focal"):
        resumed_recipe(run)
    for resume in (lambda: resumed_recipe(run, trust=True), lambda: recipe_at(str(tmp_path / "own.yaml"))):
        TASKS._plugged.clear()
        with pytest.raises(RecipeError, match=r"pip install muster-plugged==1\.2") as refused:
            resume()
        assert "task 'focal' is not one of" in str(refused.value)
        assert "when the run was started, task focal came from muster-plugged 1.2, which is not" in str(refused.value)
    assert not mark.exists()
