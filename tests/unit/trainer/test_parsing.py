"""Text that others wrote: what is within bounds comes out as it always did, what is not is a sentence, and soon."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.hostile import BYTES, JSON_BOMBS, VALUES, YAML_BOMBS
from trainer.parsing import DEEPEST, MOST_VALUES, BoundedLoader, JsonReader, Malformed, parse_json, parse_yaml


@given(VALUES)
def test_what_is_within_bounds_comes_out_as_it_was(value: Any) -> None:
    text = json.dumps(value)
    assert parse_json(text) == parse_json(text.encode()) == value
    assert parse_json(f"\ufeff {text}\n") == value


@pytest.mark.parametrize("text", [*JSON_BOMBS.values(), *BYTES.values()], ids=[*JSON_BOMBS, *BYTES])
def test_json_out_of_bounds_is_a_sentence(text: str | bytes) -> None:
    with pytest.raises(Malformed) as caught:
        parse_json(text)
    assert 0 < len(str(caught.value)) < 200


@pytest.mark.parametrize("text", YAML_BOMBS.values(), ids=YAML_BOMBS)
def test_yaml_out_of_bounds_is_a_sentence(text: str) -> None:
    with pytest.raises(Malformed) as caught:
        parse_yaml(text)
    assert caught.value.line >= 1
    assert 0 < len(str(caught.value)) < 200


def test_no_node_of_a_text_out_of_bounds_is_made_into_a_value(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bounded by what is built, whatever the machine: of 10⁹ leaves none is constructed."""
    made: list[Any] = []
    monkeypatch.setattr(BoundedLoader, "construct_document", lambda loader, node: made.append(node))
    with pytest.raises(Malformed, match=f"{MOST_VALUES:,}"):
        parse_yaml(YAML_BOMBS["laughs"])
    assert not made


@pytest.mark.parametrize(
    "text",
    ["2026-13-45", "!!bool x", "!!int x", "!!float x", "!!timestamp x", "!x y", "!!python/name:os.x y",
     "? [a]\n: 1", "<<: 1", "a: 1\n---\nb: 2", '"\\ud800"', "\0", "1:" + "20:" * 3000 + "1"],
)  # fmt: skip
def test_yaml_that_means_nothing_is_a_sentence(text: str) -> None:
    with pytest.raises(Malformed):
        parse_yaml(text)


@given(st.text(max_size=60))
@settings(max_examples=300)
def test_any_text_is_read_as_the_library_reads_it_or_a_sentence(text: str) -> None:
    try:
        expected = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, KeyError, AttributeError):
        with pytest.raises(Malformed):
            parse_yaml(text)
    else:
        found = parse_yaml(text)
        assert found == expected or (isinstance(found, float) and math.isnan(found))


def test_a_merged_mapping_is_as_the_library_merges_it() -> None:
    text = "a: &a {x: 1, y: 2}\nb: &b {y: 3, z: 4}\nc: {<<: [*a, *b], x: 5}\nd: {<<: *b, <<: *a}\n"
    assert parse_yaml(text) == yaml.safe_load(text)


def test_the_deepest_value_is_read() -> None:
    text = "[" * DEEPEST + "]" * DEEPEST
    assert parse_json(text) == json.loads(text)
    with pytest.raises(Malformed, match="nested deeper"):
        parse_json(f"[{text}]")


def test_others_files_may_have_what_their_libraries_take() -> None:
    lenient = parse_json('{"a": Infinity, "b": [NaN, 1e999], "c": 1, "c": 2}', finite=False, unique=False)
    assert (lenient["a"], lenient["c"]) == (math.inf, 2)


def test_a_reader_goes_on_behind_a_value_that_must_not_be_used() -> None:
    reader, text = JsonReader(), '[1, {"a": 1, "a": 2}, 3]'
    _, end = reader.read_at(text, 4)
    assert text[end:] == ", 3]"
    assert "appears twice" in str(reader.fault)
    assert reader.read_at(text, 1) == (1, 2)
    assert reader.fault is None
