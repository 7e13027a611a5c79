"""muster convert: the command, and the name of every key that has no place in a recipe."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from launcher import convert
from launcher.convert import axolotl, axolotl_data, common, llamafactory, llamafactory_data
from launcher.convert.draft import OFF, Draft
from tests.unit.launcher.cli.test_app import Muster
from tests.unit.launcher.convert.convert_support import AXOLOTL, FACTORY, at, changed, recipe, registry, result
from trainer.errors import UsageError
from trainer.recipe import loads
from trainer.recipe.formats import CHAT_TEMPLATES


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return registry(tmp_path)


LOST = [
    ("axolotl", {"loss_of_another_kind": 5}, "loss_of_another_kind", "no such setting"),
    (
        "axolotl",
        {"rl": "orpo", "datasets": [{"path": "a/b", "type": "chatml.intel"}], "neftune_noise_alpha": 5},
        "neftune_noise_alpha",
        "task orpo has no such setting",
    ),
    (
        "llamafactory",
        {"stage": "dpo", "dataset": "pairs", "pref_loss": "orpo", "pref_ftx": 0.5},
        "pref_ftx",
        "no such setting",
    ),
    (
        "llamafactory",
        {"stage": "dpo", "dataset": "pairs", "ld_alpha": 0.5},
        "ld_alpha",
        "weighs the reference's too",
    ),
    ("llamafactory", {"stage": "kto", "dataset": "marked", "pref_ftx": 0.5}, "pref_ftx", "no such setting"),
    (
        "axolotl",
        {"rl": "kto", "datasets": [{"path": "a/b", "type": "chatml.ultra"}]},
        "datasets[0].type",
        "read unchanged",
    ),
    ("axolotl", {"special_tokens": {"eos_token": "<end>"}}, "special_tokens", "<end>"),
    (
        "axolotl",
        {"datasets": [{"path": "r.jsonl", "type": "alpaca"}], "val_set_size": 100},
        "val_set_size",
        "data.eval",
    ),
    ("axolotl", {"deepspeed": "configs/zero3.json"}, "optimizer", "across the parts"),
    ("axolotl", {"num_epochs": 0.5}, "num_epochs", "1 is taken"),
    ("axolotl", {"lr_scheduler": "rex"}, "lr_scheduler", "cosine"),
    ("axolotl", {"plugins": ["some.integrations.other.Plugin"]}, "plugins", "other"),
    ("axolotl", {"datasets": [{"path": "a/b", "type": "alpaca", "shards": 3}]}, "datasets[0].shards", "no such"),
    ("axolotl", {"save_steps": 0.1}, "save_steps", "not known"),
    ("axolotl", {"eval_steps": 0.1, "val_set_size": 0.1}, "eval_steps", "not known"),
    ("axolotl", {"peft_use_dora": True, "peft_use_rslora": True}, "peft_use_rslora", "one method"),
    ("axolotl", {"lora_target_modules": ["lm_head"]}, "lora_target_modules", "no head"),
    ("axolotl", {"excess_length_strategy": "drop"}, "excess_length_strategy", "cut on the right"),
    ("axolotl", {"datasets": [{"path": "r.jsonl", "type": "alpaca", "split": "test"}]}, "datasets[0].split", "test"),
    ("axolotl", {"datasets": [{"path": "r.jsonl", "type": "alpaca", "name": "en"}]}, "datasets[0].name", "Hub"),
    ("axolotl", {"datasets": [{"path": "s3://b/r", "type": "alpaca", "revision": "1"}]}, "datasets[0].revision", "Hub"),
    (
        "axolotl",
        {"datasets": [{"path": f"o/{n}", "type": "chat_template", "chat_template": n} for n in ("chatml", "gemma")]},
        "datasets[1].chat_template",
        "one template",
    ),
    (
        "axolotl",
        {"datasets": [{"path": "a/b", "type": "chat_template", "train_on_eos": "all"}]},
        "datasets[0].train_on_eos",
        "all",
    ),
    (
        "axolotl",
        {"datasets": [{"path": "a/b", "type": "sharegpt", "conversation": "x"}]},
        "datasets[0].conversation",
        "",
    ),
    (
        "axolotl",
        {"rl": "dpo", "datasets": [{"path": "a/b", "type": "chatml.intel"}]},
        "datasets[0].type",
        "read unchanged",
    ),
    ("axolotl", {"rl": "dpo", "datasets": [{"path": "a/b", "type": "cohere.ultra"}]}, "datasets[0].type", "cohere"),
    (
        "axolotl",
        {"rl": "dpo", "datasets": [{"path": "a/b", "type": "x.ultra"}], "trl": {"beta": 1, "y": 2}},
        "trl.y",
        "",
    ),
    ("axolotl", {"shuffle_merged_datasets": False}, "shuffle_merged_datasets", "false"),
    ("llamafactory", {"quantization_bit": 4, "double_quantization": False}, "double_quantization", "false"),
    ("llamafactory", {"pure_bf16": True}, "pure_bf16", "float32"),
    ("llamafactory", {"save_steps": 0.1}, "save_steps", "not known"),
    ("llamafactory", {"enable_thinking": False}, "enable_thinking", "False"),
    ("llamafactory", {"report_to": "all"}, "report_to", "all"),
    ("llamafactory", {"lora_unheard": 1}, "lora_unheard", "no such setting"),
    ("llamafactory", {"template": "yi"}, "template", "yi"),
    ("llamafactory", {"use_dora": True, "pissa_init": True}, "pissa_init", "one method"),
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


IDLE = [
    ("axolotl", {"save_strategy": "epoch"}, "save_strategy"),
    ("axolotl", {"eval_steps": 20}, "eval_steps"),
    ("axolotl", {"do_causal_lm_eval": True}, "do_causal_lm_eval"),
    ("axolotl", {"torch_dtype": "float16"}, "torch_dtype"),
    ("axolotl", {"float32": True}, "float32"),
    ("axolotl", {"max_steps": -1}, "max_steps"),
    ("axolotl", {"batch_size": 8}, "batch_size"),
    ("axolotl", {"datasets": [{"path": "r.jsonl", "type": "alpaca", "ds_type": "json"}]}, "datasets[0].ds_type"),
    (
        "axolotl",
        {"rl": "ipo", "dpo_label_smoothing": 0.1, "datasets": [{"path": "a/b", "type": "x.ultra"}]},
        "dpo_label_smoothing",
    ),
    ("llamafactory", {"eval_strategy": "steps"}, "eval_strategy"),
    ("llamafactory", {"eval_steps": 20}, "eval_steps"),
    ("llamafactory", {"run_name": "first"}, "run_name"),
    ("llamafactory", {"oft_block_size": 8}, "oft_block_size"),
    ("llamafactory", {"finetuning_type": "full"}, "lora_rank"),
]


@pytest.mark.parametrize(("source", "change", "key"), IDLE)
def test_what_has_no_bearing_is_named(source: str, change: dict[str, Any], key: str, folder: Path) -> None:
    draft, text, hindrances = result(source, (AXOLOTL if source == "axolotl" else FACTORY) | change, folder)
    assert not hindrances
    assert key in draft.idle
    assert key not in draft.lost
    assert f"#   {key}: " in text


def test_what_has_no_bearing_is_named_apart_and_what_is_off_not_at_all(tmp_path: Path) -> None:
    draft, _, _ = result("axolotl", AXOLOTL | {"logging_steps": 1, "liger_rope": True, "relora": False}, tmp_path)
    assert {"logging_steps", "liger_rope"} <= set(draft.idle)
    assert not draft.lost


@pytest.mark.parametrize("key", common.RATES)
@pytest.mark.parametrize("source", ["axolotl", "llamafactory"])
def test_when_something_happens_is_a_decision(source: str, key: str, folder: Path) -> None:
    draft, text, hindrances = result(source, (AXOLOTL if source == "axolotl" else FACTORY) | {key: 4}, folder)
    assert not hindrances
    assert draft.decided[key].startswith("4: ")
    assert f"decided: {key}: 4" in "\n".join(draft.report())
    assert f"#   {key}: 4: " in text


COMPUTED = [
    ("axolotl", {"flash_attention": True}, "compute.attention", "flash"),
    ("axolotl", {"attn_implementation": "flash_attention_2"}, "compute.attention", "flash"),
    ("axolotl", {"sdp_attention": True}, "compute.attention", "sdpa"),
    ("axolotl", {"attention": "flash"}, "compute.attention", "flash"),
    ("axolotl", {"flex_attention": True}, "compute.attention", "flex"),
    ("axolotl", {"flash_attention": True, "bf16": False, "fp16": False}, "compute.attention", "auto"),
    ("llamafactory", {"flash_attn": "fa2"}, "compute.attention", "flash"),
    ("llamafactory", {"flash_attn": "disabled"}, "compute.attention", "auto"),
    ("llamafactory", {"enable_liger_kernel": True}, "compute.kernels", "liger"),
    (
        "axolotl",
        {"plugins": ["axolotl.integrations.liger.LigerPlugin"], "liger_rope": True},
        *("compute.kernels", "liger"),
    ),
    ("axolotl", {"gradient_checkpointing": "offload"}, "training.gradient_checkpointing", True),
    ("axolotl", {"gradient_checkpointing": "offload"}, "compute.offload_activations", True),
    (
        "axolotl",
        {"gradient_checkpointing": True, "activation_offloading": "legacy"},
        *("compute.offload_activations", True),
    ),
    ("axolotl", {"tiled_mlp": True}, "compute.tile_tokens", 4096),
]


@pytest.mark.parametrize(("source", "change", "path", "value"), COMPUTED)
def test_kernels_are_those_of_compute(source: str, change: dict[str, Any], path: str, value: Any, folder: Path) -> None:
    draft, text, hindrances = result(source, (AXOLOTL if source == "axolotl" else FACTORY) | change, folder)
    assert not hindrances
    assert at(loads(text), path) == value
    assert not set(change) & set(draft.idle) or value == "auto"


def test_weights_of_the_base_that_were_trained_too_are_spoken_of_loudly(folder: Path) -> None:
    settings = AXOLOTL | {"unfrozen_parameters": ["^model.embed_tokens.weight$"]}
    draft, _, hindrances = result("axolotl", settings, folder)
    assert not hindrances
    assert draft.lost["unfrozen_parameters"].startswith("NOT TRAINED")
    full = {key: value for key, value in settings.items() if key not in ("adapter", "load_in_4bit")}
    assert "unfrozen_parameters" in "".join(result("axolotl", full, folder)[2])


HINDERED = [
    *(("axolotl", {key: True}, key) for key in axolotl.HINDRANCES),
    *(("llamafactory", {key: True}, key) for key in llamafactory.HINDRANCES),
    ("axolotl", {"rl": "gdpo"}, "rl: gdpo"),
    ("axolotl", {"rl": "dpo", "dpo_loss_type": ["sigmoid", "ipo"]}, "a recipe has one loss of weight 1"),
    ("axolotl", {"rl": "dpo", "dpo_loss_type": ["nca_pair"]}, "nca_pair is no loss of task dpo"),
    ("axolotl", {"rl": "kto"}, "datasets[0].type: alpaca has no format here; unpaired_preference may do"),
    ("axolotl", {"base_model": ...}, "base_model: is missing"),
    ("axolotl", {"learning_rate": ...}, "learning_rate: is missing"),
    ("axolotl", {"datasets": ...}, "datasets: no data set"),
    ("axolotl", {"base_model": "org/Base-7B-GPTQ"}, "gptq"),
    ("axolotl", {"lr_scheduler_kwargs": {"min_lr": "low"}}, "min_lr: 'low'"),
    ("axolotl", {"lr_scheduler_kwargs": {"min_lr_rate": "low"}}, "min_lr_rate: 'low'"),
    ("axolotl", {"learning_rate": 0, "lr_scheduler_kwargs": {"min_lr": 1}}, "min_lr: 1"),
    ("axolotl", {"deepspeed": "mine.json"}, "contains no stage"),
    ("axolotl", {"micro_batch_size": float("nan")}, "micro_batch_size: nan is no number"),
    ("axolotl", {"optimizer": "came_pytorch"}, "there is no came_pytorch"),
    ("axolotl", {"loraplus_lr_ratio": True}, "loraplus_lr_ratio: True is no number"),
    ("axolotl", {"datasets": [{"path": "a/b", "type": "unheard"}]}, "datasets[0].type: unheard"),
    (
        "axolotl",
        {"adapter": "lora", "load_in_4bit": ..., "load_in_8bit": True, "fsdp_version": 2},
        "model.quantization",
    ),
    ("axolotl", {"lora_r": "many"}, "adapter.rank"),
    ("axolotl", {"micro_batch_size": "auto"}, "micro_batch_size: 'auto' is no number"),
    ("llamafactory", {"stage": "unheard"}, "stage: unheard"),
    ("llamafactory", {"stage": "kto", "dataset": "talks"}, "talks has no column kto_tag"),
    ("llamafactory", {"stage": "kto", "dataset": "pairs"}, "pairs has no column kto_tag"),
    ("llamafactory", {"dataset": "pictures"}, "images or sound"),
    ("llamafactory", {"dataset": "unheard"}, "unheard is not in"),
    ("llamafactory", {"dataset_dir": "elsewhere"}, "elsewhere/dataset_info.json"),
    ("llamafactory", {"finetuning_type": "freeze"}, "finetuning_type: freeze"),
    ("llamafactory", {"stage": "dpo", "dataset": "pairs", "pref_loss": "kto_pair"}, "pref_loss: kto_pair"),
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
    file.write_text(yaml.safe_dump(AXOLOTL | {"loss_of_another_kind": 5}))
    assert muster("convert", "axolotl", str(file)) == 0
    assert loads(muster.out).name == "first"
    assert "not carried over: loss_of_another_kind" in muster.err
    assert muster("convert", "axolotl", str(file), "-o", str(tmp_path / "r.yaml")) == 0
    assert not muster.out
    assert muster("validate", str(tmp_path / "r.yaml")) == 0


@pytest.mark.parametrize(
    ("source", "text", "words"),
    [
        ("axolotl", yaml.safe_dump(AXOLOTL | {"rl": "gdpo"}), "gdpo has no task"),
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
    st.sampled_from([float("nan"), float("inf"), "nan", 1e400, "x" * 5000, "no", 0.5, 40, ["adapter"]]),
)
MODULES = {"axolotl": (axolotl, axolotl_data, common), "llamafactory": (llamafactory, llamafactory_data, common)}


def keys_of(source: str) -> list[str]:
    """Every word that a converter has between quotes, among them all keys that it reads."""
    trees = [ast.parse(inspect.getsource(module)) for module in MODULES[source]]
    words = {node.value for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    return sorted(word for word in words if isinstance(word, str) and re.fullmatch(r"[a-z][a-z0-9_]+\*?", word))


def is_there(recipe: dict[str, Any], path: str) -> bool:
    place: Any = recipe
    for key in path.split("."):
        if not isinstance(place, dict) or key not in place:
            return False
        place = place[key]
    return True


def unnamed(draft: Draft, settings: dict[str, Any], place: str = "") -> list[str]:
    """Keys that are on and neither stand in the recipe nor are spoken of."""
    told = [*draft.decided, *draft.lost, *draft.idle, *draft.hindrances]
    return [
        name
        for key, name in ((key, f"{place}{key}") for key, value in settings.items() if value not in OFF)
        if not any(other == name or other.startswith((f"{name}[", f"{name}.")) for other in told)
        and not (name in draft.used and is_there(draft.recipe, draft.used[name]))
    ]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return registry(tmp_path_factory.mktemp("factory")) / "settings.yml"


@pytest.mark.parametrize(("source", "base"), [("axolotl", AXOLOTL), ("llamafactory", FACTORY)])
@given(data=st.data())
def test_each_key_is_in_the_recipe_or_named(source: str, base: dict[str, Any], file: Path, data: st.DataObject) -> None:
    drawn = data.draw(st.dictionaries(st.sampled_from([*base, *keys_of(source), "unheard"]), ODD, max_size=4))
    given = base | drawn
    try:
        draft = convert.SOURCES.load(source)(given, file, None)
        text, hindrances = convert.checked(draft, source, file)
    except UsageError:
        return
    assert hindrances or loads(text)
    assert not unnamed(draft, given)


ENTRY: dict[str, Any] = {"path": "org/rows", "type": "chat_template"}
DETAILS = st.one_of(ODD, st.sampled_from(["chat_template", "alpaca", "rows.jsonl", "completion", "turn", ["en", "de"]]))


@given(drawn=st.dictionaries(st.sampled_from([*keys_of("axolotl"), "unheard"]), DETAILS, max_size=4))
def test_each_key_of_a_data_set_is_in_the_recipe_or_named(drawn: dict[str, Any], file: Path) -> None:
    draft = axolotl.convert(AXOLOTL | {"datasets": [ENTRY | drawn]}, file, None)
    if not draft.hindrances:
        assert not unnamed(draft, ENTRY | drawn, "datasets[0].")


def test_the_keys_that_are_tried_are_many() -> None:
    assert {"save_steps", "eval_strategy", "torch_dtype", "split", "bf16"} <= {*keys_of("axolotl")}
    assert {"pref_beta", "neat_packing", "eval_steps", "fsdp"} <= {*keys_of("llamafactory")}


@pytest.mark.parametrize("end", ["\n", "\r", "\x85", "\u2028", "\u2029", "\x0b", "\x00"])
def test_comments_cannot_become_settings(end: str, tmp_path: Path) -> None:
    _, text, hindrances = result("axolotl", AXOLOTL | {f"odd{end}name: evil": f"x{end}name: evil"}, tmp_path)
    assert not hindrances
    assert loads(text).name == "first"


def test_the_recipe_is_written_as_a_person_would(folder: Path) -> None:
    entry = {"path": "a/b", "type": "chat_template", "field_messages": "turns", "chat_template": "chatml"}
    _, text, _ = result("axolotl", AXOLOTL | {"datasets": [entry], "val_set_size": 0.1}, folder)
    settings = [line for line in text.splitlines() if not line.startswith("#")]
    assert not [line for line in settings if "&id" in line or "*id" in line], "the columns are written out twice"
    assert all(settings), "the template stands on one line"


def test_each_name_of_a_chat_template_is_one_of_musters() -> None:
    assert set(common.CHAT_TEMPLATES.values()) == set(CHAT_TEMPLATES)


def test_a_place_that_cannot_be_written_is_a_mistake(muster: Muster, tmp_path: Path) -> None:
    file = tmp_path / "a.yml"
    file.write_text(yaml.safe_dump(AXOLOTL))
    assert muster("convert", "axolotl", str(file), "-o", str(tmp_path / "missing" / "r.yaml")) == 2
    assert "r.yaml cannot be written: No such file" in muster.err


@pytest.fixture
def muster(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Muster:
    monkeypatch.setenv("TERM", "dumb")
    return Muster(capsys, monkeypatch)


COMPARED = {"val_set_size": 0.1, "val_size": 0.1, "dataset": "talks", "eval_steps": 20}
BEGUN: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("axolotl", {"lora_model_dir": "runs/one"}, {"adapter.from": "runs/one"}),
    ("llamafactory", {"adapter_name_or_path": "runs/one"}, {"adapter.from": "runs/one"}),
    ("axolotl", {**COMPARED, "load_best_model_at_end": True}, {"checkpoint.keep_best": "eval_loss"}),
    (
        "llamafactory",
        {**COMPARED, "load_best_model_at_end": True, "metric_for_best_model": "perplexity", "greater_is_better": False},
        {"checkpoint.keep_best": "eval_perplexity"},
    ),
    (
        "axolotl",
        {**COMPARED, "early_stopping_patience": 3, "metric_for_best_model": "eval_loss"},
        {"training.early_stop.metric": "eval_loss", "training.early_stop.patience": 3, "checkpoint.keep_best": None},
    ),
    ("llamafactory", {**COMPARED, "early_stopping_steps": 4}, {"training.early_stop.patience": 4}),
]


@pytest.mark.parametrize(("source", "change", "expected"), BEGUN)
def test_where_a_run_begins_and_ends_is_carried_over(
    source: str, change: dict[str, Any], expected: dict[str, Any], folder: Path
) -> None:
    made = recipe(source, (AXOLOTL if source == "axolotl" else FACTORY) | change, folder)
    assert {path: at(made, path) for path in expected} == expected


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"load_best_model_at_end": True}, "training.eval_every counts, which is not given"),
        ({**COMPARED, "load_best_model_at_end": True, "metric_for_best_model": "bleu"}, "bleu (min) compares no"),
        ({**COMPARED, "load_best_model_at_end": True, "greater_is_better": True}, "loss (max) compares no evaluations"),
    ],
)
def test_a_comparison_that_a_recipe_cannot_make_is_named(change: dict[str, Any], reason: str, folder: Path) -> None:
    draft, text, hindrances = result("axolotl", AXOLOTL | change, folder)
    assert not hindrances
    assert reason in draft.lost["load_best_model_at_end"]
    assert "keep_best" not in text.partition("load_best_model_at_end")[0]


def test_several_adapters_are_an_obstacle(folder: Path) -> None:
    _, _, hindrances = result("llamafactory", FACTORY | {"adapter_name_or_path": "runs/one,runs/two"}, folder)
    assert hindrances == [
        "adapter_name_or_path: names several adapters; merge all but the last (muster merge), and train on the result"
    ]
