"""docs/migration.md: the keys of its table come to where it says; trl's example is the recipe that stands beside it."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.unit.launcher.convert.convert_support import AXOLOTL, FACTORY, at, registry, result
from trainer.recipe import Recipe, parse

TEXT = (Path(__file__).resolve().parents[4] / "docs" / "migration.md").read_text()
PAIRS = [{"path": "o/p", "type": "chatml.ultra"}]
EVALUATED = {"val_set_size": 0.1, "val_size": 0.1, "dataset": "talks", "eval_steps": 20}
GROUPS: dict[str, Any] = {
    "rl": "grpo",
    "trl": {"num_generations": 4, "loss_type": "grpo", "reward_funcs": ["rewards.right"]},
    "datasets": [{"path": "o/p", "type": "chat_template"}],
}
SETS: dict[str, dict[str, Any]] = {
    "fp16": {"bf16": False, "fp16": True},
    "quantization_bit": {"quantization_bit": 4},
    "peft_use_dora": {"peft_use_dora": True},
    "use_dora": {"use_dora": True},
    "packing": {"packing": True},
    "neat_packing": {"neat_packing": True},
    "max_steps": {"max_steps": 50},
    "val_set_size": {"val_set_size": 0.1},
    "val_size": {"val_size": 0.1, "dataset": "talks"},
    "warmup_ratio": {"warmup_ratio": 0.1},
    "flash_attention": {"flash_attention": True},
    "liger_rope": {"plugins": ["axolotl.integrations.liger.LigerPlugin"], "liger_rope": True},
    "flash_attn": {"flash_attn": "fa2"},
    "enable_liger_kernel": {"enable_liger_kernel": True},
    "neftune_noise_alpha": {"neftune_noise_alpha": 5},
    "rl": {"rl": "simpo", "datasets": PAIRS},
    "trl.num_generations": GROUPS,
    "trl.loss_type": GROUPS,
    "trl.reward_funcs": GROUPS,
    "pref_loss": {"stage": "dpo", "dataset": "pairs", "pref_loss": "simpo"},
    "dpo_loss_type": {"rl": "dpo", "dpo_loss_type": ["ipo"], "datasets": PAIRS},
    "rpo_alpha": {"rl": "dpo", "rpo_alpha": 0.5, "datasets": PAIRS},
    "pref_ftx": {"stage": "dpo", "dataset": "pairs", "pref_ftx": 0.5},
    "kto_desirable_weight": {"rl": "kto", "kto_desirable_weight": 2, "datasets": PAIRS},
    "kto_chosen_weight": {"stage": "kto", "dataset": "rated", "kto_chosen_weight": 2},
    "do_causal_lm_eval": {"do_causal_lm_eval": True, "val_set_size": 0.1},
    "predict_with_generate": {"predict_with_generate": True, "val_size": 0.1, "dataset": "talks"},
    "save_steps": {"save_steps": 50},
    "save_total_limit": {"save_total_limit": 2},
    "lora_model_dir": {"lora_model_dir": "runs/one"},
    "adapter_name_or_path": {"adapter_name_or_path": "runs/one"},
    "load_best_model_at_end": {"load_best_model_at_end": True, **EVALUATED},
    "early_stopping_patience": {"early_stopping_patience": 3, **EVALUATED},
    "early_stopping_steps": {"early_stopping_steps": 3, **EVALUATED},
}
"""What the tests' whole files lack, by the key that is looked at."""


def table() -> list[tuple[str, str, list[str]]]:
    """Each key with its program and the places that its row names."""
    rows = [line.split("|")[2:5] for line in TEXT.partition("## trl")[0].splitlines() if line.startswith("| ")][1:]
    quoted = [[re.findall(r"`([\w.]+)`", cell) for cell in row] for row in rows]
    return [
        (program, key, places)
        for axolotl, factory, places in quoted
        for program, keys in (("axolotl", axolotl), ("llamafactory", factory))
        for key in keys
    ]


def test_the_table_was_found() -> None:
    assert len(table()) > 30


@pytest.mark.parametrize(("program", "key", "places"), table())
def test_a_key_comes_to_where_the_table_says(program: str, key: str, places: list[str], tmp_path: Path) -> None:
    base = AXOLOTL if program == "axolotl" else FACTORY
    draft, _, hindrances = result(program, base | SETS.get(key, {}), registry(tmp_path))
    assert not hindrances
    assert draft.used[key] in places


def trl() -> dict[str, Any]:
    """The arguments of trl's example by name, those of its parts among them."""
    (code,) = re.findall(r"```python\n(SFTTrainer.*?)```", TEXT, flags=re.S)
    calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    words = [word for call in calls for word in call.keywords]
    said: dict[str, Any] = {str(w.arg): ast.literal_eval(w.value) for w in words if isinstance(w.value, ast.Constant)}
    (loaded,) = [call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "load_dataset"]
    return said | {"dataset": ast.literal_eval(loaded.args[0])}


def recipe() -> Recipe:
    (text,) = re.findall(r"```yaml\n(.*?)```", TEXT, flags=re.S)
    return parse(yaml.safe_load(text))


@pytest.mark.parametrize(
    ("argument", "path"),
    [
        ("model", "model.path"),
        ("r", "adapter.rank"),
        ("lora_alpha", "adapter.alpha"),
        ("lora_dropout", "adapter.dropout"),
        ("target_modules", "adapter.target_modules"),
        ("max_length", "data.sequence_length"),
        ("packing", "data.packing"),
        ("per_device_train_batch_size", "training.micro_batch"),
        ("gradient_checkpointing", "training.gradient_checkpointing"),
        ("num_train_epochs", "training.epochs"),
        ("learning_rate", "optimizer.lr"),
        ("lr_scheduler_type", "schedule.name"),
        ("warmup_steps", "schedule.warmup_ratio"),
    ],
)
def test_the_recipe_beside_trl_says_the_same(argument: str, path: str) -> None:
    assert at(recipe(), path) == trl()[argument]


def test_what_is_put_together_is_the_same_too() -> None:
    made, said = recipe(), trl()
    accumulated = said["per_device_train_batch_size"] * said["gradient_accumulation_steps"]
    assert made.training.global_batch == accumulated * made.resources.max_workers
    assert made.run_uri == said["output_dir"]
    assert made.data.train[0].path == f"hf://{said['dataset']}"
    assert (made.model.dtype == "bfloat16") == said["bf16"]
    assert (made.data.train[0].format == "messages") == said["assistant_only_loss"]
