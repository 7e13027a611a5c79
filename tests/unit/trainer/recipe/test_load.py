"""A right recipe: what it reads to, in YAML and JSON."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pydantic
import pytest

from trainer.errors import RecipeError
from trainer.recipe import Recipe, load, loads, parse

SMALLEST: dict[str, Any] = {
    "name": "smallest",
    "model": {"path": "models/base"},
    "data": {"train": [{"path": "data/*.jsonl", "format": "completion"}]},
    "training": {"steps": 10, "global_batch": 8, "micro_batch": 2},
    "optimizer": {"lr": 1e-4},
    "storage": "runs",
}

FULL = """
name: gsm8k-qlora
seed: 17
task: sft
model:
  path: Qwen/Qwen2.5-7B-Instruct
  revision: main
  dtype: bfloat16
  quantization: nf4
  trust_remote_code: false
adapter:
  method: lora
  rank: 16
  alpha: 32
  dropout: 0.05
  target_modules: all-linear
  bias: none
data:
  train:
    - path: s3://corpus/gsm8k/*.jsonl
      format: completion
      columns: {prompt: question, completion: answer}
      template: null
      weight: 1.0
  eval:
    - {path: s3://corpus/eval, format: messages, columns: {messages: turns}}
  sequence_length: 2048
  packing: true
training:
  steps: 1000
  global_batch: 64
  micro_batch: 4
  gradient_checkpointing: true
  max_grad_norm: 1.0
  eval_every: 200
optimizer: {name: adamw, lr: 2.0e-4, weight_decay: 0.0}
schedule: {name: cosine, warmup_steps: 50}
strategy: {kind: fsdp}
resources: {workers: 8, gpus_per_worker: 1, cpus_per_worker: 4}
storage: s3://runs
checkpoint: {every_steps: 50, keep_last: 3}
tracking: []
"""


def test_every_section_is_read() -> None:
    recipe = loads(FULL)
    assert recipe.model.quantization == "nf4"
    assert recipe.data.train[0].columns == {"prompt": "question", "completion": "answer"}
    assert recipe.data.eval[0].format == "messages"
    assert recipe.training.steps == 1000
    assert recipe.training.epochs is None
    assert recipe.optimizer.lr == 2e-4
    assert recipe.strategy.kind == "fsdp"
    assert recipe.resources.gpus_per_worker == 1
    assert recipe.checkpoint.every_steps == 50
    assert recipe.run_uri == "s3://runs/gsm8k-qlora"


def test_the_smallest_recipe_gets_defaults() -> None:
    recipe = parse(SMALLEST)
    assert (recipe.seed, recipe.task, recipe.adapter.method, recipe.adapter.rank) == (17, "sft", "lora", 16)
    assert (recipe.schedule.name, recipe.strategy.kind, recipe.resources.workers) == ("constant", "ddp", 1)
    assert recipe.optimizer.betas == (0.9, 0.999)
    assert recipe.tracking == ()


def test_parse_leaves_the_data_as_it_was() -> None:
    data = json.loads(json.dumps(SMALLEST)) | {"seed": -1}
    before = json.dumps(data)
    with pytest.raises(RecipeError):
        parse(data)
    assert json.dumps(data) == before


def test_a_recipe_is_frozen() -> None:
    recipe = parse(SMALLEST)
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        recipe.training.steps = 11  # type: ignore[misc]


def test_json_is_taken_and_gives_lines(tmp_path: Path) -> None:
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(SMALLEST, indent="\t"))
    assert load(path) == parse(SMALLEST)
    path.write_text(json.dumps(SMALLEST | {"seed": "x"}, indent="\t"))
    with pytest.raises(RecipeError) as caught:
        load(path)
    line = 1 + path.read_text().splitlines().index('\t"seed": "x"')
    assert [str(m) for m in caught.value.mistakes] == [f"{path}:{line}: seed: takes a whole number, got the text 'x'"]


def test_steps_may_be_null_beside_epochs() -> None:
    recipe = parse(SMALLEST | {"training": {"steps": None, "epochs": 2, "global_batch": 8, "micro_batch": 2}})
    assert (recipe.training.steps, recipe.training.epochs) == (None, 2)


@pytest.mark.parametrize(("workers", "low", "high"), [(3, 3, 3), ([2, 4], 2, 4)])
def test_workers_are_a_number_or_bounds(workers: int | list[int], low: int, high: int) -> None:
    resources = parse(SMALLEST | {"resources": {"workers": workers}}).resources
    assert (resources.min_workers, resources.max_workers) == (low, high)


@pytest.mark.parametrize(
    ("storage", "uri"),
    [
        ("s3://runs", "s3://runs/smallest"),
        ("s3://runs/team/", "s3://runs/team/smallest"),
        ("runs", "runs/smallest"),
        ("/", "/smallest"),
        ("memory://", "memory:///smallest"),
    ],
)
def test_the_run_lives_under_storage_and_name(storage: str, uri: str) -> None:
    assert parse(SMALLEST | {"storage": storage}).run_uri == uri


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"], r".*\.(q|v)_proj"])
def test_target_modules_are_a_word_a_list_or_a_pattern(targets: Any) -> None:
    got = parse(SMALLEST | {"adapter": {"target_modules": targets}}).adapter.target_modules
    assert got == (tuple(targets) if isinstance(targets, list) else targets)


def test_nothing_heavy_is_imported() -> None:
    heavy = ["torch", "numpy", "ray", "transformers", "peft", "pyarrow", "s3fs"]
    code = f"import sys; import trainer.recipe; print([m for m in {heavy} if m in sys.modules])"
    root = Path(__file__).resolve().parents[4]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_field_says_what_it_is() -> None:
    from trainer.recipe.tree import field_at, fields_below, section_of

    for path in fields_below(Recipe, ()):
        field = field_at(path)
        assert field is not None
        assert field.description or section_of(field.annotation), path
