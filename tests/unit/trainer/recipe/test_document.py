"""The text of a recipe: YAML 1.2's plain values, lines, and faults of the text itself."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from trainer.errors import RecipeError
from trainer.recipe import loads
from trainer.recipe.document import Dumper, read_json, read_value, read_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("2E5", 2e5),
        ("-.5", -0.5),
        ("3.", 3.0),
        ("010", 10),
        ("1_000", 1000),
        ("0x1f", 31),
        ("on", "on"),
        ("no", "no"),
        ("true", True),
        ("~", None),
        ("", None),
        ("2026-01-01", "2026-01-01"),
        ("12:30:00", "12:30:00"),
        ("1e", "1e"),
        ("'1'", "1"),
        ("[1, a]", [1, "a"]),
        ("*.jsonl", "*.jsonl"),
        ("{a: b", "{a: b"),
    ],
)
def test_plain_values(text: str, value: Any) -> None:
    got = read_value(text)
    assert got == value
    assert type(got) is type(value)


PLAIN = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters(codec="utf-8"))


@example("a\x85b")
@given(PLAIN | st.dictionaries(st.sampled_from(["a", "b"]), PLAIN) | st.lists(PLAIN))
def test_what_is_dumped_reads_back_the_same(value: Any) -> None:
    text = yaml.dump(value, Dumper=Dumper, allow_unicode=True)
    document = read_yaml(text)
    assert document.notes == []
    assert document.data == value
    assert type(document.data) is type(value)
    assert yaml.safe_load(text) == value


def test_every_key_and_entry_has_its_line() -> None:
    document = read_yaml("a:\n  b: 1\n  c:\n    - x\n    - {d: 2}\n")
    assert document.lines == {
        ("a",): 1,
        ("a", "b"): 2,
        ("a", "c"): 3,
        ("a", "c", 0): 4,
        ("a", "c", 1): 5,
        ("a", "c", 1, "d"): 5,
    }


def test_a_key_given_twice_is_a_mistake_with_both_lines() -> None:
    document = read_yaml("a: 1\nb:\n  c: 1\n  c: 2\na: 3\n")
    assert document.data == {"a": 1, "b": {"c": 1}}
    assert sorted(document.notes) == [
        (4, ("b", "c"), "is given twice, first on line 3; keep one of them"),
        (5, ("a",), "is given twice, first on line 1; keep one of them"),
    ]


def test_anchors_and_merges_work_and_a_merged_key_may_be_overridden() -> None:
    document = read_yaml("x: &x {a: 1, b: 2}\ny:\n  <<: *x\n  b: 3\nz: *x\n")
    assert document.notes == []
    assert document.data == {"x": {"a": 1, "b": 2}, "y": {"a": 1, "b": 3}, "z": {"a": 1, "b": 2}}


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("a: 1\n\tb: 2\n", 2, "spaces, not tabs"),
        ("a: b: c\n", 1, "in quotes"),
        ("a: *.jsonl\n", 1, "in quotes"),
        ("a: [1\nb: 2\n", 2, "is not YAML"),
        ("a: 1\n---\nb: 2\n", 2, "is not YAML"),
        ("a: 1\nb: \x07\n", 2, "is not allowed"),
        ("a: &a [*a]\n", 1, "contains itself"),
        ("a: 1\n? [b]\n: 2\n", 2, "key that is not text"),
        ("a: !!python/none x\n", 1, "cannot be read"),
    ],
)
def test_faults_of_the_text_come_with_their_line(text: str, line: int, words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        loads(text, "r.yaml")
    found = [m for m in caught.value.mistakes if m.where == f"r.yaml:{line}" and words in m.message]
    assert found, str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"), [("", "is empty"), ("# nothing\n", "is empty"), ("- a\n", "a mapping of sections")]
)
def test_a_text_that_is_no_mapping(text: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        loads(text, "r.yaml")


def test_broken_json_has_its_line() -> None:
    document = read_json('{\n  "a": 1,\n}')
    assert [note.line for note in document.notes] in ([2], [3])
    assert "is not JSON" in document.notes[0].message


def test_json_keeps_its_own_values_and_finds_keys_given_twice() -> None:
    document = read_json('{"a": "on\\ud83d\\ude00", "b": 1e5,\n\t"b": 2}')
    assert document.data == {"a": "on\U0001f600", "b": 2}
    assert [(note.line, note.path) for note in document.notes] == [(2, ("b",))]
