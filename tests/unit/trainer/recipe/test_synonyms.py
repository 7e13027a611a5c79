"""Other trainers' words lead to where a recipe says the same, wherever they are written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launcher import convert
from launcher.convert import common
from tests.unit.launcher.convert.convert_support import AXOLOTL, FACTORY, registry
from tests.unit.trainer.recipe.test_mistakes import changed, mistakes
from trainer.errors import RecipeError
from trainer.recipe import Recipe, load, loads, parse, schema
from trainer.recipe.formats import CHAT_TEMPLATES
from trainer.recipe.loading import shipped
from trainer.recipe.synonyms import KEYS, VALUES, Here
from trainer.recipe.tree import annotation_at, fields_below, places


def keys_of(path: str) -> tuple[str | int, ...]:
    return tuple(int(key) if key.isdecimal() else key for key in path.split("."))


@pytest.mark.parametrize("key", KEYS)
def test_a_key_leads_to_a_place_that_a_recipe_has(key: str) -> None:
    here = KEYS[key]
    assert here.path or here.note
    assert not here.path or annotation_at(keys_of(here.path)) is not None
    assert not places(key), "a recipe's own key is no word of other trainers"


@pytest.mark.parametrize("place", ["", "model", "adapter", "data", "data.train.0", "training", "optimizer"])
def test_a_key_is_answered_wherever_it_is_written(place: str) -> None:
    path = f"{place}.learning_rate".lstrip(".")
    assert mistakes(changed(path, 1e-4)) == [(path, "unknown key; write optimizer.lr")]


def test_a_setting_that_is_written_in_anothers_word_is_not_missing_as_well() -> None:
    without = changed("optimizer", {"learning_rate": 1e-4})
    assert mistakes(without) == [("optimizer.learning_rate", "unknown key; write optimizer.lr")]
    without["training"] = {"steps": 10, "batch_size": 2}
    assert [path for path, _ in mistakes(without)] == [
        "training.global_batch",
        "training.batch_size",
        "optimizer.learning_rate",
    ]


@pytest.mark.parametrize(("path", "word"), [(path, word) for path, words in VALUES.items() for word in words])
def test_a_value_leads_to_one_that_is_valid(path: str, word: str) -> None:
    here = VALUES[path][word]
    [(_, message)] = mistakes(_with(path, word))
    assert message == f"the text {word!r} is a word of other trainers; {here}"
    if here.value is not None:
        assert not wrong(path, here)


def _with(path: str, value: Any) -> dict[str, Any]:
    """The good recipe with a value, on GPUs, where each kernel and strategy is valid."""
    data = changed(path, value)
    return data | {"resources": {"workers": 1, "gpus_per_worker": 1}}


def wrong(path: str, here: Here) -> list[tuple[str, str]]:
    """The mistakes at the path itself: the value may not go with the rest of the good recipe."""
    try:
        parse(_with(path, here.value))
    except RecipeError as error:
        return [tuple(m)[1:] for m in error.mistakes if "is not one of" in m.message]  # type: ignore[misc]
    return []


def test_no_value_of_a_recipe_is_a_word_of_others() -> None:
    for path, words in VALUES.items():
        assert not {word for word in words if not mistakes_at(path, word)}, path


def mistakes_at(path: str, word: str) -> list[tuple[str, str]]:
    return [one for one in mistakes(_with(path, word)) if one[0] == path]


@pytest.mark.parametrize("key", ["batch_size", "per_device_train_batch_size", "Batch_Size"])
def test_a_batch_size_is_two_numbers(key: str) -> None:
    [(_, message)] = mistakes(changed(f"training.{key}", 8))
    assert "training.micro_batch" in message
    assert "training.global_batch" in message


def test_qlora_is_never_unquantised_lora() -> None:
    [(_, message)] = mistakes(changed("adapter.method", "qlora"))
    assert message.endswith("write adapter.method: lora (with model.quantization: nf4)")
    assert mistakes(changed("model.load_in_4bit", True))[0][1] == "unknown key; write model.quantization: nf4"
    assert mistakes(changed("model.quantization", 4))[0][1].endswith("write model.quantization: nf4")


def test_the_command_line_gives_the_same_answer() -> None:
    with pytest.raises(RecipeError, match=r"command line: training\.bf16: unknown key; write model\.dtype: bfloat16"):
        loads("name: x", "r.yaml", ["training.bf16=true"])


@pytest.mark.parametrize(("word", "near"), [("chatlm", "chatml"), ("lama3", "llama3"), ("gemma-3x", "gemma")])
def test_a_chat_template_that_is_not_there_suggests_one_that_is(word: str, near: str) -> None:
    [(path, message)] = mistakes(changed("data.chat_template", word))
    assert path == "data.chat_template"
    assert message.endswith(f"did you mean {near!r}?")
    assert all(name in message for name in CHAT_TEMPLATES)


def test_a_chat_template_may_be_a_file_without_a_suffix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own").write_text("{{ messages }}")
    text = "name: x\nmodel: m\ndata: {train: [{path: a.jsonl, format: messages}], chat_template: own}\n"
    text += "training: {steps: 1, global_batch: 1, micro_batch: 1}\noptimizer: {lr: 1e-4}\nstorage: runs\n"
    assert loads(text).data.chat_template == "own"
    (tmp_path / "own").unlink()
    with pytest.raises(RecipeError, match="'own' is none of muster's chat templates"):
        loads(text)
    assert loads(text, stored=True).data.chat_template == "own", "a run's recipe is read on other machines too"


def test_a_text_is_the_path_of_the_model() -> None:
    model = parse(changed("model", "Qwen/Qwen3-0.6B")).model
    assert model == parse(changed("model", {"path": "Qwen/Qwen3-0.6B"})).model
    assert {"type": "string"} in schema()["properties"]["model"]["anyOf"]
    [(path, message)] = mistakes(changed("model", ""))
    assert (path, message) == ("model.path", "is empty; give a folder, a file or a URL")


def test_a_text_for_the_model_goes_with_overrides_of_its_other_settings(tmp_path: Path) -> None:
    file = tmp_path / "r.json"
    file.write_text(json.dumps(changed("model", "org/a")))
    assert load(file, ["model.dtype=float32"]).model.dtype == "float32"
    file.write_text(json.dumps(changed("model.dtype", "float32")))
    moved = load(file, ["model=org/b"]).model
    assert (moved.path, moved.dtype) == ("org/b", "float32"), "the other settings stay"


@pytest.mark.parametrize(("source", "base"), [("axolotl", AXOLOTL), ("llamafactory", FACTORY)])
def test_the_converter_takes_a_key_to_the_same_place(source: str, base: dict[str, Any], tmp_path: Path) -> None:
    draft = convert.SOURCES.load(source)(base, registry(tmp_path) / "x.yml", None)
    both = {key: path for key, path in draft.used.items() if key in KEYS and KEYS[key].path}
    assert len(both) > 8
    said = {key: str(KEYS[key]) for key in both}
    assert {key: path for key, path in both.items() if path not in said[key]} == {}


def test_the_converter_reads_the_same_values() -> None:
    for path, table in (("optimizer.name", common.OPTIMIZERS), ("schedule.name", common.SCHEDULES)):
        assert {word: here.value for word, here in VALUES[path].items()}.items() <= table.items()
    assert {keys_of(path) for path in VALUES} <= set(fields_below(Recipe, ()))


def test_a_shipped_recipe_is_read_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert {load(name).name for name in shipped()} == {load(path).name for path in shipped().values()}
    assert load("qwen2.5-7b-dora-ddp").name == load("qwen2_5_7b_dora_ddp").name
    assert load("quickstart", ["optimizer.lr=1e-3"]).optimizer.lr == 1e-3
    with pytest.raises(RecipeError, match=r"there is no such file.*muster init lists; did you mean 'quickstart'"):
        load("recipes/quikstart.yaml")
    with pytest.raises(RecipeError, match="no such file"):
        load(Path("quickstart"))  # a path is a file


def test_a_file_comes_before_a_shipped_recipe_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart").mkdir()
    assert load("quickstart").name == "quickstart", "a folder is no recipe"
    (tmp_path / "quickstart").rmdir()
    (tmp_path / "quickstart").write_text("name: 5")
    with pytest.raises(RecipeError, match="quickstart:1: name: takes text"):
        load("quickstart")
