"""What is found out about model, tokenizer, storage and recipe before any worker starts."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers

from launcher.driver.preflight import check_model, check_storage
from tests.storage.doubles import faulty
from tests.support.tasks import task_recipe, write_task_data
from tests.support.training import small_recipe
from tests.unit.trainer.data.data_support import write_rows
from trainer.errors import InputError, StorageError
from trainer.model import check_weights, fetch_model
from trainer.recipe import ModelSection, Recipe, dump
from trainer.storage import open_storage
from trainer.storage.backend import Transient

Change = Callable[[Path], object]


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path) -> Path:
    """A model folder that a test may damage, beside data/a.jsonl."""
    rows = [{"prompt": f"Who is number {i}?", "completion": f" It is {i}."} for i in range(20)]
    write_rows(tmp_path / "data" / "a.jsonl", rows)
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def recipe_of(folder: Path, **changes: Any) -> Recipe:
    return small_recipe("inputs", folder, folder.parent, **changes)


def edit(path: Path, **values: Any) -> None:
    """Sets keys of a JSON file; None takes them out."""
    found = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({k: v for k, v in found.items() if v is not None}))


def refusal(recipe: Recipe) -> str:
    with pytest.raises(InputError) as caught:
        check_model(recipe, pytest.fail)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_whole_inputs_pass_without_a_word(folder: Path) -> None:
    check_model(recipe_of(folder), pytest.fail)
    check_model(recipe_of(folder, **{"adapter": {"method": "none"}}), pytest.fail)


def test_no_weights_are_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    from trainer.storage import Storage

    read = Storage.read_range

    def counted(self: Storage, key: str, start: int, stop: int) -> bytes:
        if key.endswith(".safetensors"):
            sizes.append(stop - start)
        return read(self, key, start, stop)

    monkeypatch.setattr(Storage, "read_range", counted)
    check_weights(recipe_of(folder).model)
    assert 0 < sum(sizes) < (folder / "model.safetensors").stat().st_size / 10


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda f: (f / "config.json").unlink(), "holds no config.json"),
        (lambda f: (f / "config.json").write_text("{"), "config.json that cannot be used"),
        (lambda f: edit(f / "config.json", model_type="foobar"), "config.json that cannot be used"),
        (lambda f: os.truncate(f / "model.safetensors", 9999), "is torn: it has 9999 bytes, and its header describes"),
        (lambda f: os.truncate(f / "model.safetensors", 0), "is torn: it has 0 bytes and no readable header"),
        (lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 64), "is torn: it has 64 bytes and no readable"),
        (lambda f: (f / "model.safetensors").unlink(), "holds no weights in safetensors: put model.safetensors there"),
        (
            lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
            "pytorch_model.bin would have to be saved as safetensors",
        ),
        (lambda f: (f / "tokenizer.json").write_text("{"), "no tokenizer can be loaded"),
        (lambda f: edit(f / "tokenizer_config.json", eos_token="<|other|>"), "and the model has embeddings for"),
        (lambda f: edit(f / "config.json", vocab_size=100), "and the model embeddings for 100 only"),
    ],
)
def test_damaged_models_are_a_sentence(folder: Path, damage: Change, says: str) -> None:
    damage(folder)
    assert says in refusal(recipe_of(folder))


def test_a_model_of_another_kind(folder: Path) -> None:
    kind = {
        "model_type": "t5",
        "d_model": 16,
        "d_kv": 8,
        "num_layers": 1,
        "num_heads": 2,
        "d_ff": 16,
        "vocab_size": 384,
    }
    (folder / "config.json").write_text(json.dumps(kind))
    assert "holds a 't5' model, which is no causal language model" in refusal(recipe_of(folder))


def test_shards_are_checked_by_their_index(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    (folder / "model.safetensors").rename(folder / first)
    index.write_text(json.dumps({"weight_map": {"a": first, "b": second}}))
    section = recipe_of(folder).model
    with pytest.raises(InputError, match=rf"1 of the 2 weight files .* are not there \({second}\)"):
        check_weights(section)
    shutil.copy(folder / first, folder / second)
    check_weights(section)
    os.truncate(folder / second, 500)
    with pytest.raises(InputError, match=f"{second} is torn"):
        check_weights(section)
    for broken in ("{}", "[]", "{"):
        index.write_text(broken)
        with pytest.raises(InputError, match="holds no weight_map"):
            check_weights(section)


def test_a_typo_in_the_target_modules_lists_what_there_is(folder: Path) -> None:
    text = refusal(recipe_of(folder, **{"adapter.target_modules": ["q_proj", "v_porj"]}))
    assert "['v_porj']" in text
    assert "q_proj, up_proj, v_proj" in text


def test_a_metric_of_answers_that_is_not_there(folder: Path) -> None:
    asked = {"generative_eval": {"count": 2, "metric": "own.py:rate"}, "data.eval_fraction": 0.1}
    assert "generative_eval.metric 'own.py:rate' cannot be loaded" in refusal(recipe_of(folder, **asked))


def test_more_tokens_than_positions(folder: Path) -> None:
    said: list[str] = []
    check_model(recipe_of(folder, **{"data.sequence_length": 1024}), said.append)
    assert len(said) == 1
    assert "data.sequence_length 1024 is more than the 512 positions" in said[0]
    unpacked = recipe_of(folder, **{"data.sequence_length": 1024, "data.packing": False})
    assert refusal(unpacked).endswith("set it to 512 or less")


def test_a_table_of_positions_ends_where_it_ends(folder: Path) -> None:
    shape = {"n_positions": 64, "n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 384}
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2", **shape}))
    changes = {"data.sequence_length": 65, "adapter.target_modules": ["c_attn"]}
    assert "more than the 64 positions" in refusal(recipe_of(folder, **changes))
    check_model(recipe_of(folder, **{**changes, "data.sequence_length": 64}), pytest.fail)


def test_a_tokenizer_without_pad_and_chat_template_serves_completions(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", pad_token=None, chat_template=None)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    check_model(recipe_of(folder), pytest.fail)
    messages = folder.parent / "data" / "m.jsonl"
    messages.write_text('{"messages": [{"role": "assistant", "content": "yes"}]}\n')
    train = [{"path": str(messages), "format": "messages"}]
    assert "set data.chat_template" in refusal(recipe_of(folder, **{"data.train": train}))


@pytest.mark.parametrize("path", ["/no/such/folder", "./none", "~/none", "a/b/c"])
def test_a_path_is_not_looked_for_on_the_hub(path: str) -> None:
    with pytest.raises(InputError, match="is no folder on this host"):
        fetch_model(ModelSection(path=path), weights=False)


def test_a_source_that_is_not_there_is_said_before_any_library_is_loaded(tiny_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "early.yaml"
    path.write_text(dump(small_recipe("early", tiny_model, tmp_path)))
    for command in ("run", "preview"):
        code = (
            "import sys; from launcher.cli.app import app; from trainer.errors import InputError\n"
            f"try: app([{command!r}, {str(path)!r}], standalone_mode=False)\n"
            "except InputError as error: print(error)\n"
            "sys.exit(bool({'torch', 'transformers', 'ray', 'peft'} & set(sys.modules)))"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
        assert "nothing there matches" in done.stdout
        assert done.returncode == 0


def test_a_full_disk_and_a_storage_that_fails_are_told_apart() -> None:
    storage, backend = faulty(deadline_s=1.0)

    def full(verb: str, path: str) -> None:
        error = OSError(errno.ENOSPC, "No space left on device")
        raise Transient(str(error)) from error

    backend.before = full
    with pytest.raises(InputError, match="the disk of faulty://run is full: make room"):
        check_storage(storage)

    def down(verb: str, path: str) -> None:
        raise Transient("503")

    backend.before = down
    with pytest.raises(StorageError) as caught:
        check_storage(storage)
    assert ".probe" not in str(caught.value)


def test_a_storage_that_cannot_be_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError) as caught:
        check_storage(open_storage(str(tmp_path / "file")))
    assert ".probe" not in str(caught.value)
    assert check_storage(open_storage(str(tmp_path / "new" / "folder")))


def test_a_model_cache_without_room_says_which_variable_moves_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trainer.storage import Storage

    memory = open_storage("memory://models/m")
    memory.write("config.json", b"{}")

    def full(self: Storage, key: str, path: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setenv("MUSTER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(Storage, "download", full)
    with pytest.raises(
        InputError, match=r"cannot take the 2 bytes of .* \(No space left on device\): set MUSTER_CACHE"
    ):
        fetch_model(ModelSection(path="memory://models/m"))
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MUSTER_CACHE", str(tmp_path / "file"))
    with pytest.raises(InputError, match="MUSTER_CACHE"):
        fetch_model(ModelSection(path="memory://models/m"))


@pytest.mark.parametrize("task", ["sft", "classification"])
def test_keys_and_values_of_a_classifier_that_takes_none(
    task: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward(self: Any, input_ids: Any, **rest: Any) -> None:
        """As transformers 5.24 declares it."""

    for kind in (transformers.LlamaForCausalLM, transformers.LlamaForSequenceClassification, transformers.LlamaModel):
        monkeypatch.setattr(kind, "forward", forward)
    write_task_data(tmp_path, task)
    recipe = task_recipe(task, "keys", tiny_model, tmp_path, **{"adapter": {"method": "prefix"}, "data.packing": False})
    if task == "classification":
        assert "LlamaForSequenceClassification of transformers" in refusal(recipe)
    else:
        check_model(recipe, lambda odd: None)
