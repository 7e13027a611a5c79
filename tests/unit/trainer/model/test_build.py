"""The base model: loaded whole or not at all, packed as it should be, and safe from bitsandbytes' repacking."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors

from tests.support.models import CPU, base_of, built, packed
from tests.support.training import small_recipe
from trainer.errors import InputError
from trainer.model import build, fetch_model, load_tokenizer
from trainer.recipe import Recipe
from trainer.storage import open_storage
from trainer.tasks import make_task

Make = Callable[..., Recipe]


@pytest.fixture
def make(tiny_model: Path, tmp_path: Path) -> Make:
    return lambda **changes: small_recipe("model", tiny_model, tmp_path, **changes)


def four_bit(model: Any) -> list[Any]:
    from bitsandbytes.nn import Linear4bit

    return [m for m in model.modules() if isinstance(m, Linear4bit)]


def test_no_4_bit_layer_is_repacked_for_avx512(make: Make) -> None:
    layers = four_bit(base_of(make(**{"model.quantization": "nf4"})))
    assert len(layers) == 14
    assert {layer.support_avx512bf16_for_cpu for layer in layers} == {False}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_lora_b_learns_after_an_evaluation(make: Make, dtype: str) -> None:
    recipe = make(**{"model.quantization": "nf4", "model.dtype": dtype})
    model, _ = built(recipe)
    task = make_task(recipe)
    task.attach(model)
    packed_bytes = [layer.weight.data.view(torch.uint8).clone() for layer in four_bit(model)]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
        task.loss_sum(model.eval(), packed([[12]]), CPU)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
        loss = task.loss_sum(model.train(), packed([[12, 9]]), CPU)
    loss.backward()  # type: ignore[no-untyped-call]
    gradients = {n: p.grad for n, p in model.named_parameters() if ".lora_B." in n}
    assert len(gradients) == 14
    for name, gradient in gradients.items():
        assert gradient is not None, name
        assert gradient.any(), name
    for layer, before in zip(four_bit(model), packed_bytes, strict=True):
        assert torch.equal(layer.weight.data.view(torch.uint8), before), "an evaluation leaves the packed bytes alone"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_nf4_is_doubly_quantised_and_stored_as_the_compute_dtype(make: Make, dtype: str) -> None:
    layers = four_bit(base_of(make(**{"model.quantization": "nf4", "model.dtype": dtype})))
    for layer in layers:
        state = layer.weight.quant_state
        assert state.quant_type == "nf4"
        assert state.nested
        assert state.absmax.dtype == torch.uint8
        assert layer.weight.dtype == getattr(torch, dtype)
        assert layer.compute_dtype == getattr(torch, dtype)


def test_int8_weights_are_bytes(make: Make) -> None:
    from bitsandbytes.nn import Linear8bitLt

    model = base_of(make(**{"model.quantization": "int8"}))
    layers = [m for m in model.modules() if isinstance(m, Linear8bitLt)]
    assert len(layers) == 14
    assert {layer.weight.dtype for layer in layers} == {torch.int8}


def test_what_was_read_is_counted(make: Make, tiny_model: Path) -> None:
    recipe = make()
    loaded = build(recipe.model, tiny_model, CPU, full=False, checkpointing=False)
    assert loaded.bytes_read == (tiny_model / "model.safetensors").stat().st_size
    assert loaded.peak_host_bytes >= 0
    assert not any(p.requires_grad for p in loaded.model.parameters())


def copied(model: Path, folder: Path) -> Path:
    shutil.copytree(model, folder)
    return folder


def build_in(folder: Path, make: Make) -> Any:
    return build(make(**{"model.path": str(folder)}).model, folder, CPU, full=False, checkpointing=False)


def test_weights_that_the_file_lacks_are_not_made_up(make: Make, tiny_model: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = copied(tiny_model, tmp_path / "headless")
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"lacks 1 weights of a causal language model \(lm_head\.weight\)"):
        build_in(folder, make)


def test_files_that_are_no_causal_language_model_are_refused(make: Make, tiny_model: Path, tmp_path: Path) -> None:
    folder = copied(tiny_model, tmp_path / "other")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "no-such-model"}))
    with pytest.raises(InputError, match=r"config.json that cannot be used: .*no-such-model"):
        build_in(folder, make)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match="cannot be loaded as a causal language model"):
        build_in(folder, make)


def test_a_folder_without_a_configuration_is_no_model(make: Make, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"holds no config\.json"):
        fetch_model(make(**{"model.path": str(tmp_path / "empty")}).model)


def test_a_model_in_object_storage_comes_once_and_again_when_it_changed(
    make: Make, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MUSTER_CACHE", str(tmp_path / "cache"))
    url = f"memory://model-{tmp_path.name}"
    storage = open_storage(url)
    for file in tiny_model.iterdir():
        storage.write(file.name, file.read_bytes())
    for extra in ("pytorch_model.bin", "original/params.json", "consolidated.safetensors"):
        storage.write(extra, b"the same weights once more")
    section = make(**{"model.path": url}).model
    light, first, second = fetch_model(section, weights=False), fetch_model(section), fetch_model(section)
    assert not list(light.folder.glob("*.safetensors"))
    assert {f.name for f in first.folder.iterdir()} == {f.name for f in tiny_model.iterdir()}
    assert first.fetched_bytes == sum(f.stat().st_size for f in tiny_model.iterdir())
    assert (second.folder, second.fetched_bytes) == (first.folder, 0)
    storage.write("config.json", (tiny_model / "config.json").read_bytes() + b"\n")
    changed = fetch_model(section)
    assert changed.folder != first.folder
    assert changed.fetched_bytes > 0


def test_the_hub_is_asked_for_what_is_needed(make: Make, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fnmatch import fnmatch

    import huggingface_hub

    asked: list[dict[str, Any]] = []

    def download(path: str, **wanted: Any) -> str:
        asked.append({"path": path, **wanted})
        return str(tiny_model)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)

    def wanted(file: str) -> bool:
        allowed, ignored = asked[-1]["allow_patterns"], asked[-1]["ignore_patterns"]
        return any(fnmatch(file, p) for p in allowed) and not any(fnmatch(file, p) for p in ignored)

    hub = {"model.path": "org/model", "model.revision": "v1"}
    assert fetch_model(make(**hub).model).folder == tiny_model
    assert (asked[-1]["path"], asked[-1]["revision"]) == ("org/model", "v1")
    assert wanted("config.json")
    assert wanted("model-00001-of-00002.safetensors")
    for file in ("consolidated.safetensors", "original/consolidated.00.pth", "pytorch_model.bin", "modeling.py"):
        assert not wanted(file), file
    fetch_model(make(**hub, **{"model.trust_remote_code": True}).model, weights=False)
    assert wanted("modeling.py"), "code that is trusted comes along"
    assert not wanted("model.safetensors")


def test_a_hub_that_gives_nothing_is_said(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(path: str, **wanted: Any) -> str:
        raise OSError("401 Client Error")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(InputError, match=r"'org/model' is neither a folder here nor a model.*401 Client Error"):
        fetch_model(make(**{"model.path": "org/model"}).model)


@pytest.mark.parametrize(
    ("kind", "cause"),
    [
        (errors.GatedRepoError, "accepted its terms"),
        (errors.RepositoryNotFoundError, "none of this name, or a private one"),
        (errors.RevisionNotFoundError, "no such revision"),
        (errors.LocalEntryNotFoundError, "the Hub cannot be reached"),
    ],
)
def test_why_the_hub_gives_nothing_is_one_clause(
    kind: type[Exception], cause: str, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(path: str, **wanted: Any) -> str:
        raise kind.__new__(kind, "Got: ConnectError. An error happened. Please check your connection.")

    (tmp_path / "models" / "tiny-llama").mkdir(parents=True)
    (tmp_path / "models" / "tiny-llama" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(InputError) as caught:
        fetch_model(make(**{"model.path": "models/tiny-lama"}).model)
    text = str(caught.value)
    assert cause in text
    assert text.endswith("did you mean 'tiny-llama'?")
    assert "An error happened" not in text


def test_a_folder_without_a_tokenizer_is_said(tiny_model: Path, tmp_path: Path) -> None:
    folder = copied(tiny_model, tmp_path / "no-tokenizer")
    for file in folder.glob("*token*"):
        file.unlink()
    with pytest.raises(InputError, match="no tokenizer can be loaded"):
        load_tokenizer(folder)
