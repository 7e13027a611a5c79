"""The support matrix: what it refuses, what it says instead, and how it reads."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from launcher.cli.app import app
from trainer.recipe.rules.matrix import Cell, alike, axes, cells, nearest, refusal, refusals, sides_of, values_of


def test_every_refusal_refuses_something_that_no_other_does() -> None:
    assert len(set(refusals())) == len(refusals())
    for refused in refusals():
        assert any(refusal(cell) == refused for cell in cells()), refused.why


def test_what_a_refusal_names_is_there_to_choose() -> None:
    for refused in refusals():
        for side in sides_of(refused):
            given = getattr(refused, side)
            assert callable(given) or set(given) <= set(axes()[side])
            assert values_of(refused, side), f"{refused.why}: no {side} is like that"


def test_every_refused_cell_is_told_of_one_that_works() -> None:
    for cell in cells():
        if refusal(cell) is not None:
            for side, value in nearest(cell):
                assert refusal(cell._replace(**{side: value})) is None


@pytest.mark.parametrize(
    ("cell", "first"),
    [
        (Cell("lora", "int8", "fsdp", "sft"), ("quantization", "nf4")),
        (Cell("none", "nf4", "ddp", "sft"), ("quantization", "none")),
    ],
)
def test_the_nearest_choice_comes_first(cell: Cell, first: tuple[str, str]) -> None:
    assert nearest(cell)[0] == first


def test_every_task_has_its_table_in_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    shown = CliRunner().invoke(app, ["matrix"])
    assert shown.exit_code == 0
    assert all(len(line.rstrip()) <= 80 for line in shown.stdout.splitlines())
    lines = shown.stdout.splitlines()
    titles = [line.strip().partition(" ")[2] for line in lines if line.startswith("task")]
    assert sorted(", ".join(titles).split(", ")) == sorted(axes()["task"])
    lora = next(line for line in lines if line.split()[:1] == ["lora"])
    assert lora.split()[1:4] == ["x", "4", "8"], "ddp takes them all"


def test_tasks_with_the_same_table_share_it() -> None:
    groups = alike(axes()["task"])
    assert ("classification", "reward") in groups
    assert sorted(task for group in groups for task in group) == sorted(axes()["task"])
    for first, *others in groups:
        for cell in (cell for cell in cells() if cell.task == first):
            assert all((refusal(cell) is None) is (refusal(cell._replace(task=task)) is None) for task in others)


def test_one_task_is_asked_for_by_name() -> None:
    shown = CliRunner().invoke(app, ["matrix", "--task", "sft"])
    assert "task sft" in shown.stdout
    assert shown.stdout.count("task ") == 1
