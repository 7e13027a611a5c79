"""The JSON files beside a model's or an adapter's weights, of any shape: loaded, or one sentence."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.driver.preflight import _model_without_weights
from tests.support.hostile import BYTES, JSON_BOMBS, as_json, changed, put
from trainer.artifacts.batch import _rows
from trainer.artifacts.locate import ArtifactRef, find
from trainer.checkpoint.artifact_info import ORIGIN_FILE, ArtifactInfo
from trainer.errors import InputError
from trainer.model import build, check_weights, fetch_model, load_tokenizer
from trainer.model.files.configs import CONFIG_FILES
from trainer.model.files.safetensors_index import read_headers
from trainer.model.files.weight_check import INDEX, SINGLE
from trainer.model.files.weight_source import WeightSource
from trainer.model.meta import meta_model
from trainer.model.placement import model_bytes
from trainer.recipe import ModelSection
from trainer.recipe.tasks import CAUSAL


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def said(error: BaseException) -> None:
    text = str(error)
    assert 0 < len(text) < 1000
    assert "\n" not in text


@pytest.mark.parametrize("name", CONFIG_FILES)
@pytest.mark.parametrize("body", [*JSON_BOMBS, *BYTES])
def test_a_file_out_of_bounds_is_named(name: str, body: str, model: Path) -> None:
    raw = BYTES[body] if body in BYTES else JSON_BOMBS[body].encode()
    (model / name).write_bytes(raw)
    if body == "twice":
        fetch_model(ModelSection(path=str(model)), weights=False)
        return
    with pytest.raises(InputError, match=name) as caught:
        fetch_model(ModelSection(path=str(model)), weights=False)
    said(caught.value)


WRONG = [None, True, -1, 0, 10**30, 1.5, "x", "", [], {}, ["a"], {"a": 1}, [None], 10**99, 1e300]


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json"])
def test_a_value_of_another_type_is_loaded_or_a_sentence(name: str, model: Path) -> None:
    """One wrong value of each key, in the ways that a command takes to the files."""
    import torch

    section, cpu, path = ModelSection(path=str(model)), torch.device("cpu"), model / name
    ways: list[Callable[[], Any]] = [
        lambda: meta_model(section, model, cpu, full=False, checkpointing=False),
        lambda: _model_without_weights(section, model, CAUSAL),
        lambda: build(section, model, cpu, full=False, checkpointing=False),
        lambda: model_bytes(section, model),
    ]
    body = json.loads(path.read_text())
    for i, key in enumerate(body):
        for wrong in (WRONG[i % len(WRONG)], WRONG[(i + 7) % len(WRONG)]):
            path.write_bytes(as_json({**body, key: wrong}))
            for way in [lambda: load_tokenizer(model)] if name.startswith("tokenizer") else ways:
                try:
                    fetch_model(section, weights=False)
                    way()
                except InputError as error:
                    said(error)


def test_a_model_of_countless_layers_is_not_begun(model: Path) -> None:
    body = json.loads((model / "config.json").read_text())
    for config in ({**body, "num_hidden_layers": 10**30}, {**body, "text_config": {"n_routed_experts": 10**6}}):
        (model / "config.json").write_bytes(as_json(config))
        with pytest.raises(InputError, match="at most 10,000 are built"):
            fetch_model(ModelSection(path=str(model)), weights=False)


def header_of(model: Path) -> dict[str, Any]:
    with (model / SINGLE).open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        return dict(json.loads(file.read(length)))


@given(data=st.data())
@settings(max_examples=100)
def test_any_header_of_weights_is_one_or_a_sentence(data: st.DataObject, tmp_path_factory: Any) -> None:
    entry = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
    body = data.draw(changed({"a": entry, "__metadata__": {"format": "pt"}}))
    folder = tmp_path_factory.mktemp("weights")
    raw = as_json(body)
    (folder / SINGLE).write_bytes(struct.pack("<Q", len(raw)) + raw + b"\0" * 16)
    for read in (
        lambda: check_weights(ModelSection(path=str(folder))),
        lambda: read_headers(WeightSource(str(folder)), str(folder)),
    ):
        try:
            read()
        except InputError as error:
            said(error)


@given(data=st.data())
@settings(max_examples=60)
def test_any_index_of_weights_is_one_or_a_sentence(data: st.DataObject, tmp_path_factory: Any) -> None:
    folder = tmp_path_factory.mktemp("index")
    (folder / INDEX).write_bytes(as_json(data.draw(changed({"weight_map": {"a": "x.safetensors"}, "metadata": {}}))))
    with pytest.raises(InputError) as caught:
        check_weights(ModelSection(path=str(folder)))
    said(caught.value)


ORIGIN = {"task": "sft", "method": "lora", "model": {"path": "m"}, "format": "messages", "template": None}


@given(data=st.data())
@settings(max_examples=100)
def test_any_origin_beside_an_adapter_is_one_or_none(data: st.DataObject, tmp_path_factory: Any) -> None:
    folder = tmp_path_factory.mktemp("adapter")
    (folder / ORIGIN_FILE).write_bytes(as_json(data.draw(changed(ORIGIN))))
    found = ArtifactInfo.read(folder)
    assert found is None or isinstance(found.format, str | None)


@pytest.mark.parametrize("body", [*JSON_BOMBS.values(), *BYTES.values()], ids=[*JSON_BOMBS, *BYTES])
def test_an_origin_out_of_bounds_is_none(body: str | bytes, tmp_path: Path) -> None:
    (tmp_path / ORIGIN_FILE).write_bytes(body if isinstance(body, bytes) else body.encode())
    assert ArtifactInfo.read(tmp_path) is None


ADAPTER = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "", "revision": None, "r": 8}


def test_any_adapter_configuration_is_one_or_a_sentence(model: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    sound = {**ADAPTER, "base_model_name_or_path": str(model)}
    for key in sound:
        for wrong in WRONG:
            (tmp_path / "adapter" / "adapter_config.json").write_bytes(as_json(put(sound, (key,), wrong)))
            try:
                find(ArtifactRef(adapters=(("default", str(tmp_path / "adapter")),)), tmp_path / "here")
            except InputError as error:
                said(error)


@pytest.mark.parametrize("number", ["x", "-1", "9" * 5000, "1.5", ""])
def test_a_label_of_no_output_is_named(number: str, model: Path, tmp_path: Path) -> None:
    body = json.loads((model / "config.json").read_text())
    body |= {"architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "a", number: "b"}}
    (model / "config.json").write_bytes(as_json(body))
    with pytest.raises(InputError, match="no number of an output"):
        find(ArtifactRef(model=str(model)), tmp_path)


@pytest.mark.parametrize("line", [*JSON_BOMBS, *BYTES])
def test_a_line_of_prompts_out_of_bounds_is_named(line: str, tmp_path: Path) -> None:
    raw = BYTES[line] if line in BYTES else JSON_BOMBS[line].encode()
    source = tmp_path / "in.jsonl"
    source.write_bytes(b'{"prompt": "a"}\n' + raw + b"\n")
    if not raw:
        assert list(_rows(str(source))) == [{"prompt": "a"}]
        return
    with pytest.raises(InputError, match=r"in\.jsonl, line 2 is") as caught:
        list(_rows(str(source)))
    assert len(str(caught.value)) < 500


def test_a_line_of_prompts_without_an_end_is_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from trainer.artifacts import batch

    monkeypatch.setattr(batch, "ROW_BYTES", 1000)
    source = tmp_path / "in.jsonl"
    with source.open("wb") as file:
        file.truncate(100 << 30)
    with pytest.raises(InputError, match="line 1 is longer than"):
        list(_rows(str(source)))
