"""The tables of choices."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

from launcher.convert import SOURCES
from trainer.data.readers import READERS
from trainer.errors import UsageError
from trainer.recipe.formats import FORMATS
from trainer.recipe.methods import METHODS
from trainer.recipe.optimizers import OPTIMIZERS, SCHEDULES
from trainer.recipe.strategies import STRATEGIES
from trainer.recipe.tasks import TASKS
from trainer.recipe.trackers import TRACKERS
from trainer.registry import Choice, Registry

TABLES = [METHODS, TASKS, FORMATS, STRATEGIES, OPTIMIZERS, SCHEDULES, TRACKERS, READERS, SOURCES]


def test_a_name_loads_what_it_stands_for() -> None:
    table = Registry("path", {"posix": Choice("posixpath:join")})
    assert table.names() == ("posix",)
    assert table.load("posix")("a", "b") == "a/b"


def test_a_name_that_is_not_there_answers_with_those_that_are() -> None:
    table = Registry("colour", {"red": Choice("a:b"), "green": Choice("a:c")})
    assert "red" in table
    with pytest.raises(UsageError, match="colour 'gren' is not one of: red, green; did you mean 'green'"):
        table.load("gren")
    with pytest.raises(UsageError, match="there is none to choose yet"):
        Registry("colour", {})["red"]


@pytest.mark.parametrize(
    ("table", "name"),
    [(table, name) for table in TABLES for name in table.names()],
    ids=lambda v: getattr(v, "kind", v),
)
def test_every_entry_names_something_that_is_there(table: Registry[Any], name: str) -> None:
    module, attribute = table[name].code.split(":")
    assert importlib.util.find_spec(module) is not None
    assert getattr(table.load(name), "__name__", None) == attribute
