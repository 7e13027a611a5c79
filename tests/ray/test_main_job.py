"""The main job through the command line: model, data and checkpoints in S3, two FSDP workers, a Ray of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.jobs import ROOT, muster_run, write_recipe
from tests.support.s3 import CREDENTIALS, S3
from tests.support.training import losses, run_of, small_recipe, write_pairs
from trainer.recipe import Recipe
from trainer.run import layout
from trainer.run.jsonl import read_rows

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]


@pytest.fixture
def recipe(moto: S3, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("MUSTER_CACHE", str(tmp_path / "cache"))
    fs = moto.filesystem()
    fs.put(str(tiny_model), "models/tiny", recursive=True)
    for part in ("train/a", "train/b", "eval/a"):
        write_pairs(tmp_path / f"{part}.jsonl", 60)
        fs.put(str(tmp_path / f"{part}.jsonl"), f"corpus/{part}.jsonl")
    return small_recipe(
        "main-job",
        tiny_model,
        tmp_path,
        **{
            "model": {"path": "s3://models/tiny", "dtype": "float32", "quantization": "nf4"},
            "data.train": [{"path": "s3://corpus/train/*.jsonl", "format": "completion"}],
            "data.eval": [{"path": "s3://corpus/eval/*.jsonl", "format": "completion"}],
            "training": {"steps": 8, "global_batch": 4, "micro_batch": 2, "eval_every": 4},
            "strategy.kind": "fsdp",
            "resources": {"workers": 2},
            "storage": "s3://runs",
            "checkpoint": {"every_steps": 2, "keep_last": 2},
        },
    )


def muster(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "launcher", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300
    )


def test_from_s3_to_s3(recipe: Recipe, tiny_model: Path, tmp_path: Path) -> None:
    command = muster_run(recipe, tmp_path)
    assert command.wait() == 0, command.output()
    run = run_of(recipe)
    told = json.loads(muster("status", run.url, "--json").stdout)
    assert (told["state"], told["step"], told["world_size"], told["attempts"]) == ("succeeded", 8, 2, 1)
    assert [c["step"] for c in told["checkpoints"]] == [6, 8]
    assert sorted(losses(recipe)) == list(range(1, 9))
    assert losses(recipe)[8] < losses(recipe)[1]
    assert {r["step"] for r in read_rows(run, layout.METRICS) if "eval_loss" in r} == {4, 8}

    _plain_peft_loads(run.url, tiny_model, tmp_path)
    secret = CREDENTIALS["AWS_SECRET_ACCESS_KEY"]
    stored = b"".join(run.read(o.key) for o in run.list())
    assert secret.encode() not in stored
    assert secret not in command.output()

    again = muster("run", write_recipe(recipe, tmp_path))
    assert again.returncode == 0, again.stderr
    other = muster("run", write_recipe(recipe, tmp_path), "optimizer.lr=1e-3")
    assert other.returncode == 2
    assert "optimizer.lr: 0.005 -> 0.001" in other.stderr


def _plain_peft_loads(run_url: str, tiny_model: Path, tmp_path: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from trainer.storage import open_storage

    adapter = open_storage(run_url).child(layout.ADAPTER)
    for item in adapter.list():
        adapter.download(item.key, tmp_path / "adapter" / item.key)
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    ids = torch.tensor([[5, 6, 7, 8]])
    before = base(ids).logits.detach()
    tuned = PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert not torch.allclose(tuned(ids).logits, before)
    assert AutoTokenizer.from_pretrained(tmp_path / "adapter").eos_token_id is not None
    assert "muster" in (tmp_path / "adapter" / "README.md").read_text()
    assert os.environ["AWS_ACCESS_KEY_ID"] not in (tmp_path / "adapter" / "README.md").read_text()
