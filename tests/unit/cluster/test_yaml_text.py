"""YAML in which every text stays a text, whoever reads it."""

from __future__ import annotations

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from cluster.yaml_text import to_yaml

TRAPS = [
    "y", "n", "Y", "N", "on", "Off", "yes", "1e3", "-1E3", "+.5e1", "0x10", "0o7", "010", "0b1", "1_000", "null", "~",
    "", "1:30", "2026-01-01", "1.5", ".inf", "=", "<<", "true", "no",
]  # fmt: skip
MARKED = ["#", "- a", "a: b", "&a", "*a", "!a", "@a", "`a", "'", '"', "\\", " lead", "trail "]
MANY_LINES = ["a\nb", "a\nb\n", "a\n\n\n", " a\nb\n", "\n", "a \nb", "a\r\nb", "---\n...\n", "# c\n- d\n", "\ta\nb\n"]


@pytest.mark.parametrize("text", TRAPS + MARKED + MANY_LINES)
def test_a_text_stays_a_text(text: str) -> None:
    manifest = {"spec": {"value": text, "list": [text], text: "key"}}
    written = to_yaml(manifest)
    assert yaml.safe_load(written) == manifest
    assert yaml.load(written, yaml.BaseLoader) == manifest


@pytest.mark.parametrize("text", TRAPS)
def test_a_text_that_could_be_something_else_is_quoted_as_value_and_as_key(text: str) -> None:
    assert to_yaml({"value": text}) == f"value: '{text}'\n"
    assert to_yaml({text: 1}).startswith(("'", "? '"))


def test_other_texts_numbers_and_flags_are_bare() -> None:
    written = to_yaml({"replicas": 3, "suspend": True, "name": "yes-no", "nvidia.com/gpu": "none"})
    assert written == "replicas: 3\nsuspend: true\nname: yes-no\nnvidia.com/gpu: none\n"


def test_a_recipe_can_be_read_in_the_manifest() -> None:
    assert to_yaml({"recipe": "name: x\nseed: 17\n"}) == "recipe: |\n  name: x\n  seed: 17\n"


@given(st.dictionaries(st.text(), st.text() | st.integers() | st.lists(st.text()), max_size=4))
def test_anything_reads_back(manifest: dict[str, object]) -> None:
    written = to_yaml(manifest)
    assert yaml.safe_load(written) == manifest
    written.encode()
