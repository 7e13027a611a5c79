"""muster convert axolotl: each key's value in the recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from launcher.convert.draft import UNKNOWN
from tests.unit.launcher.convert.convert_support import AXOLOTL, at, changed, recipe, result
from trainer.recipe import loads


def test_a_whole_file_of_axolotl(tmp_path: Path) -> None:
    made = recipe("axolotl", AXOLOTL, tmp_path, workers=4)
    assert made.run_uri == "outputs/first"
    assert (made.model.path, made.model.quantization, made.model.dtype) == ("org/base", "nf4", "bfloat16")
    assert (made.adapter.method, made.adapter.rank, made.adapter.alpha, made.adapter.dropout) == ("lora", 32, 16, 0.1)
    assert made.adapter.target_modules == "all-linear"
    assert (made.data.train[0].path, made.data.train[0].format) == ("hf://org/rows", "instruction")
    assert (made.data.sequence_length, made.data.packing) == (1024, True)
    assert (made.training.global_batch, made.training.micro_batch, made.training.epochs) == (32, 2, 3)
    assert (made.resources.workers, made.resources.gpus_per_worker) == (4, 1)
    assert (made.optimizer.name, made.optimizer.lr) == ("adamw_8bit", 2e-5)
    assert (made.schedule.name, made.schedule.warmup_ratio) == ("cosine", 0.1)


PAIRS = [{"path": "o/p", "type": "chatml.ultra"}]
AXOLOTL_CASES: list[tuple[dict[str, Any], str, Any]] = [
    ({"adapter": "lora", "load_in_4bit": False, "load_in_8bit": True}, "model.quantization", "int8"),
    ({"adapter": ..., "load_in_4bit": ...}, "adapter.method", "none"),
    ({"peft_use_dora": True}, "adapter.method", "dora"),
    ({"peft_use_rslora": True}, "adapter.method", "rslora"),
    ({"loraplus_lr_ratio": 8}, "adapter.lr_ratio", 8.0),
    ({"peft_init_lora_weights": "pissa"}, "adapter.method", "pissa"),
    ({"lora_target_linear": ..., "lora_target_modules": ["q_proj"]}, "adapter.target_modules", ["q_proj"]),
    ({"lora_modules_to_save": ["lm_head"]}, "adapter.modules_to_save", ["lm_head"]),
    ({"max_steps": 10}, "training.steps", 10),
    ({"warmup_ratio": ..., "warmup_steps": 5}, "schedule.warmup_steps", 5),
    ({"warmup_ratio": ..., "warmup_steps": 0.2}, "schedule.warmup_ratio", 0.2),
    ({"warmup_ratio": ...}, "schedule.warmup_ratio", 0.03),
    ({"cosine_min_lr_ratio": 0.1}, "schedule.min_lr_ratio", 0.1),
    ({"lr_scheduler_kwargs": {"min_lr": "2e-6"}}, "schedule.min_lr_ratio", pytest.approx(0.1)),
    ({"lr_scheduler": "constant_with_warmup"}, "schedule.name", "constant"),
    ({"optimizer": "paged_adamw_8bit"}, "optimizer.name", "paged_adamw_8bit"),
    ({"optimizer": "adamw_torch_fused"}, "optimizer.name", "adamw_fused"),
    ({"optimizer": "ao_adamw_4bit"}, "optimizer.name", "adamw_torchao_4bit"),
    ({"optimizer": "lion_8bit"}, "optimizer.betas", [0.9, 0.999]),
    ({"optimizer": "sgd"}, "optimizer.momentum", 0.0),
    (
        {"lr_scheduler": "cosine_with_restarts", "lr_scheduler_kwargs": {"num_cycles": 3}},
        "schedule.cycles",
        3,
    ),
    ({"lr_scheduler": "polynomial", "lr_scheduler_kwargs": {"power": 2}}, "schedule.power", 2.0),
    ({"lr_scheduler": "polynomial"}, "schedule.min_lr_ratio", pytest.approx(1e-7 / 2e-5)),
    (
        {"lr_scheduler": "warmup_stable_decay", "max_steps": 100, "lr_scheduler_kwargs": {"num_decay_steps": 20}},
        "schedule.decay_ratio",
        0.2,
    ),
    (
        {"lr_scheduler": "warmup_stable_decay", "max_steps": 100, "lr_scheduler_kwargs": {"num_decay_steps": 20}},
        "schedule.decay_shape",
        "cosine",
    ),
    ({"adam_beta2": 0.95}, "optimizer.betas", [0.9, 0.95]),
    ({"adam_epsilon": "1e-6"}, "optimizer.eps", 1e-6),
    ({"weight_decay": 0.1}, "optimizer.weight_decay", 0.1),
    ({"gradient_checkpointing": "offload"}, "training.gradient_checkpointing", True),
    ({"max_grad_norm": 0.3}, "training.max_grad_norm", 0.3),
    ({"seed": 42}, "seed", 42),
    ({"fsdp_config": {"offload_params": True}}, "strategy.offload", True),
    ({"fsdp": ["full_shard", "auto_wrap"]}, "strategy.kind", "fsdp"),
    ({"deepspeed": "configs/zero3_bf16_cpuoffload_all.json"}, "strategy.deepspeed", "zero3_offload"),
    ({"deepspeed": "configs/zero1.json"}, "strategy.kind", "zero2"),
    ({"deepspeed": {"zero_optimization": {"stage": 3}}}, "strategy.kind", "zero3"),
    ({"use_ray": True, "ray_num_workers": 2}, "training.global_batch", 16),
    ({"dp_shard_size": 2, "dp_replicate_size": 2}, "resources.workers", 4),
    ({"dp_shard_size": 2, "dp_replicate_size": 2}, "strategy.replicas", 2),
    ({"fsdp": ["full_shard"], "dp_replicate_size": 4, "gpu_count": 8}, "strategy.replicas", 4),
    ({"save_steps": 50, "save_total_limit": 2}, "checkpoint.every_steps", 50),
    ({"val_set_size": 0.05}, "data.eval_fraction", 0.05),
    ({"do_causal_lm_eval": True, "val_set_size": 0.05}, "generative_eval.count", 64),
    (
        {"do_causal_lm_eval": True, "eval_max_new_tokens": 32, "val_set_size": 0.05},
        "generative_eval.max_new_tokens",
        32,
    ),
    ({"val_set_size": 100}, "data.eval.0.split", "train[-100:]"),
    ({"test_datasets": [{"path": "org/held", "type": "alpaca", "split": "test"}]}, "data.eval.0.split", "test"),
    ({"bf16": False, "fp16": True}, "model.dtype", "float16"),
    ({"trust_remote_code": True}, "model.trust_remote_code", True),
    ({"chat_template_jinja": "{{ messages }}"}, "data.chat_template", "{{ messages }}"),
    ({"output_dir": "s3://bucket/a run"}, "name", "a-run"),
    ({"peft_trainable_token_indices": [5]}, "adapter.trainable_tokens", [5]),
    ({"bf16": ...}, "model.dtype", "bfloat16"),
    ({"bf16": ..., "fp16": True}, "model.dtype", "float16"),
    ({"bf16": "auto", "float16": True}, "model.dtype", "bfloat16"),
    ({"bf16": False}, "model.dtype", "float32"),
    ({"bf16": False, "adapter": "lora", "load_in_4bit": ..., "load_in_8bit": True}, "model.dtype", "float16"),
    ({"adam_beta1": 0.0}, "optimizer.betas", [0.0, 0.999]),
    ({"max_grad_norm": 0}, "training.max_grad_norm", None),
    ({"lr_scheduler": "constant"}, "schedule.warmup_ratio", 0.0),
    ({"lr_scheduler": "constant", "warmup_ratio": ...}, "schedule.warmup_ratio", 0.0),
    ({"warmup_steps": 0}, "schedule.warmup_ratio", 0.0),
    ({"warmup_ratio": ..., "max_steps": 1000}, "schedule.warmup_steps", 30),
    ({"warmup_ratio": ..., "max_steps": 90000}, "schedule.warmup_steps", 100),
    ({"lr_scheduler": "linear", "cosine_min_lr_ratio": 0.1}, "schedule.min_lr_ratio", 0.0),
    ({"save_steps": 0.25, "max_steps": 200}, "checkpoint.every_steps", 50),
    ({"eval_steps": 0.25, "max_steps": 200, "val_set_size": 0.1}, "training.eval_every", 50),
    (
        {"datasets": [{"path": "a/b", "type": "alpaca", "split": "train[:1000]"}], "val_set_size": 100},
        "data.train.0.split",
        "train[:900]",
    ),
    (
        {"datasets": [{"path": "a/b", "type": "alpaca", "split": "train[:1000]"}], "val_set_size": 100},
        "data.eval.0.split",
        "train[900:1000]",
    ),
    ({"wandb_project": "p", "wandb_entity": "team", "wandb_mode": "offline"}, "wandb.entity", "team"),
    ({"wandb_project": "p", "wandb_mode": "disabled"}, "tracking", []),
    ({"mlflow_tracking_uri": "http://m:5000", "mlflow_experiment_name": "e"}, "mlflow.experiment", "e"),
    ({"output_dir": "s3://bucket"}, "storage", "s3://bucket"),
    ({"output_dir": "/out"}, "storage", "/"),
    ({"rl": "dpo", "trl": {"beta": 0.3}, "datasets": [{"path": "o/p", "type": "chatml.ultra"}]}, "dpo.beta", 0.3),
    ({"neftune_noise_alpha": 5}, "sft.neftune_alpha", 5.0),
    ({"rl": "dpo", "dpo_label_smoothing": 0.1, "datasets": PAIRS}, "dpo.label_smoothing", 0.1),
    ({"rl": "dpo", "dpo_loss_type": ["sppo_hard"], "datasets": PAIRS}, "dpo.loss", "sppo"),
    ({"rl": "dpo", "rpo_alpha": 0.5, "datasets": PAIRS}, "dpo.rpo_alpha", 0.5),
    (
        {"rl": "dpo", "dpo_loss_type": ["hinge", "sft"], "dpo_loss_weights": [1.0, 0.3], "datasets": PAIRS},
        "dpo.rpo_alpha",
        0.3,
    ),
    ({"rl": "dpo", "precompute_ref_log_probs": True, "datasets": PAIRS}, "dpo.precompute_reference", True),
    ({"rl": "ipo", "rl_beta": 0.2, "datasets": PAIRS}, "dpo.loss", "ipo"),
    ({"rl": "ipo", "rl_beta": 0.2, "datasets": PAIRS}, "dpo.beta", 0.2),
    ({"rl": "kto", "rl_beta": 0.2, "datasets": PAIRS}, "kto.beta", 0.2),
    ({"rl": "kto", "kto_desirable_weight": 1.2, "datasets": PAIRS}, "kto.desirable_weight", 1.2),
    ({"rl": "kto", "kto_undesirable_weight": 0.5, "datasets": PAIRS}, "kto.undesirable_weight", 0.5),
    ({"rl": "kto", "precompute_ref_log_probs": True, "datasets": PAIRS}, "kto.precompute_reference", True),
    ({"rl": "orpo", "orpo_alpha": 0.2, "datasets": PAIRS}, "orpo.beta", 0.2),
    ({"rl": "orpo", "datasets": PAIRS}, "orpo.beta", 0.1),
    ({"rl": "simpo", "rl_beta": 2, "datasets": PAIRS}, "simpo.beta", 2.0),
    ({"rl": "simpo", "datasets": PAIRS}, "simpo.beta", 0.1),
    ({"rl": "simpo", "simpo_gamma": 1.4, "datasets": PAIRS}, "simpo.gamma", 1.4),
    ({"rl": "simpo", "datasets": PAIRS}, "simpo.cpo_alpha", 1.0),
    ({"rl": "simpo", "cpo_alpha": 0, "datasets": PAIRS}, "simpo.cpo_alpha", 0.0),
    ({"use_ray": True, "ray_num_workers": 2, "batch_size": 64}, "training.global_batch", 16),
    ({"gradient_accumulation_steps": ..., "batch_size": 64}, "training.global_batch", 64),
]


@pytest.mark.parametrize(("change", "path", "value"), AXOLOTL_CASES, ids=lambda v: v if isinstance(v, str) else None)
def test_a_key_of_axolotl(change: dict[str, Any], path: str, value: Any, tmp_path: Path) -> None:
    draft, text, hindrances = result("axolotl", changed(AXOLOTL, change), tmp_path)
    assert not hindrances
    assert at(loads(text), path) == value
    assert UNKNOWN not in draft.lost.values(), "a key that is carried over is not lost as well"


SOURCES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"path": "org/a", "type": "alpaca", "name": "en", "revision": "v1"}, {"path": "hf://org/a@v1/en"}),
    ({"path": "rows.jsonl", "type": "alpaca", "split": "train"}, {"path": "rows.jsonl", "split": None}),
    ({"path": "org/a", "type": "alpaca", "data_files": ["x.jsonl"]}, {"path": "hf://datasets/org/a/x.jsonl"}),
    (
        {"path": "s3://b/x.jsonl", "type": "completion", "field": "body"},
        {"format": "text", "columns": {"text": "body"}},
    ),
    (
        {"path": "org/a", "type": "chat_template", "field_messages": "conv", "roles": {"user": ["human"]}},
        {"format": "messages", "columns": {"messages": "conv"}},
    ),
    ({"path": "org/a", "type": "sharegpt"}, {"format": "messages", "columns": {"messages": "conversations"}}),
    (
        {"path": "org/a", "type": {"system_prompt": "Be {brief}.", "system_format": "[{system}] "}},
        {
            "format": "completion",
            "template": "[Be {{brief}}.] {instruction} {input} ",
            "columns": {"completion": "output"},
        },
    ),
    ({"path": "json", "type": "alpaca", "data_files": "x.jsonl"}, {"path": "x.jsonl"}),
    (
        {"path": "org/a", "type": {"format": "Q: {instruction}\nA:", "field_instruction": "q", "field_output": "a"}},
        {"format": "completion", "template": "Q: {q}\nA:", "columns": {"completion": "a"}},
    ),
]


@pytest.mark.parametrize(("entry", "wanted"), SOURCES)
def test_a_data_set_of_axolotl(entry: dict[str, Any], wanted: dict[str, Any], tmp_path: Path) -> None:
    made = recipe("axolotl", AXOLOTL | {"datasets": [entry]}, tmp_path)
    source = at(made, "data.train.0")
    assert {key: source[key] for key in wanted} == wanted


@pytest.mark.parametrize(
    ("change", "task", "columns"),
    [
        ({"rl": "dpo", "datasets": [{"path": "o/p", "type": "chatml.intel"}]}, "dpo", {"prompt": "question"}),
        ({"rl": "dpo", "datasets": [{"path": "o/p", "type": "llama3.ultra"}]}, "dpo", {}),
        (
            {"reward_model": True, "datasets": [{"path": "o/p", "type": "bradley_terry.chat_template"}]},
            "reward",
            {"prompt": "input"},
        ),
    ],
)
def test_pairs_of_axolotl(change: dict[str, Any], task: str, columns: dict[str, str], tmp_path: Path) -> None:
    made = recipe("axolotl", AXOLOTL | change, tmp_path)
    assert (made.task, made.data.train[0].format, made.data.packing) == (task, "preference", False)
    assert made.data.train[0].columns == columns


RATED: list[tuple[str | dict[str, str], dict[str, str]]] = [
    ("llama3.argilla", {"prompt": "instruction"}),
    ("chatml.argilla_chat", {}),
    ("chatml.intel", {"prompt": "question"}),
    ("llama3.prompt_pairs", {}),
    ("chatml.ultra", {}),
    (
        {"field_prompt": "q", "field_label": "good", "prompt_format": "{prompt}"},
        {"prompt": "q", "label": "good"},
    ),
]


@pytest.mark.parametrize(("kind", "columns"), RATED, ids=str)
def test_rated_answers_of_axolotl(kind: str | dict[str, str], columns: dict[str, str], tmp_path: Path) -> None:
    made = recipe("axolotl", AXOLOTL | {"rl": "kto", "datasets": [{"path": "o/p", "type": kind}]}, tmp_path)
    assert (made.task, made.data.train[0].format, made.data.packing) == ("kto", "unpaired_preference", False)
    assert made.data.train[0].columns == columns


def test_each_configuration_of_a_data_set_is_a_source(tmp_path: Path) -> None:
    made = recipe("axolotl", AXOLOTL | {"datasets": [{"path": "o/a", "name": ["x", "y"], "type": "alpaca"}]}, tmp_path)
    assert [source.path for source in made.data.train] == ["hf://o/a/x", "hf://o/a/y"]


def test_bf16_without_a_value_is_off(tmp_path: Path) -> None:
    assert at(recipe("axolotl", AXOLOTL | {"bf16": None}, tmp_path), "model.dtype") == "float32"


def test_what_axolotl_takes_by_itself_is_said(tmp_path: Path) -> None:
    draft, text, _ = result("axolotl", changed(AXOLOTL, {"bf16": ..., "warmup_ratio": ...}), tmp_path)
    said = " ".join(draft.decisions)
    assert "bfloat16 is axolotl's default" in said
    assert "warm-up of 3 %" in said
    assert "#   dtype bfloat16" in text


@pytest.mark.parametrize(
    ("stage", "kind"), [(3, "zero3"), (2, "zero2"), (1, "zero2"), (0, "ddp")], ids=lambda v: str(v)
)
def test_deepspeed_by_what_its_file_holds(stage: int, kind: str, tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text(f'{{"zero_optimization": {{"stage": {stage}}}}}')
    (tmp_path / "examples").mkdir()
    made = recipe("axolotl", changed(AXOLOTL, {"deepspeed": "ds.json", "optimizer": ...}), tmp_path / "examples")
    assert made.strategy.kind == kind


def test_a_chat_template_that_is_no_text_is_spoken_of(tmp_path: Path) -> None:
    data = {"datasets": [{"path": "org/rows", "type": "chat_template"}]}
    draft, _, _ = result("axolotl", AXOLOTL | data | {"chat_template": ["chatml"]}, tmp_path)
    assert "['chatml']" in draft.lost["chat_template"]
