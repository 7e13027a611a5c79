"""Recipes, overrides and another trainer's settings of any shape: a recipe, or all mistakes in sentences, and soon."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher import convert
from tests.support.hostile import BYTES, JSON_BOMBS, VALUES, YAML_BOMBS, changed
from tests.unit.launcher.convert.convert_support import AXOLOTL, FACTORY
from trainer.errors import RecipeError, UsageError
from trainer.recipe import Recipe, load, loads, parse
from trainer.recipe.loading import LARGEST_RECIPE
from trainer.run.frozen import read_recipe
from trainer.run.recipe_url import recipe_at
from trainer.storage import open_storage

WHOLE: dict[str, Any] = {
    "name": "r",
    "model": {"path": "m", "dtype": "bfloat16"},
    "adapter": {"method": "lora", "rank": 8, "target_modules": ["q_proj"]},
    "data": {"train": [{"path": "a.jsonl", "format": "completion", "columns": {"prompt": "q"}, "weight": 2.0}]},
    "training": {"steps": 4, "global_batch": 2, "micro_batch": 1},
    "optimizer": {"name": "adamw", "lr": 1e-4, "betas": [0.9, 0.99]},
    "resources": {"workers": 2},
    "cluster": {"slurm": {"account": "x"}},
    "tracking": [],
    "storage": "runs",
}
SAID = 2000
"""Characters of a mistake, at most: whoever gave the value knows it."""


def told(error: RecipeError) -> None:
    assert error.mistakes
    for mistake in error.mistakes:
        assert 0 < len(str(mistake)) < SAID
        str(mistake).encode()


@given(changed(WHOLE))
@settings(max_examples=120)
def test_any_value_anywhere_is_taken_or_a_sentence(body: Any) -> None:
    for text, where in ((json.dumps(body), "r.json"), (yaml.safe_dump(body), "r.yaml")):
        try:
            loads(text, where)
        except RecipeError as error:
            told(error)
    try:
        parse(body)
    except RecipeError as error:
        told(error)


@pytest.mark.parametrize("text", [*YAML_BOMBS.values(), *JSON_BOMBS.values()], ids=[*YAML_BOMBS, *JSON_BOMBS])
@pytest.mark.parametrize("where", ["r.yaml", "r.json"])
def test_a_text_out_of_bounds_is_a_sentence(text: str, where: str) -> None:
    with pytest.raises(RecipeError) as caught:
        loads(text, where)
    told(caught.value)
    assert str(caught.value).startswith(where)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("seed: !!binary aGVsbG8=", "cannot be read: it has the tag"),
        ("seed: !!timestamp 2026-01-01", "cannot be read: it has the tag"),
        ("seed: !!set {a, b}", "cannot be read: it has the tag"),
        ("seed: !mine 3", "cannot be read: it has the tag !mine"),
        ("seed: !!bool maybe", "cannot be read as bool"),
        ("seed: !!int x", "cannot be read as int"),
        ('seed: "\\ud800"', "half of a surrogate pair"),
        ('"\\ud800": 1', "has a key that is not text"),
        ("seed: 0x" + "f" * 5000, "has 5002 digits"),
        ("seed: " + "9" * 200, "has 200 digits"),
        ("seed: .nan", "takes a whole number"),
        ("seed: 1e999", "takes a whole number"),
    ],
)
def test_a_value_that_yaml_has_and_a_recipe_has_not_is_named_with_its_line(line: str, says: str) -> None:
    text = yaml.safe_dump(WHOLE) + line + "\n"
    with pytest.raises(RecipeError) as caught:
        loads(text, "r.yaml")
    told(caught.value)
    named = [m for m in caught.value.mistakes if says in m.message]
    assert [m.where for m in named] == [f"r.yaml:{len(text.splitlines())}"], str(caught.value)


def test_a_pair_of_surrogates_in_json_is_the_character_that_it_is() -> None:
    recipe = loads(json.dumps({**WHOLE, "data": {"train": [{"path": "😀.jsonl", "format": "completion"}]}}), "r.json")
    assert recipe.data.train[0].path == "😀.jsonl"


@pytest.mark.parametrize("body", BYTES.values(), ids=BYTES)
def test_a_file_that_is_no_text_is_a_sentence_wherever_it_lies(body: bytes, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_bytes(body)
    (tmp_path / "recipe.yaml").write_bytes(body)
    for read in (
        lambda: load(tmp_path / "r.yaml"),
        lambda: recipe_at(f"file://{tmp_path}/r.yaml"),
        lambda: read_recipe(open_storage(str(tmp_path))),
    ):
        with pytest.raises(RecipeError) as caught:
            read()
        told(caught.value)


def test_a_huge_file_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    with path.open("wb") as file:
        file.truncate(100 << 30)
    for read in (load, lambda place: convert.read(place)):
        with pytest.raises(UsageError, match=f"more than {LARGEST_RECIPE:,} bytes"):
            read(path)
    with pytest.raises(RecipeError, match="cannot be read"):
        load("no\0file")


@given(key=st.sampled_from(["seed", "name", "data.train.0.path", "data.train.0.columns", "optimizer.betas", "tracking",
                            "cluster", "training.steps", "a", "data.train.9.x"]),
       value=VALUES.map(json.dumps) | st.text(max_size=20) | st.sampled_from(list(YAML_BOMBS.values())))  # fmt: skip
@settings(max_examples=120)
def test_any_override_is_taken_or_a_sentence(key: str, value: str) -> None:
    try:
        loads(yaml.safe_dump(WHOLE), "r.yaml", [f"{key}={value}"])
    except RecipeError as error:
        told(error)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("data.train." + "9" * 5000 + ".path=x", "unknown key|not a list|is neither"),
        ("name=\udcff", "not text in UTF-8"),
        ("na\udcffme=x", "not text in UTF-8"),
        ("x" * 5000, "is not KEY=VALUE"),
        (".".join("a" * 5000) + "=1", "unknown key"),
        ("seed=" + "9" * 5000, "takes a whole number"),
        ("data.train=" + "[" * 5000, "takes a list"),
    ],
)
def test_an_override_that_cannot_be_is_named(override: str, says: str) -> None:
    with pytest.raises(RecipeError, match=says) as caught:
        loads(yaml.safe_dump(WHOLE), "r.yaml", [override])
    told(caught.value)


def test_data_nested_without_end_is_a_sentence() -> None:
    deep: Any = {}
    for _ in range(5000):
        deep = {"a": deep}
    with pytest.raises(RecipeError, match="nested deeper"):
        parse({**WHOLE, "cluster": deep})


SETTINGS = {"axolotl": AXOLOTL, "llamafactory": FACTORY}


@pytest.mark.parametrize("source", SETTINGS)
@pytest.mark.parametrize("text", [*YAML_BOMBS.values(), "2026-13-45", "a: !!bool x", "\0"])
def test_settings_out_of_bounds_are_a_sentence(source: str, text: str, tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(text)
    with pytest.raises(UsageError) as caught:
        convert.read(file)
    assert len(str(caught.value)) < SAID


@pytest.mark.parametrize("source", SETTINGS)
@given(data=st.data())
@settings(max_examples=80)
def test_any_setting_is_carried_over_or_named(source: str, data: st.DataObject) -> None:
    body = data.draw(changed(SETTINGS[source]))
    if not isinstance(body, dict):
        return
    file = Path("settings.yaml")
    draft = convert.SOURCES.load(source)({str(k): v for k, v in body.items()}, file, None)
    text, hindrances = convert.checked(draft, source, file)
    assert hindrances or isinstance(loads(text), Recipe)
    "\n".join([*draft.report(), *hindrances]).encode()


@pytest.mark.parametrize("bomb", [*JSON_BOMBS.values(), "[1]"])
def test_a_file_beside_the_settings_that_is_no_json_is_as_one_that_is_not_there(bomb: str, tmp_path: Path) -> None:
    from launcher.convert.common import read_json

    (tmp_path / "dataset_info.json").write_text(bomb, encoding="utf-8")
    found = read_json(tmp_path / "dataset_info.json")
    assert found == {} or bomb == JSON_BOMBS["twice"]
