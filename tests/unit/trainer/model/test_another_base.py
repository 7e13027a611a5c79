"""An adapter, or a run, whose base is another by now: a sentence that names what differs, never wrong in silence."""

from __future__ import annotations

import json
import logging
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from launcher.cli.app import main
from launcher.quickstart.corpus import pretraining_texts
from launcher.quickstart.model import LlamaShape, make_model
from tests.support.saved import adapter_of, trained
from tests.support.training import run_of, small_recipe, train_here, write_pairs
from trainer.artifacts import ArtifactRef, adapter_files, find, load
from trainer.artifacts.inspect import describe
from trainer.bounds import OutOfTime, bounded_cpu, bounded_memory
from trainer.errors import InputError
from trainer.model.files.identity import differences, identity_of
from trainer.model.placement import Placement
from trainer.recipe import ModelSection, Recipe, dump
from trainer.run import layout

SHAPES: dict[str, tuple[dict[str, int], str]] = {
    "deeper": ({"layers": 3}, "num_hidden_layers 2 is 3 here"),
    "shallower": ({"layers": 1}, "num_hidden_layers 2 is 1 here"),
    "wider": ({"hidden": 128}, "hidden_size 64 is 128 here"),
    "other heads": ({"kv_heads": 4}, "num_key_value_heads 2 is 4 here"),
    "other feed-forward": ({"intermediate": 256}, "intermediate_size 128 is 256 here"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases")
    write_pairs(folder / "data" / "a.jsonl", 60)
    return folder


@pytest.fixture(scope="module")
def plain(tiny_model: Path, folder: Path) -> Recipe:
    return trained("plain", tiny_model, folder)


def of_shape(folder: Path, seed: int = 3, **changes: int) -> Path:
    usual = {"hidden": 64, "layers": 2, "heads": 4, "kv_heads": 2, "intermediate": 128, "vocabulary": 384}
    shape = LlamaShape(**{**usual, "positions": 512, **changes})
    return make_model(folder, shape, pretraining_texts(seed=3, count=200), seed=seed)


def moved(plain: Recipe, folder: Path, base: Path) -> Path:
    """The adapter beside a muster.json and a configuration that name another base."""
    shutil.copytree(adapter_of(plain), folder)
    told = json.loads((folder / "muster.json").read_text())
    told["model"]["path"] = str(base)
    (folder / "muster.json").write_text(json.dumps(told))
    configured(folder, base_model_name_or_path=str(base))
    return folder


def configured(folder: Path, **changes: Any) -> Path:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


def muster(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["muster", *map(str, arguments)])
    with pytest.raises(SystemExit) as left:
        main()
    return int(left.value.code or 0)


@pytest.mark.parametrize("name", SHAPES)
def test_every_command_names_what_differs(
    name: str, plain: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    changes, said = SHAPES[name]
    base = of_shape(tmp_path / "base", **changes)
    adapter = moved(plain, tmp_path / "adapter", base)
    recipe = tmp_path / "recipe.yaml"
    data = plain.data.model_copy(update={"eval": plain.data.train})
    section = plain.model.model_copy(update={"path": str(base)})
    recipe.write_text(
        dump(plain.model_copy(update={"data": data, "model": section, "storage": str(tmp_path / "runs")}))
    )
    for words in (
        ["generate", "--adapter", adapter, "--prompt", "Rain"],
        ["merge", "--adapter", adapter, "--out", tmp_path / "merged"],
        ["evaluate", recipe, "--adapter", adapter, "--limit", 1],
        ["evaluate", recipe, "--run", run_of(plain).url, "--limit", 1],
    ):
        assert muster(monkeypatch, *words) == 2
        told = " ".join(capfd.readouterr().err.split())
        assert f"the adapter does not fit the base {base}: it was trained on another, of which {said}" in told
    assert not (tmp_path / "merged").exists()


def test_an_adapter_of_an_older_version_is_held_against_the_names_of_its_tensors(plain: Recipe, tmp_path: Path) -> None:
    base = of_shape(tmp_path / "base", layers=1)
    adapter = moved(plain, tmp_path / "adapter", base)
    told = json.loads((adapter / "muster.json").read_text())
    del told["base"]
    (adapter / "muster.json").write_text(json.dumps(told))
    with pytest.raises(InputError, match="14 of its 28 tensors have no place there"):
        load(find(ArtifactRef(adapters=(("default", str(adapter)),)), tmp_path / "a"), Placement.on("cpu"), None)


def test_other_weights_of_the_same_shape_are_said(
    plain: Recipe, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = of_shape(tmp_path / "base", seed=8)
    adapter = moved(plain, tmp_path / "adapter", base)
    with caplog.at_level(logging.WARNING):
        load(find(ArtifactRef(adapters=(("default", str(adapter)),)), tmp_path / "a"), Placement.on("cpu"), None)
    assert f"{base} holds other weights than the base that the adapter was trained on" in caplog.text
    caplog.clear()
    load(find(ArtifactRef(run=run_of(plain).url), tmp_path / "b"), Placement.on("cpu"), None)
    assert "holds other weights" not in caplog.text


@pytest.mark.parametrize("name", ["deeper", "other weights"])
def test_a_run_does_not_go_on_on_another_base(name: str, tiny_model: Path, folder: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    changes = {"training.stop_after": 2, "checkpoint.every_steps": 1, "storage": str(tmp_path / "runs")}
    recipe = small_recipe("changed", base, folder, **changes)
    assert train_here(recipe) == "interrupted"
    kept = {f.name: f.read_bytes() for f in base.iterdir()}
    other = of_shape(tmp_path / "other", **(SHAPES["deeper"][0] if name == "deeper" else {"seed": 8}))
    for weights in ("config.json", "model.safetensors"):
        shutil.copy(other / weights, base / weights)
    on = recipe.model_copy(update={"training": recipe.training.model_copy(update={"stop_after": 4})})
    said = "num_hidden_layers 2 is 3 here" if name == "deeper" else r"weights \w+ is \w+ here"
    message = rf"holds another base model than .* was started with: .*{said}.*; put that one back"
    with pytest.raises(InputError, match=message):
        train_here(on)
    for file, raw in kept.items():
        (base / file).write_bytes(raw)
    assert train_here(on) == "interrupted"
    records = [json.loads(path.read_text()) for path in Path(run_of(on).url, layout.COMMITS).rglob("*.json")]
    assert max(record["step"] for record in records) == 4
    assert all(record["state"]["base"] == identity_of(ModelSection(path=str(base))) for record in records)


def test_the_same_base_is_known_again_in_another_place_and_form(tiny_model: Path, tmp_path: Path) -> None:
    """The same tensors in files of another cut have the same identity; one weight changed has another."""
    copy = tmp_path / "copy"
    shutil.copytree(tiny_model, copy)
    tensors = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, some in parts.items():
        save_file({name: tensors[name] for name in some}, copy / file)
    index = {"weight_map": {name: file for file, some in parts.items() for name in some}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    was, now = (identity_of(ModelSection(path=str(place))) for place in (tiny_model, copy))
    assert was == now
    assert differences(was, now) == []
    for file, some in parts.items():
        save_file({name: tensors[name] + 1 for name in some}, copy / file)
    assert [told.split()[0] for told in differences(was, identity_of(ModelSection(path=str(copy))))] == ["weights"]
    assert differences({}, now) == [], "a run of an older version has none"


WILD: dict[str, tuple[dict[str, Any], str]] = {
    "rank 10**9": ({"r": 10**9}, "does not fit the base"),
    "a rank of text": ({"r": "8"}, "does not fit the base"),
    "another rank": ({"r": 5}, "does not fit the base"),
    "alpha NaN": ({"lora_alpha": float("nan")}, "has lora_alpha nan, which is no finite number"),
    "alpha Infinity": ({"alpha_pattern": {"q_proj": float("inf")}}, "has alpha_pattern.q_proj inf, which is no finite"),
    "an endless expression": ({"target_modules": "(([a-z_.0-9]+)+)+!"}, "target_modules .* takes too long"),
    "an endless key": ({"rank_pattern": {"(([a-z_.0-9]+)+)+!": 4}}, "rank_pattern .* takes too long"),
    "endless exclusions": ({"exclude_modules": "(([a-z_.0-9]+)+)+!"}, "exclude_modules .* takes too long"),
    "no expression": ({"target_modules": "("}, "target_modules .* is no valid regular expression"),
    "targets of a number": ({"target_modules": 5}, "does not fit the base"),
    "other targets": ({"target_modules": ["q_proj"]}, "of its 28 tensors have no place there"),
    "a pattern of a list": ({"rank_pattern": [1]}, "does not fit the base"),
    "an unknown type": ({"peft_type": "EVIL"}, "does not fit the base"),
    "a type of a list": ({"peft_type": ["LORA"]}, r"peft_type is \['LORA'\], and a text is needed"),
    "a type that loads more": ({"peft_type": "XLORA"}, "has the peft_type 'XLORA', which is not loaded here"),
    "code": ({"megatron_config": {"a": 1}, "megatron_core": "this"}, "has megatron_config, which names code"),
    "an unknown task": ({"task_type": {"a": 1}}, "task_type is {'a': 1}, and a text is needed"),
}


@pytest.mark.parametrize("name", WILD)
def test_wild_values_of_a_configuration_end_in_a_sentence(
    name: str, plain: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(adapter_files, "MATCHING_S", 1.0)
    changes, said = WILD[name]
    shutil.copytree(adapter_of(plain), tmp_path / "adapter")
    configured(tmp_path / "adapter", **changes)
    sys.modules.pop("this", None)
    assert muster(monkeypatch, "generate", "--adapter", tmp_path / "adapter", "--prompt", "Rain") == 2
    told = capfd.readouterr().err
    assert re.search(said, " ".join(told.split()))
    assert "Traceback" not in told
    assert "this" not in sys.modules, "nothing is imported"
    assert muster(monkeypatch, "inspect", tmp_path / "adapter") in (0, 1, 2), "and it is looked at in bounds"
    assert "Traceback" not in capfd.readouterr().err


def test_a_prompt_is_not_drawn_from_what_its_configuration_names(
    tiny_model: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    recipe = trained("prompt", tiny_model, folder, adapter={"method": "prompt", "virtual_tokens": 4})
    shutil.copytree(adapter_of(recipe), tmp_path / "adapter")
    init = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "x", "inference_mode": False}
    configured(
        tmp_path / "adapter", **init, tokenizer_name_or_path="evil", tokenizer_kwargs={"trust_remote_code": True}
    )
    asked: list[Any] = []
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *a, **k: asked.append((a, k)))
    assert describe(str(tmp_path / "adapter")).whole
    subject = find(ArtifactRef(adapters=(("default", str(tmp_path / "adapter")),)), tmp_path / "found")
    load(subject, Placement.on("cpu"), None)
    assert asked == []


def _spin() -> None:
    while True:
        pass


def test_bounds_hold_and_are_taken_back() -> None:
    with bounded_memory(2**28), pytest.raises((MemoryError, RuntimeError)):
        torch.empty(2**30, dtype=torch.uint8)
    assert torch.empty(2**29, dtype=torch.uint8).numel() == 2**29
    with pytest.raises(OutOfTime), bounded_cpu(0.05):
        _spin()
    with bounded_cpu(0.05):
        pass
    for _ in range(10**6):
        pass
