"""What the tests of muster convert share: a whole file of each source, and what becomes of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from launcher import convert
from launcher.convert.draft import Draft
from trainer.recipe import Recipe, loads

AXOLOTL = {
    "base_model": "org/base",
    "adapter": "qlora",
    "load_in_4bit": True,
    "lora_r": 32,
    "lora_alpha": 16,
    "lora_dropout": 0.1,
    "lora_target_linear": True,
    "datasets": [{"path": "org/rows", "type": "alpaca"}],
    "sequence_len": 1024,
    "sample_packing": True,
    "micro_batch_size": 2,
    "gradient_accumulation_steps": 4,
    "num_epochs": 3,
    "learning_rate": "2e-5",
    "optimizer": "adamw_bnb_8bit",
    "lr_scheduler": "cosine",
    "warmup_ratio": 0.1,
    "bf16": "auto",
    "output_dir": "./outputs/first/",
}
FACTORY = {
    "stage": "sft",
    "do_train": True,
    "model_name_or_path": "org/base",
    "finetuning_type": "lora",
    "lora_rank": 8,
    "lora_target": "all",
    "dataset": "own, talks",
    "template": "llama3",
    "cutoff_len": 512,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 8,
    "learning_rate": 1.0e-4,
    "num_train_epochs": 3.0,
    "lr_scheduler_type": "cosine",
    "bf16": True,
    "output_dir": "saves/base/lora/sft",
}
INFO = {
    "own": {"file_name": "own.json"},
    "talks": {"hf_hub_url": "org/talks", "formatting": "sharegpt", "columns": {"messages": "turns", "tools": "tools"}},
    "pairs": {"hf_hub_url": "org/pairs", "ranking": True, "columns": {"prompt": "q", "chosen": "a", "rejected": "b"}},
    "rated": {
        "hf_hub_url": "org/rated",
        "formatting": "sharegpt",
        "columns": {"messages": "messages", "kto_tag": "good"},
        "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"},
    },
    "marked": {"hf_hub_url": "org/marked", "columns": {"prompt": "q", "response": "a", "kto_tag": "label"}},
    "plain": {"hf_hub_url": "org/plain", "subset": "en", "columns": {"prompt": "body"}},
    "pictures": {"file_name": "p.json", "formatting": "sharegpt", "columns": {"images": "images"}},
}


def changed(base: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in (base | change).items() if value is not ...}


def registry(folder: Path) -> Path:
    """The folder, with LLaMA-Factory's list of data sets in it."""
    (folder / "data").mkdir()
    (folder / "data" / "dataset_info.json").write_text(json.dumps(INFO))
    return folder


def result(
    source: str, settings: dict[str, Any], folder: Path, workers: int | None = None
) -> tuple[Draft, str, list[str]]:
    """The draft, its text, and what stands in the way of a recipe, of settings that were written to a file and read."""
    file = folder / "settings.yml"
    file.write_text(yaml.safe_dump(settings))
    draft = convert.SOURCES.load(source)(convert.read(file), file, workers)
    return draft, *convert.checked(draft, source, file)


def recipe(source: str, settings: dict[str, Any], folder: Path, workers: int | None = None) -> Recipe:
    _, text, hindrances = result(source, settings, folder, workers)
    assert not hindrances, hindrances
    return loads(text)


def at(made: Recipe, path: str) -> Any:
    value: Any = made.model_dump(mode="json")
    for key in path.split("."):
        value = value[int(key)] if isinstance(value, list) else value[key]
    return value
