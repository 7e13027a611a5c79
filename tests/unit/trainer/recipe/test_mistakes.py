"""Wrong recipes: every mistake at once, with its line, the value got and what would be right."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import yaml

from trainer.errors import RecipeError
from trainer.recipe import load, loads, parse
from trainer.recipe.base import Section
from trainer.recipe.methods import METHODS
from trainer.recipe.sections.strategy import StrategySection
from trainer.recipe.sections.tracking import MlflowSection
from trainer.recipe.sentences import unknown_key
from trainer.recipe.tasks import TASKS
from trainer.recipe.trackers import TRACKERS

GOOD: dict[str, Any] = {
    "name": "good",
    "model": {"path": "models/base"},
    "data": {"train": [{"path": "data/*.jsonl", "format": "completion"}]},
    "training": {"steps": 10, "global_batch": 8, "micro_batch": 2},
    "optimizer": {"lr": 1e-4},
    "storage": "runs",
}

MANY = """\
name: two words
model:
  path: models/base
  dtype: bf16
adapter: {rnak: 8}
data:
  train:
    - path: data/*.jsonl
      format: complete
      weight: 0
training:
  steps: 5
  epochs: 1
  lr: 1e-4
  global_batch: 4
  micro_batch: 8
optimizer: {name: paged_adamw_8bit, lr: fast}
strategy: {kind: fsdp}
resources: {workers: [3, 2]}
storage: runs
"""


def changed(path: str, value: Any) -> dict[str, Any]:
    """GOOD with the value at a dotted path replaced."""
    data = copy.deepcopy(GOOD)
    *parents, last = [int(k) if k.isdecimal() else k for k in path.split(".")]
    node: Any = data
    for key in parents:
        node = node[key] if isinstance(node, list) else node.setdefault(key, {})
    node[last] = value
    return data


def mistakes(data: dict[str, Any]) -> list[tuple[str, str]]:
    with pytest.raises(RecipeError) as caught:
        parse(data)
    return [(m.path, m.message) for m in caught.value.mistakes]


def lines(text: str, *overrides: str) -> list[tuple[str, str, str]]:
    with pytest.raises(RecipeError) as caught:
        loads(text, "r.yaml", overrides)
    return [tuple(m) for m in caught.value.mistakes]


def test_all_mistakes_come_at_once_in_the_order_of_their_lines() -> None:
    assert [(where, path) for where, path, _ in lines(MANY)] == [
        ("r.yaml:1", "name"),
        ("r.yaml:4", "model.dtype"),
        ("r.yaml:5", "adapter.rnak"),
        ("r.yaml:9", "data.train.0.format"),
        ("r.yaml:10", "data.train.0.weight"),
        ("r.yaml:12", "training.steps"),
        ("r.yaml:14", "training.lr"),
        ("r.yaml:16", "training.micro_batch"),
        ("r.yaml:17", "optimizer.lr"),
        ("r.yaml:17", "optimizer.name"),
        ("r.yaml:19", "resources.workers"),
    ]


def test_the_error_survives_pickling_and_exits_with_2() -> None:
    with pytest.raises(RecipeError) as caught:
        parse(changed("seed", -1))
    again = pickle.loads(pickle.dumps(caught.value))
    assert str(again) == str(caught.value) == "recipe: seed: must be at least 0, got -1"
    assert again.exit_code == 2


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("seed", "7", "takes a whole number, got the text '7'; write it without quotes"),
        ("seed", 1.5, "takes a whole number, got 1.5"),
        ("seed", True, "takes a whole number, got true"),
        ("name", 7, "takes text, got 7; write it in quotes"),
        ("model.trust_remote_code", "yes", "takes true or false, got the text 'yes'; write true or false in full"),
        ("model.revision", None, "takes text, got null (nothing)"),
        ("model.dtype", "bf16", "the text 'bf16' is a word of other trainers; write model.dtype: bfloat16"),
        (
            "adapter.method",
            "loral",
            f"adapter method 'loral' is not one of: {', '.join(METHODS.names())}; did you mean 'lora'?",
        ),
        ("adapter.dropout", 1, "must be below 1.0, got 1"),
        ("data.train", [], "has no source; add one with path: and format:"),
        ("data.train", {"path": "x"}, "takes a list, got a mapping"),
        ("data.train.0.columns", ["prompt"], "takes a mapping of keys to values, got [prompt]"),
        ("optimizer.lr", float("inf"), "takes a finite number, got inf"),
        ("optimizer.betas", [0.9], "takes two numbers from 0 to below 1, got [0.9]"),
        ("resources.workers", 0, "takes a number of workers from 1 up, or [min, max], got 0"),
        ("resources.workers", [4, 2], "[4, 2] has its minimum above its maximum; write [2, 4]"),
        (
            "training.eval_every",
            5,
            "has no effect without data.eval or data.eval_fraction; add a source there, or leave it out",
        ),
        (
            "schedule.min_lr_ratio",
            0.1,
            "has no effect with schedule.name constant; leave it out, or choose linear or cosine or wsd or polynomial",
        ),
        ("storage", "  ", "is empty; give a folder, a file or a URL"),
        (
            "training",
            5,
            "takes a mapping with steps, epochs, global_batch, micro_batch, gradient_checkpointing, "
            "max_grad_norm, router_aux_loss_coef, eval_every, early_stop, stop_after, got 5",
        ),
    ],
)
def test_one_wrong_value(path: str, value: Any, message: str) -> None:
    assert mistakes(changed(path, value)) == [(path, message)]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("adapter.rnak", "unknown key; did you mean 'rank'?"),
        ("lr", "unknown key here; it belongs at optimizer.lr"),
        ("training.workers", "unknown key here; it belongs at resources.workers"),
        ("checkpoint.every_step", "unknown key; did you mean 'every_steps'?"),
        (
            "strategy.zzz",
            "unknown key; strategy takes: kind, replicas, context_parallel, reshard_after_forward, offload, deepspeed",
        ),
    ],
)
def test_an_unknown_key_says_where_it_may_belong(path: str, message: str) -> None:
    assert mistakes(changed(path, 1)) == [(path, message)]


def test_what_is_missing_comes_with_an_example() -> None:
    found = dict(mistakes({}))
    assert sorted(found) == ["data", "model", "name", "optimizer", "storage", "training"]
    assert found["name"].endswith("for example name: my-run")
    assert "path, revision" in found["model"]
    assert found["model"].endswith("or a text: model: Qwen/Qwen3-8B")
    assert found["storage"].endswith("for example storage: runs")


@pytest.mark.parametrize("name", ["", "a b", "../up", "-x", "_data", "a/b", "x" * 101, "ünï"])
def test_a_name_is_a_plain_word(name: str) -> None:
    [(path, message)] = mistakes(changed("name", name))
    assert path == "name"
    assert "cannot name a run" in message


@pytest.mark.parametrize("path", ["storage", "model.path", "data.train.0.path"])
@pytest.mark.parametrize("url", ["s3://key:s3cr3t@bucket/x", "https://s3cr3t@host/x", "s3://key:s3/cr3t@bucket"])
def test_credentials_are_refused_and_not_printed(path: str, url: str) -> None:
    [(where, message)] = mistakes(changed(path, url))
    assert where == path
    assert "holds credentials" in message
    assert "s3" + "cr3t" not in message
    assert "cr3t" not in message


@pytest.mark.parametrize("path", ["seed", "name", "adapter.method", "model.dtype", "tracking"])
def test_credentials_in_the_wrong_place_are_not_printed_either(path: str) -> None:
    [(where, message)] = mistakes(changed(path, "s3://key:s3cr3t@bucket"))
    assert where == path
    assert "cr3t" not in message


@pytest.mark.parametrize("url", ["s3://bucket/a@b/*.jsonl", "http://host:9000/a@b", "hf://set@main", "a@b.jsonl"])
def test_an_at_sign_elsewhere_is_no_credential(url: str) -> None:
    assert parse(changed("data.train.0.path", url)).data.train[0].path == url


@pytest.mark.parametrize(
    ("change", "path", "words"),
    [
        ({"training": {"global_batch": 8, "micro_batch": 2}}, "training.steps", "training.epochs"),
        ({"training": {"steps": 1, "epochs": 1, "global_batch": 8, "micro_batch": 2}}, "training.steps", "one of them"),
        ({"training": {"steps": 1, "global_batch": 1, "micro_batch": 2}}, "training.micro_batch", "global_batch"),
        (
            {"model": {"path": "x", "quantization": "int8"}, "adapter": {"method": "none"}},
            "model.quantization",
            "cannot be trained",
        ),
        ({"model": {"path": "x", "quantization": "int8"}, "strategy": {"kind": "fsdp"}}, "model.quantization", "nf4"),
        (
            {"optimizer": {"lr": 1.0, "name": "adamw_8bit"}, "strategy": {"kind": "zero2"}},
            "optimizer.name",
            "use fsdp or ddp",
        ),
        ({"optimizer": {"lr": 1.0, "name": "paged_adamw_8bit"}}, "optimizer.name", "use adamw_8bit"),
        (
            {"optimizer": {"lr": 1.0, "name": "muon"}, "strategy": {"kind": "zero3"}},
            "optimizer.name",
            "it updates complete matrices, and ZeRO gives an optimizer flat parts of parameters",
        ),
        (
            {"optimizer": {"lr": 1.0, "name": "mine:Own"}, "strategy": {"kind": "zero2"}},
            "optimizer.name",
            "is known by its name only",
        ),
        (
            {"optimizer": {"lr": 1.0, "name": "schedule_free_adamw"}, "strategy": {"kind": "zero3"}},
            "optimizer.name",
            "two sets of weights",
        ),
        (
            {"optimizer": {"lr": 1.0, "name": "adafactor"}, "strategy": {"kind": "fsdp", "offload": True}},
            "optimizer.name",
            "strategy.offload keeps them on the host",
        ),
        (
            {
                "optimizer": {"lr": 1.0, "name": "lion_8bit"},
                "strategy": {"kind": "fsdp"},
                "model": {"path": "x", "dtype": "float16"},
            },
            "optimizer.name",
            "use bfloat16",
        ),
        (
            {"optimizer": {"lr": 1.0, "name": "schedule_free_adamw"}, "schedule": {"name": "cosine"}},
            "schedule.name",
            "use constant, with a warm-up",
        ),
        ({"optimizer": {"lr": 1.0, "name": "sgd", "betas": [0.8, 0.9]}}, "optimizer.betas", "no effect with"),
        ({"optimizer": {"lr": 1.0, "momentum": 0.5}}, "optimizer.momentum", "or choose muon or sgd"),
        ({"optimizer": {"lr": 1.0, "settings": {"eps": 1}}}, "optimizer.settings.eps", "write optimizer.eps"),
        ({"optimizer": {"lr": 1.0, "settings": {"lr": 1}}}, "optimizer.settings.lr", "muster sets it"),
        (
            {"optimizer": {"lr": 1.0, "name": "adamw_fused", "settings": {"fused": False}}},
            "optimizer.settings.fused",
            "muster sets it",
        ),
        ({"schedule": {"warmup_steps": 11}}, "schedule.warmup_steps", "training.steps 10"),
        ({"schedule": {"warmup_steps": 3, "warmup_ratio": 0.1}}, "schedule.warmup_ratio", "give one of them"),
    ],
)
def test_values_that_cannot_stand_together(change: dict[str, Any], path: str, words: str) -> None:
    [(where, message)] = mistakes(GOOD | change)
    assert where == path
    assert words in message


def test_a_wrong_value_is_not_held_against_the_others_too() -> None:
    wrong_batch = GOOD | {"training": {"steps": "ten", "global_batch": "x", "micro_batch": 9000}}
    assert [path for path, _ in mistakes(wrong_batch)] == ["training.steps", "training.global_batch"]


@pytest.mark.parametrize(
    ("source", "path", "words"),
    [
        ({"format": "messages", "template": "{a}"}, "template", "no effect"),
        ({"format": "completion", "columns": {"promt": "q"}}, "columns.promt", "did you mean 'prompt'"),
        ({"format": "messages", "columns": {"prompt": "q"}}, "columns.prompt", "it reads: messages"),
        ({"format": "completion", "template": "{}"}, "template", "names no column"),
        ({"format": "completion", "template": "{a.b}"}, "template", "names no column"),
        ({"format": "completion", "template": "{a"}, "template", "str.format"),
        ({"format": "completion", "template": "fixed"}, "template", "every prompt would be the same"),
    ],
)
def test_a_source_is_checked_against_its_format(source: dict[str, Any], path: str, words: str) -> None:
    [(where, message)] = mistakes(GOOD | {"data": {"train": [{"path": "x"} | source]}})
    assert where == f"data.train.0.{path}"
    assert words in message


def test_a_template_may_name_any_column() -> None:
    source = {"path": "x", "format": "completion", "template": "Q: {q}", "columns": {"q": "question"}}
    assert parse(GOOD | {"data": {"train": [source]}}).data.train[0].template == "Q: {q}"


@pytest.mark.parametrize(("targets", "words"), [("(", "not a regular expression"), ([], "no module"), ([1], "[1]")])
def test_target_modules_that_name_nothing(targets: Any, words: str) -> None:
    [(where, message)] = mistakes(changed("adapter.target_modules", targets))
    assert where == "adapter.target_modules"
    assert words in message


def test_a_tracker_that_is_not_there() -> None:
    [(where, message)] = mistakes(changed("tracking", ["tensorbord"]))
    assert where == "tracking.0"
    assert "did you mean 'tensorboard'?" in message


def test_settings_of_a_tracker_that_is_not_asked_for() -> None:
    [(where, message)] = mistakes(GOOD | {"tracking": ["mlflow"], "wandb": {"project": "p"}})
    assert where == "wandb.project"
    assert message == "has no effect without wandb in tracking; add it there, or leave this out"


def test_a_tracker_takes_no_credentials() -> None:
    [(where, message)] = mistakes(GOOD | {"tracking": ["mlflow"], "mlflow": {"uri": "https://me:secret@host"}})
    assert where == "mlflow.uri"
    assert "holds credentials" in message
    assert "secret" not in message


def test_a_missing_file_and_a_file_that_is_no_text(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="there is no such file"):
        load(tmp_path / "none.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"name: \xff\xfe")
    with pytest.raises(RecipeError, match=r"byte\.yml: there is no such file; did you mean 'bytes\.yaml'\?$"):
        load(tmp_path / "byte.yml")
    with pytest.raises(RecipeError, match="is not UTF-8 text"):
        load(tmp_path / "bytes.yaml")
    with pytest.raises(RecipeError, match="cannot be read"):
        load(tmp_path)


def test_choices_that_are_not_there_are_the_only_mistakes_of_a_recipe_that_asks_for_them() -> None:
    source = {"path": "s3://corpus/*.jsonl", "format": "poem", "columns": {"question": "q", "answer": "a"}}
    asked = GOOD | {"data": {"train": [source]}, "tracking": ["tensorbord"]}
    assert [path for path, _ in mistakes(asked)] == ["data.train.0.format", "tracking.0"]


ASKED = [StrategySection, *(row.section for _, row in (*TASKS.items(), *TRACKERS.items()) if row.section)]
"""The sections whose unused settings are refused."""


@pytest.mark.parametrize("kind", ASKED)
def test_of_defaults_nothing_counts_as_given(kind: type[Section]) -> None:
    """A frozen recipe contains all of them."""
    frozen = yaml.safe_load(yaml.safe_dump(kind().model_dump(mode="json")))
    assert list(kind.model_validate(frozen).given()) == []


def test_what_differs_from_its_default_counts_as_given() -> None:
    assert list(MlflowSection(experiment="mine").given()) == ["experiment"]


EVALUATED = {"eval": [{"path": "held-out", "format": "completion"}]}


def compared(**changes: Any) -> list[tuple[str, str]]:
    data = copy.deepcopy(GOOD)
    data["data"] |= EVALUATED
    data["training"] |= {"eval_every": 2}
    for path, value in changes.items():
        section, _, key = path.partition("__")
        data.setdefault(section, {})[key] = value
    return mistakes(data)


def test_what_compares_evaluations_needs_them() -> None:
    needs = "compares evaluations: give data.eval or data.eval_fraction, and training.eval_every; or leave it out"
    stop = {"metric": "eval_loss", "patience": 2}
    for changes in ({"training__eval_every": None}, {"data__eval": []}):
        found = compared(checkpoint__keep_best="eval_loss", training__early_stop=stop, **changes)
        assert {("checkpoint.keep_best", needs), ("training.early_stop", needs)} <= set(found)


def test_a_metric_that_no_evaluation_has_is_named_with_those_that_it_has() -> None:
    known = "is no metric that compares evaluations of task sft: eval_loss, eval_perplexity"
    assert compared(checkpoint__keep_best="loss") == [
        ("checkpoint.keep_best", f"'loss' {known}; did you mean 'eval_loss'?")
    ]
    stop = {"metric": "eval_accuracy", "patience": 2}
    (found,) = compared(training__early_stop=stop)
    assert found[0] == "training.early_stop.metric"
    assert found[1].startswith(f"'eval_accuracy' {known}")
    assert compared(training__early_stop={"metric": "eval_loss", "patience": 0})[0][0] == "training.early_stop.patience"


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (
            {"method": "none"},
            "has no effect with method none, which trains the model itself; name the model in model.path",
        ),
        (
            {"method": "pissa"},
            "does not work with method pissa, whose initial values are parts of the base model's weights",
        ),
        (
            {"method": "olora"},
            "does not work with method olora, whose initial values are parts of the base model's weights",
        ),
        ({"from": " "}, "is empty; give a folder, a file or a URL"),
    ],
)
def test_what_cannot_begin_from_an_adapter(adapter: dict[str, Any], message: str) -> None:
    ((path, found),) = mistakes(changed("adapter", {"from": "runs/one", **adapter}))
    assert path == "adapter.from"
    assert found.startswith(message)


@pytest.mark.parametrize("key", ["annotations", "labels", "env", "image_pull_secrets", "affinity"])
def test_what_kubernetes_has_no_key_for_leads_to_the_patch(key: str) -> None:
    said = unknown_key(("cluster", "kubernetes", key))
    assert "did you mean" not in said
    assert said.endswith(
        "every other field of pods is set under cluster.kubernetes.pod, in Kubernetes' own words, and labels and "
        "annotations of the job under cluster.kubernetes.metadata"
    )
