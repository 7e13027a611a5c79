"""Freezing a recipe, comparing it, and what is generated from the model."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from trainer.recipe import Recipe, differences, dump, load, loads, parse, schema

ROOT = Path(__file__).resolve().parents[4]
SHIPPED = sorted((ROOT / "recipes").glob("*.yaml"))
TABLE = ROOT / "recipes" / "README.md"

DATA: dict[str, Any] = {
    "name": "1e-4",
    "model": {"path": "models/base", "revision": "0123"},
    "adapter": {"target_modules": ["q_proj", "on"]},
    "data": {"train": [{"path": "data/*.jsonl", "format": "completion", "template": "Q: {q}\nA: "}]},
    "training": {"steps": 10, "global_batch": 8, "micro_batch": 2},
    "optimizer": {"lr": 1e-9},
    "resources": {"workers": [1, 3]},
    "storage": "runs",
}


def recipe(**sections: Any) -> Recipe:
    return parse(DATA | sections)


def test_a_dump_reads_back_equal_with_every_default_written_out() -> None:
    text = dump(recipe())
    assert loads(text) == recipe()
    assert parse(yaml.safe_load(text)) == recipe()
    assert list(yaml.safe_load(text)) == list(Recipe.model_fields)
    assert dump(loads(text)) == text


def test_what_may_change_between_attempts_is_no_difference() -> None:
    training = DATA["training"] | {"stop_after": 3}
    other = recipe(
        resources={"workers": 7, "max_failures": 0},
        strategy={"kind": "fsdp"},
        checkpoint={"every_steps": 1},
        storage="s3://elsewhere",
        training=training,
    )
    assert differences(recipe(), other) == []


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"optimizer": {"lr": 1e-3}}, ["optimizer.lr: 1.0e-09 -> 0.001"]),
        ({"seed": 18}, ["seed: 17 -> 18"]),
        ({"training": DATA["training"] | {"max_grad_norm": None}}, ["training.max_grad_norm: 1.0 -> null"]),
        (
            {"adapter": {"target_modules": "all-linear"}},
            [
                "adapter.target_modules.0: q_proj -> (not there)",
                "adapter.target_modules.1: 'on' -> (not there)",
                "adapter.target_modules: (not there) -> all-linear",
            ],
        ),
    ],
)
def test_what_decides_the_result_is_reported_with_both_values(change: dict[str, Any], expected: list[str]) -> None:
    assert differences(recipe(), recipe(**change)) == expected


def test_a_source_more_is_a_difference() -> None:
    more = recipe(data={"train": [*DATA["data"]["train"], {"path": "more", "format": "completion"}]})
    assert "data.train.1.path: (not there) -> more" in differences(recipe(), more)


def test_the_generated_files_are_current() -> None:
    pages = runpy.run_path(str(ROOT / "docs" / ".site" / "recipe_reference.py"))["pages"]
    for path, text in pages().items():
        assert (ROOT / path).read_text(encoding="utf-8") == text, f"{path} is stale: run make schema"


def test_the_schema_is_one_and_tells_right_from_wrong() -> None:
    jsonschema.Draft202012Validator.check_schema(schema())
    check = jsonschema.Draft202012Validator(schema())
    assert list(check.iter_errors(DATA)) == []
    wrong = DATA | {"seed": "x", "adapter": {"method": "lorra"}, "storag": 1}
    assert sorted(error.validator for error in check.iter_errors(wrong)) == ["additionalProperties", "anyOf", "type"]


def test_the_recipes_that_are_promised_are_there() -> None:
    assert {path.stem for path in SHIPPED} >= {
        "quickstart",
        "llama3_8b_qlora_fsdp",
        "llama3_70b_qlora_fsdp",
        "llama3_70b_qlora_hsdp",
        "llama3_8b_long_context",
        "qwen2_5_7b_dora_ddp",
        "qwen2_5_0_5b_full",
        "mistral_7b_gsm8k_lora",
        "llama3_8b_qpissa",
    }
    for name in ("trivia_qa", "nq_open", "gsm8k", "metamath", "code_feedback", "imdb", "mrpc", "qqp", "sst2"):
        assert any(name in path.stem for path in SHIPPED), name


def test_the_table_of_recipes_is_that_of_the_folder() -> None:
    rows = [line.strip("| \n").split(" | ") for line in TABLE.read_text().splitlines() if line.startswith("| [")]
    links = [re.fullmatch(r"\[(\w+)\]\((\w+)\.yaml\)", row[0]) for row in rows]
    assert [m[1] for m in links if m] == [m[2] for m in links if m]
    assert sorted(m[1] for m in links if m) == sorted(path.stem for path in SHIPPED)
    for (name, task, _, method, where, data), link in zip(rows, links, strict=True):
        assert link, name
        recipe = load(TABLE.with_name(f"{link[2]}.yaml"))
        assert task.split()[0] == recipe.task
        packed = recipe.model.quantization
        assert method.removesuffix(" (full)") == recipe.adapter.label + ("" if packed == "none" else f", {packed}")
        assert where == f"{recipe.strategy.kind}, {_gpus(recipe)}"
        assert data.startswith(("generated", "your own")) or data == recipe.data.train[0].dataset


def _gpus(recipe: Recipe) -> str:
    workers = recipe.resources.workers
    if recipe.resources.gpus_per_worker == 0:
        return "none"
    return str(workers) if isinstance(workers, int) else f"{workers[0]} to {workers[1]}"


@pytest.fixture(scope="module")
def json_schema() -> dict[str, Any]:
    return schema()


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_recipe_is_valid_and_so_are_the_commands_it_opens_with(
    path: Path, json_schema: dict[str, Any]
) -> None:
    text = path.read_text(encoding="utf-8")
    first, *commands = [line for line in text.splitlines() if line.startswith("#")][:3]
    assert first == "# yaml-language-server: $schema=recipe.schema.json"
    jsonschema.validate(yaml.safe_load(text), json_schema)
    assert len(commands) == 2
    for command in commands:
        program, verb, file, *overrides = command.removeprefix("# ").replace("'", "").split(" ")
        wanted = "sweep" if load(path, overrides).sweep else "run"
        assert (program, verb, file) == ("muster", wanted, f"recipes/{path.name}")
    assert overrides


def test_the_names_of_shipped_recipes_differ() -> None:
    names = [load(path).name for path in SHIPPED]
    assert len(set(names)) == len(names)
