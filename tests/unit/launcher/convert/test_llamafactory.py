"""muster convert llamafactory: each key's value in the recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launcher.convert.draft import UNKNOWN
from tests.unit.launcher.convert.convert_support import FACTORY, at, changed, recipe, registry, result
from trainer.recipe import loads


def test_a_whole_file_of_llamafactory(tmp_path: Path) -> None:
    made = recipe("llamafactory", FACTORY, registry(tmp_path))
    assert made.run_uri == "saves/base/lora/sft"
    assert (made.adapter.rank, made.adapter.alpha, made.adapter.dropout) == (8, 16, 0.0)
    assert [source.format for source in made.data.train] == ["instruction", "messages"]
    assert made.data.train[0].path == str(tmp_path / "data" / "own.json")
    assert made.data.train[1].columns == {"messages": "turns"}
    assert (made.training.global_batch, made.training.epochs) == (16, 3)
    assert made.training.gradient_checkpointing, "which it has on unless it is told otherwise"
    assert not made.data.packing


FACTORY_CASES: list[tuple[dict[str, Any], str, Any]] = [
    ({"finetuning_type": "full"}, "adapter.method", "none"),
    ({"finetuning_type": "oft", "oft_block_size": 16}, "adapter.block_size", 16),
    ({"use_dora": True}, "adapter.method", "dora"),
    ({"pissa_init": True}, "adapter.method", "pissa"),
    ({"loraplus_lr_ratio": 8.0}, "adapter.lr_ratio", 8.0),
    ({"lora_target": "q_proj,v_proj"}, "adapter.target_modules", ["q_proj", "v_proj"]),
    ({"additional_target": "embed_tokens"}, "adapter.modules_to_save", ["embed_tokens"]),
    ({"quantization_bit": 4}, "model.quantization", "nf4"),
    ({"quantization_bit": 8, "quantization_method": "bnb"}, "model.quantization", "int8"),
    ({"deepspeed": "x/ds_z3_offload_config.json"}, "strategy.deepspeed", "zero3_offload"),
    ({"deepspeed": "x/ds_z0_config.json"}, "strategy.kind", "ddp"),
    ({"stage": "pt", "dataset": "plain"}, "data.train.0.columns", {"text": "body"}),
    ({"stage": "pt", "dataset": "plain"}, "data.packing", True),
    ({"stage": "pt", "dataset": "plain"}, "data.train.0.path", "hf://org/plain/en"),
    ({"stage": "dpo", "dataset": "pairs", "pref_beta": 0.2}, "dpo.beta", 0.2),
    ({"stage": "dpo", "dataset": "pairs", "pref_loss": "ipo"}, "dpo.loss", "ipo"),
    ({"stage": "dpo", "dataset": "pairs", "pref_loss": "hinge"}, "dpo.loss", "hinge"),
    ({"stage": "dpo", "dataset": "pairs", "dpo_label_smoothing": 0.1}, "dpo.label_smoothing", 0.1),
    ({"stage": "dpo", "dataset": "pairs", "pref_ftx": 0.5}, "dpo.rpo_alpha", 0.5),
    ({"stage": "kto", "dataset": "rated", "pref_beta": 0.2}, "kto.beta", 0.2),
    ({"stage": "kto", "dataset": "rated", "kto_chosen_weight": 1.2}, "kto.desirable_weight", 1.2),
    ({"stage": "kto", "dataset": "rated", "kto_rejected_weight": 0.5}, "kto.undesirable_weight", 0.5),
    ({"stage": "kto", "dataset": "rated"}, "data.train.0.format", "unpaired_preference"),
    ({"stage": "kto", "dataset": "rated"}, "data.train.0.columns", {"completion": "messages", "label": "good"}),
    ({"stage": "kto", "dataset": "marked"}, "data.train.0.columns", {"prompt": "q", "completion": "a"}),
    ({"stage": "kto", "dataset": "rated", "template": "qwen3"}, "data.chat_template", "qwen3"),
    ({"neftune_noise_alpha": 5}, "sft.neftune_alpha", 5.0),
    ({"label_smoothing_factor": 0.1}, "sft.label_smoothing", 0.1),
    ({"stage": "dpo", "dataset": "pairs", "pref_loss": "orpo", "pref_beta": 0.2}, "orpo.beta", 0.2),
    ({"stage": "dpo", "dataset": "pairs", "pref_loss": "simpo"}, "simpo.beta", 0.1),
    ({"stage": "dpo", "dataset": "pairs", "pref_loss": "simpo", "simpo_gamma": 0.9}, "simpo.gamma", 0.9),
    ({"stage": "dpo", "dataset": "pairs", "pref_loss": "simpo", "pref_ftx": 0.5}, "simpo.cpo_alpha", 0.5),
    ({"stage": "rm", "dataset": "pairs"}, "data.train.0.columns", {"prompt": "q", "chosen": "a", "rejected": "b"}),
    ({"stage": "ppo", "reward_model": "runs/reward"}, "ppo.reward.model", "runs/reward"),
    ({"dataset": "talks", "val_size": 0.1}, "data.eval_fraction", 0.1),
    ({"dataset": "talks", "max_samples": 50}, "data.train.0.limit", 50),
    ({"dataset": "talks", "template": "qwen3"}, "data.chat_template", "qwen3"),
    ({"template": "qwen3"}, "data.train.0.as", "chat"),
    ({"eval_dataset": "talks", "eval_steps": 20}, "training.eval_every", 20),
    ({"eval_dataset": "talks", "predict_with_generate": True}, "generative_eval.count", 64),
    ({"eval_dataset": "talks", "predict_with_generate": True}, "generative_eval.max_new_tokens", 1024),
    ({"optim": "paged_adamw_8bit"}, "optimizer.name", "paged_adamw_8bit"),
    ({"lr_scheduler_type": ...}, "schedule.name", "linear"),
    ({"packing": True}, "data.packing", True),
    ({"disable_gradient_checkpointing": True}, "training.gradient_checkpointing", False),
    ({"ray_num_workers": 4}, "training.global_batch", 64),
    ({"bf16": ...}, "model.dtype", "bfloat16"),
    ({"bf16": False, "fp16": True}, "model.dtype", "float16"),
    ({"neat_packing": True}, "data.packing", True),
    ({"packing": False, "stage": "pt", "dataset": "plain"}, "data.packing", False),
    ({"adam_beta2": 0.0}, "optimizer.betas", [0.9, 0.0]),
    ({"warmup_steps": 0, "warmup_ratio": 0.1}, "schedule.warmup_ratio", 0.1),
    ({"lora_alpha": 64}, "adapter.alpha", 64),
    ({"learning_rate": ...}, "optimizer.lr", 5e-5),
    ({"per_device_train_batch_size": ...}, "training.micro_batch", 8),
    ({"num_train_epochs": ...}, "training.epochs", 3),
    ({"max_steps": 100, "save_steps": 0.1}, "checkpoint.every_steps", 10),
    ({"dataset": "talks", "max_samples": 100, "val_size": 0.2}, "data.eval_fraction", 0.2),
    ({"report_to": "tensorboard,wandb"}, "tracking", ["tensorboard", "wandb"]),
    ({"stage": "ppo", "reward_model": "r", "ppo_buffer_size": 2}, "training.global_batch", 32),
    ({"stage": "ppo", "reward_model": "r"}, "ppo.max_new_tokens", 1024),
]


@pytest.mark.parametrize(("change", "path", "value"), FACTORY_CASES, ids=lambda v: v if isinstance(v, str) else None)
def test_a_key_of_llamafactory(change: dict[str, Any], path: str, value: Any, tmp_path: Path) -> None:
    draft, text, hindrances = result("llamafactory", changed(FACTORY, change), registry(tmp_path))
    assert not hindrances
    assert at(loads(text), path) == value
    assert UNKNOWN not in draft.lost.values(), "a key that is carried over is not lost as well"


@pytest.mark.parametrize("tag", ["role_tag", "user_tag"])
def test_a_name_of_turns_that_is_no_text_is_spoken_of(tag: str, tmp_path: Path) -> None:
    info = {"talks": {"hf_hub_url": "org/talks", "formatting": "sharegpt", "tags": {tag: ["human"]}}}
    folder = registry(tmp_path)
    (folder / "data" / "dataset_info.json").write_text(json.dumps(info))
    _, _, hindrances = result("llamafactory", FACTORY | {"dataset": "talks"}, folder)
    assert any(
        "has turns with other keys" in reason or "has speakers of other names" in reason for reason in hindrances
    )
