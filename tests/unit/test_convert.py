"""muster convert: other trainers' settings as recipes, and the name of every key that has no place in one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from launcher import convert
from launcher.convert.axolotl import HINDRANCES as AXOLOTL_HINDRANCES
from launcher.convert.llamafactory import HINDRANCES as FACTORY_HINDRANCES
from tests.unit.test_cli import Muster
from trainer.errors import UsageError
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
    "plain": {"hf_hub_url": "org/plain", "subset": "en", "columns": {"prompt": "body"}},
    "pictures": {"file_name": "p.json", "formatting": "sharegpt", "columns": {"images": "images"}},
}


def changed(base: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in (base | change).items() if value is not ...}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(INFO))
    return tmp_path


def result(
    source: str, settings: dict[str, Any], folder: Path, workers: int | None = None
) -> tuple[Any, str, list[str]]:
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


def test_a_whole_file_of_llamafactory(folder: Path) -> None:
    made = recipe("llamafactory", FACTORY, folder)
    assert made.run_uri == "saves/base/lora/sft"
    assert (made.adapter.rank, made.adapter.alpha, made.adapter.dropout) == (8, 16, 0.0)
    assert [source.format for source in made.data.train] == ["instruction", "messages"]
    assert made.data.train[0].path == str(folder / "data" / "own.json")
    assert made.data.train[1].columns == {"messages": "turns"}
    assert (made.training.global_batch, made.training.epochs) == (16, 3)
    assert made.training.gradient_checkpointing, "which it has on unless it is told otherwise"
    assert not made.data.packing


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
    ({"save_steps": 50, "save_total_limit": 2}, "checkpoint.every_steps", 50),
    ({"val_set_size": 0.05}, "data.train.0.split", "train[:95%]"),
    ({"val_set_size": 100}, "data.eval.0.split", "train[-100:]"),
    ({"test_datasets": [{"path": "org/held", "type": "alpaca", "split": "test"}]}, "data.eval.0.split", "test"),
    ({"bf16": False, "fp16": True}, "model.dtype", "float16"),
    ({"trust_remote_code": True}, "model.trust_remote_code", True),
    ({"chat_template_jinja": "{{ messages }}"}, "data.chat_template", "{{ messages }}"),
    ({"output_dir": "s3://bucket/a run"}, "name", "a-run"),
    ({"peft_trainable_token_indices": [5]}, "adapter.trainable_tokens", [5]),
]


@pytest.mark.parametrize(("change", "path", "value"), AXOLOTL_CASES, ids=lambda v: v if isinstance(v, str) else None)
def test_a_key_of_axolotl(change: dict[str, Any], path: str, value: Any, tmp_path: Path) -> None:
    assert at(recipe("axolotl", changed(AXOLOTL, change), tmp_path), path) == value


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
    ({"stage": "rm", "dataset": "pairs"}, "data.train.0.columns", {"prompt": "q", "chosen": "a", "rejected": "b"}),
    ({"stage": "ppo", "reward_model": "runs/reward"}, "ppo.reward.model", "runs/reward"),
    ({"dataset": "talks", "val_size": 0.1}, "data.train.0.split", "train[:90%]"),
    ({"dataset": "talks", "max_samples": 50}, "data.train.0.split", "train[:50]"),
    ({"eval_dataset": "talks", "eval_steps": 20}, "training.eval_every", 20),
    ({"optim": "paged_adamw_8bit"}, "optimizer.name", "paged_adamw_8bit"),
    ({"lr_scheduler_type": ...}, "schedule.name", "linear"),
    ({"packing": True}, "data.packing", True),
    ({"disable_gradient_checkpointing": True}, "training.gradient_checkpointing", False),
    ({"ray_num_workers": 4}, "training.global_batch", 64),
]


@pytest.mark.parametrize(("change", "path", "value"), FACTORY_CASES, ids=lambda v: v if isinstance(v, str) else None)
def test_a_key_of_llamafactory(change: dict[str, Any], path: str, value: Any, folder: Path) -> None:
    assert at(recipe("llamafactory", changed(FACTORY, change), folder), path) == value


LOST = [
    ("axolotl", {"neftune_noise_alpha": 5}, "neftune_noise_alpha", "no such setting"),
    ("axolotl", {"special_tokens": {"eos_token": "<end>"}}, "special_tokens", "<end>"),
    (
        "axolotl",
        {"datasets": [{"path": "r.jsonl", "type": "alpaca"}], "val_set_size": 0.1},
        "val_set_size",
        "data.eval",
    ),
    ("axolotl", {"fsdp_version": 2}, "optimizer", "8 bits"),
    ("axolotl", {"num_epochs": 0.5}, "num_epochs", "1 is taken"),
    ("axolotl", {"lr_scheduler": "rex"}, "lr_scheduler", "cosine"),
    ("axolotl", {"plugins": ["some.integrations.other.Plugin"]}, "plugins", "other"),
    ("axolotl", {"datasets": [{"path": "a/b", "type": "alpaca", "shards": 3}]}, "datasets[0].shards", "no such"),
    ("llamafactory", {}, "template", "llama3"),
    ("llamafactory", {"max_samples": 9}, "max_samples", "9"),
    ("llamafactory", {"use_dora": True, "pissa_init": True}, "use_pissa", "one method"),
]


@pytest.mark.parametrize(("source", "change", "key", "words"), LOST)
def test_what_is_not_carried_over_is_named(
    source: str, change: dict[str, Any], key: str, words: str, folder: Path
) -> None:
    base = AXOLOTL if source == "axolotl" else FACTORY
    draft, text, hindrances = result(source, base | change, folder)
    assert not hindrances
    assert words in draft.lost[key]
    assert f"#   {key}: " in text


def test_what_has_no_bearing_is_named_apart_and_what_is_off_not_at_all(tmp_path: Path) -> None:
    draft, _, _ = result("axolotl", AXOLOTL | {"logging_steps": 1, "liger_rope": True, "relora": False}, tmp_path)
    assert {"logging_steps", "liger_rope"} <= set(draft.idle)
    assert not draft.lost


HINDERED = [
    *(("axolotl", {key: True}, key) for key in AXOLOTL_HINDRANCES),
    *(("llamafactory", {key: True}, key) for key in FACTORY_HINDRANCES),
    ("axolotl", {"rl": "kto"}, "rl: kto"),
    ("axolotl", {"base_model": ...}, "base_model: is missing"),
    ("axolotl", {"learning_rate": ...}, "learning_rate: is missing"),
    ("axolotl", {"datasets": ...}, "datasets: no data set"),
    ("axolotl", {"base_model": "org/Base-7B-GPTQ"}, "gptq"),
    ("axolotl", {"optimizer": "muon"}, "optimizer: muon"),
    ("axolotl", {"datasets": [{"path": "a/b", "type": "unheard"}]}, "datasets[0].type: unheard"),
    (
        "axolotl",
        {"adapter": "lora", "load_in_4bit": ..., "load_in_8bit": True, "fsdp_version": 2},
        "model.quantization",
    ),
    ("axolotl", {"lora_r": "many"}, "adapter.rank"),
    ("axolotl", {"micro_batch_size": "auto"}, "micro_batch_size: 'auto' is no number"),
    ("llamafactory", {"stage": "kto"}, "stage: kto"),
    ("llamafactory", {"dataset": "pictures"}, "images or sound"),
    ("llamafactory", {"dataset": "unheard"}, "unheard does not stand"),
    ("llamafactory", {"dataset_dir": "elsewhere"}, "elsewhere/dataset_info.json"),
    ("llamafactory", {"finetuning_type": "freeze"}, "finetuning_type: freeze"),
    ("llamafactory", {"stage": "dpo", "dataset": "pairs", "pref_loss": "orpo"}, "pref_loss: orpo"),
    ("llamafactory", {"quantization_bit": 4, "quantization_method": "hqq"}, "hqq"),
    ("llamafactory", {"stage": ..., "export_dir": "out"}, "export_dir"),
    ("llamafactory", {"do_train": ..., "do_predict": True}, "do_predict"),
]


@pytest.mark.parametrize(("source", "change", "words"), HINDERED)
def test_what_stands_in_the_way_is_named(source: str, change: dict[str, Any], words: str, folder: Path) -> None:
    base = AXOLOTL if source == "axolotl" else FACTORY
    _, _, hindrances = result(source, changed(base, change), folder)
    assert any(words in line for line in hindrances), hindrances


def test_the_command_prints_the_recipe_alone(muster: Muster, tmp_path: Path) -> None:
    file = tmp_path / "a.yml"
    file.write_text(yaml.safe_dump(AXOLOTL | {"neftune_noise_alpha": 5}))
    assert muster("convert", "axolotl", str(file)) == 0
    assert loads(muster.out).name == "first"
    assert "not carried over: neftune_noise_alpha" in muster.err
    assert muster("convert", "axolotl", str(file), "-o", str(tmp_path / "r.yaml")) == 0
    assert not muster.out
    assert muster("validate", str(tmp_path / "r.yaml")) == 0


@pytest.mark.parametrize(
    ("source", "text", "words"),
    [
        ("axolotl", yaml.safe_dump(AXOLOTL | {"rl": "kto"}), "kto has no task"),
        ("axolotl", "a: [", "is not YAML"),
        ("axolotl", "- a", "no mapping"),
        ("axolotle", "a: 1", "did you mean 'axolotl'"),
    ],
)
def test_without_a_recipe_nothing_is_printed(
    source: str, text: str, words: str, muster: Muster, tmp_path: Path
) -> None:
    file = tmp_path / "a.yml"
    file.write_text(text)
    assert muster("convert", source, str(file)) == 2
    assert not muster.out
    assert words in muster.err


ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 3),
    st.floats(-1, 2),
    st.sampled_from(
        ["auto", "", "2e-5", "x,y", [], [1], [None], {}, {"a": 1}, [{"path": 3}], [{"path": "a/b", "type": {}}]]
    ),
)


@pytest.mark.parametrize(("source", "base"), [("axolotl", AXOLOTL), ("llamafactory", FACTORY)])
@given(data=st.data())
def test_no_value_makes_it_fail_otherwise(source: str, base: dict[str, Any], data: st.DataObject) -> None:
    known = [
        *base,
        "rl",
        "deepspeed",
        "fsdp_config",
        "val_set_size",
        "report_to",
        "plugins",
        "max_samples",
        "chat_template",
    ]
    change = data.draw(st.dictionaries(st.sampled_from(known), ODD, min_size=1, max_size=3))
    file = Path("settings.yml")
    try:
        draft = convert.SOURCES.load(source)(base | change, file, None)
        text, hindrances = convert.checked(draft, source, file)
    except UsageError:
        return
    assert hindrances or loads(text)


def test_comments_cannot_become_settings(tmp_path: Path) -> None:
    _, text, _ = result("axolotl", AXOLOTL | {"odd\nname: evil": "x\nname: evil"}, tmp_path)
    assert loads(text).name == "first"


@pytest.fixture
def muster(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Muster:
    monkeypatch.setenv("TERM", "dumb")
    return Muster(capsys, monkeypatch)
