"""YAML in which every text stays a text, whoever reads it."""

from __future__ import annotations

import re

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from cluster.kubernetes.emit import emit

TRAPS = [
    "y", "n", "on", "Off", "yes", "1e3", "0x10", "0o7", "010", "1_000", "null", "~", "", "1:30", "2026-01-01", "1.5",
    ".inf", "=", "<<", "true", "#", "- a", "a: b", "&a", "*a", "!a", "@a", "`a", "'", '"', "\\", " lead", "trail ",
]  # fmt: skip
MANY_LINES = ["a\nb", "a\nb\n", "a\n\n\n", " a\nb\n", "\n", "a \nb", "a\r\nb", "---\n...\n", "# c\n- d\n", "\ta\nb\n"]


@pytest.mark.parametrize("text", TRAPS + MANY_LINES)
def test_a_text_stays_a_text(text: str) -> None:
    manifest = {"spec": {"value": text, "list": [text], text: "key"}}
    written = emit(manifest)
    assert yaml.safe_load(written) == manifest
    assert yaml.load(written, yaml.BaseLoader) == manifest


@pytest.mark.parametrize("text", TRAPS)
def test_a_text_on_one_line_is_quoted_where_it_stands(text: str) -> None:
    written = emit({"value": text})
    assert re.fullmatch(r'value: "[^\n]*"\n', written)


@pytest.mark.parametrize("key", ["y", "n", "on", "off", "null", "true", "yes", "1e3", "0x10", "no", "nvidia.com/gpu"])
def test_a_key_that_could_be_something_else_is_quoted(key: str) -> None:
    assert emit({key: 1}) == f'"{key}": 1\n'


def test_numbers_and_flags_are_none_of_these() -> None:
    assert emit({"replicas": 3, "suspend": True}) == "replicas: 3\nsuspend: true\n"


def test_a_recipe_can_be_read_in_the_manifest() -> None:
    assert emit({"recipe": "name: x\nseed: 17\n"}) == "recipe: |\n  name: x\n  seed: 17\n"


@given(st.dictionaries(st.text(), st.text() | st.integers() | st.lists(st.text()), max_size=4))
def test_anything_reads_back(manifest: dict[str, object]) -> None:
    written = emit(manifest)
    assert yaml.safe_load(written) == manifest
    written.encode()
