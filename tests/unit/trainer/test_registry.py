"""The tables of choices."""

from __future__ import annotations

import importlib.util

import pytest

from trainer import registry
from trainer.errors import UsageError
from trainer.registry import Registry

TABLES = [table for table in vars(registry).values() if isinstance(table, Registry)]


def test_a_name_loads_what_it_stands_for() -> None:
    table = Registry("path", {"posix": "posixpath:join"})
    assert table.names() == ("posix",)
    assert table.load("posix")("a", "b") == "a/b"


def test_a_name_that_is_not_there_answers_with_those_that_are() -> None:
    table = Registry("colour", {"red": "a:b", "green": "a:c"})
    assert "red" in table
    with pytest.raises(UsageError, match="colour 'gren' is not one of: red, green; did you mean 'green'"):
        table.load("gren")
    with pytest.raises(UsageError, match="there is none to choose yet"):
        Registry("colour", {}).require("red")


@pytest.mark.parametrize(
    ("table", "name"),
    [(table, name) for table in TABLES for name in table.names()],
    ids=lambda v: getattr(v, "kind", v),
)
def test_every_entry_names_something_that_is_there(table: Registry, name: str) -> None:
    module, attribute = table.require(name).split(":")
    assert importlib.util.find_spec(module) is not None
    assert getattr(table.load(name), "__name__", None) == attribute
