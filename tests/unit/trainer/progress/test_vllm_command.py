"""The command that serves a result: base and adapter where vLLM reads it, else the merged model."""

from __future__ import annotations

import json
import shlex
from typing import Any

import pytest

from trainer.progress.vllm_command import of_recipe
from trainer.recipe import Recipe, parse


def recipe(adapter: dict[str, Any], **changes: Any) -> Recipe:
    data: dict[str, Any] = {
        "name": "mine",
        "model": {"path": "org/base"},
        "adapter": adapter,
        "data": {"train": [{"path": "d.jsonl", "format": "completion"}]},
        "training": {"steps": 1, "global_batch": 1, "micro_batch": 1, "gradient_checkpointing": False},
        "optimizer": {"lr": 1e-4},
        "storage": "s3://runs",
    }
    return parse({**data, **changes})


@pytest.mark.parametrize(
    ("adapter", "room"),
    [
        ({"method": "lora", "rank": 16}, "16"),
        ({"method": "rslora", "rank": 20}, "32"),
        ({"method": "pissa", "rank": 16}, "32"),  # saved as a plain LoRA of twice the rank
    ],
)
def test_what_is_saved_as_lora_is_served_on_its_base(adapter: dict[str, Any], room: str) -> None:
    (line,) = of_recipe(recipe(adapter), "/runs/mine/adapter")
    words = shlex.split(line)
    assert words[:3] == ["vllm", "serve", "org/base"]
    assert words[words.index("--max-lora-rank") + 1] == room
    assert json.loads(words[-1]) == {"name": "mine", "path": "/runs/mine/adapter"}


def test_what_lies_in_a_bucket_is_fetched_first() -> None:
    fetch, serve = of_recipe(recipe({"method": "lora"}), "s3://runs/mine/adapter")
    assert fetch == "aws s3 cp --recursive s3://runs/mine/adapter mine"
    assert json.loads(shlex.split(serve)[-1])["path"] == "mine"
    assert of_recipe(recipe({"method": "none"}), "s3://runs/mine/adapter")[1] == "vllm serve mine"
    assert of_recipe(recipe({"method": "none"}), "runs/mine/adapter") == ["vllm serve runs/mine/adapter"]


@pytest.mark.parametrize(
    "adapter", [{"method": "dora"}, {"method": "ia3"}, {"method": "lora", "modules_to_save": ["embed_tokens"]}]
)
def test_what_vllm_does_not_read_is_merged(adapter: dict[str, Any]) -> None:
    merge, serve = of_recipe(recipe(adapter), "s3://runs/mine/adapter")
    assert merge == "muster merge --run s3://runs/mine --out mine-merged"
    assert serve == "vllm serve mine-merged"


def test_what_cannot_be_served_is_not_promised() -> None:
    assert of_recipe(recipe({"method": "prompt"}), "a") == []
    pairs = {"data": {"train": [{"path": "d.jsonl", "format": "preference"}], "packing": False}}
    assert of_recipe(recipe({"method": "lora"}, task="reward", **pairs), "a") == []
