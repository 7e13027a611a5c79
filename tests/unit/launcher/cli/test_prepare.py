"""`muster prepare`: what it makes, what it shows, and that a run then finds it."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from launcher.cli.prepare import pictures, prepare_model, prepare_recipe
from launcher.monitor.progress import Progress
from tests.support.training import small_recipe
from tests.unit.trainer.data.data_support import made, pairs, write_rows
from trainer.data import summarise
from trainer.data.run_data import prepare_data
from trainer.data.summary import bins
from trainer.errors import UsageError
from trainer.recipe import dump
from trainer.run import layout
from trainer.storage import open_storage

ROOT = Path(__file__).resolve().parents[4]


@pytest.fixture
def recipe(tiny_model, tmp_path):
    write_rows(tmp_path / "data" / "a.jsonl", pairs(40))
    write_rows(tmp_path / "data" / "b.jsonl", [*pairs(9), {"prompt": "a", "completion": "b " * 200}])
    write_rows(tmp_path / "eval" / "e.jsonl", pairs(7))
    source = {"path": f"{tmp_path}/data/b.jsonl", "format": "completion", "weight": 2.0}
    return small_recipe(
        "prepared",
        tiny_model,
        tmp_path,
        **{
            "data.train": [{"path": f"{tmp_path}/data/a.jsonl", "format": "completion"}, source],
            "data.eval": [{"path": f"{tmp_path}/eval/*.jsonl", "format": "completion"}],
            "data.packing": True,
            "training.steps": None,
            "training.epochs": 3,
        },
    )


def quiet():
    return Progress(Console(stderr=True, quiet=True))


def test_a_run_finds_what_was_prepared(recipe):
    found = prepare_recipe(recipe, quiet(), processes=1)
    storage = open_storage(recipe.storage)
    assert storage.folders() == [layout.PREPARED], "nothing of the run is written"
    data = prepare_data(
        recipe,
        storage.child(recipe.name),
        storage.child(layout.PREPARED),
        lambda: __import__("transformers").AutoTokenizer.from_pretrained(recipe.model.path),
        map_windows=lambda task, jobs: pytest.fail("prepared again"),
    )
    assert (data.train.fingerprint, data.total_steps) == (found["train"]["fingerprint"], found["total_steps"])
    assert data.eval.fingerprint == found["eval"]["fingerprint"]


def test_counts_lengths_and_packs(recipe):
    found = prepare_recipe(recipe, quiet(), processes=1)
    train = found["train"]
    assert [(s["rows"], s["samples"], s["truncated"]) for s in train["sources"]] == [(40, 40, 0), (10, 10, 1)]
    assert (train["rows"], train["truncated"], train["dropped"], train["bad_rows"]) == (50, 1, 0, 0)
    assert sum(b["samples"] for b in train["lengths"]["bins"]) == 50
    assert train["lengths"]["longest"] == 64
    assert found["eval"]["samples"] == 7
    assert 0.5 < train["fill"] <= 1
    assert found["total_steps"] == 3 * -(-train["packs"] // 6)


def test_what_people_see(recipe):
    console = Console(width=100, file=io.StringIO())
    for part in pictures(prepare_recipe(recipe, quiet(), processes=1)):
        console.print(part, soft_wrap=True)
    shown = console.file.getvalue()
    assert "source 1:" in shown
    assert "b.jsonl (completion)" in shown
    assert "95 % have at most" in shown
    assert "█" in shown
    assert "full" in shown
    assert "steps:" in shown


def test_the_command_prints_json_alone_and_uses_processes(recipe, tmp_path):
    (tmp_path / "r.yaml").write_text(dump(recipe))
    done = subprocess.run(
        [sys.executable, "-m", "launcher", "prepare", str(tmp_path / "r.yaml"), "--json", "--processes", "2"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "CI": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["train"]["samples"] == 50
    assert "prepared window 1 of 1: 50 samples" in done.stderr


def test_a_mistake_in_the_data_is_exit_2(recipe, tmp_path):
    (tmp_path / "data" / "a.jsonl").write_text('{"prompt": "a", "compl')
    (tmp_path / "r.yaml").write_text(dump(recipe))
    done = subprocess.run(
        [sys.executable, "-m", "launcher", "prepare", str(tmp_path / "r.yaml")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert "a.jsonl, line 1: not valid JSON" in done.stderr


def test_bins_hold_each_length_once():
    histogram = np.zeros(101, np.int64)
    histogram[[3, 50, 51, 100]] = [1, 2, 3, 4]
    found = bins(histogram, 5)
    assert [(b.low, b.high) for b in found] == [(3, 22), (23, 42), (43, 62), (63, 82), (83, 100)]
    assert [b.samples for b in found] == [1, 0, 5, 0, 4]
    assert bins(np.zeros(1, np.int64)) == []


def test_a_summary_of_known_lengths():
    prepared = made([[(0, 4)] * 6, [(1, 8)] * 2], 16)
    summary = summarise(prepared, 17, [1.0, 2.0])
    assert (summary.median, summary.p95, summary.longest) == (4, 8, 8)
    assert (summary.packs, summary.fill) == (4, (24 + 32) / 64)
    assert summarise(made([[(0, 4)]], 16, packing=False), 17, [1.0]).fill is None


def test_a_summary_of_some_windows_says_so():
    prepared = made([[(0, 4)] * 2 for _ in range(100)], 16)
    whole, some = summarise(prepared, 17, [1.0]), summarise(prepared, 17, [1.0], most=7)
    assert (whole.sampled, some.sampled) == (None, (7, 100))
    assert sum(b.samples for b in some.bins) * 100 == sum(b.samples for b in whole.bins) * 7
    assert (some.packs, some.fill, some.median) == (whole.packs, whole.fill, whole.median)


def test_the_base_is_prepared_on_demand(recipe, tmp_path):
    storage = open_storage(recipe.storage)
    nf4 = recipe.model_copy(update={"model": recipe.model.model_copy(update={"quantization": "nf4"})})
    found = prepare_model(nf4, quiet())
    assert storage.folders() == [layout.MODELS]
    assert found["uri"].startswith(f"{storage.url}/{layout.MODELS}/")
    assert found["bytes"] == sum(f.stat().st_size for f in Path(found["uri"]).iterdir())
    assert prepare_model(nf4, quiet()) == found, "once is enough"
    with pytest.raises(UsageError, match=r"model\.quantization is none: set it to nf4"):
        prepare_model(recipe, quiet())
