"""`muster push`, through huggingface_hub itself, to a stand-in for the Hub."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.hub import TOKEN, Hub, stand_in
from tests.support.training import run_of, small_recipe, train_here, write_pairs
from trainer.recipe import Recipe
from trainer.run import layout

ROOT = Path(__file__).resolve().parents[4]
REPO = "somebody/an-adapter"


@pytest.fixture(scope="module")
def recipe(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    folder = tmp_path_factory.mktemp("pushed")
    write_pairs(folder / "data" / "a.jsonl", 60)
    made = small_recipe("pushed", tiny_model, folder, **{"training.steps": 2, "checkpoint.every_steps": 2})
    assert train_here(made) == "succeeded"
    return made


@pytest.fixture
def hub() -> Iterator[Hub]:
    with stand_in() as found:
        yield found


def push(hub: Hub, *arguments: str, token: str = TOKEN) -> subprocess.CompletedProcess[str]:
    # What is large goes through LFS: the Hub's newer way, by chunks, has no stand-in.
    environment = {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": token, "HF_HUB_DISABLE_XET": "1", "CI": "1"}
    return subprocess.run(
        [sys.executable, "-m", "launcher", "push", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **environment},
    )


def test_an_adapter_goes_up_whole_with_its_card(recipe: Recipe, hub: Hub) -> None:
    done = push(hub, REPO, "--run", run_of(recipe).url, "--private", "--revision", "first")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{hub.endpoint}/{REPO}/commit/")
    assert hub.private == {REPO: True}
    adapter = Path(run_of(recipe).url, layout.ADAPTER)
    assert hub.files == {(REPO, "first"): {f.name: f.read_bytes() for f in adapter.iterdir()}}
    assert TOKEN not in done.stdout + done.stderr


def test_a_model_without_a_card_gets_one(tiny_model: Path, hub: Hub) -> None:
    done = push(hub, REPO, "--model", str(tiny_model))
    assert done.returncode == 0, done.stderr
    sent = hub.files[REPO, "main"]
    assert sent["model.safetensors"] == (tiny_model / "model.safetensors").read_bytes()
    assert sent["README.md"].startswith(b"---\nlibrary_name: transformers")


@pytest.mark.night
def test_what_the_hub_refuses_is_said(recipe: Recipe, hub: Hub) -> None:
    done = push(hub, REPO, "--run", run_of(recipe).url, token="hf_wrong")
    assert (done.returncode, done.stdout) == (2, "")
    assert "the Hub refuses somebody/an-adapter" in done.stderr
    assert "hf auth login" in done.stderr
    assert "hf_wrong" not in done.stderr
    done = push(hub, "no/such/name", "--run", run_of(recipe).url)
    assert done.returncode == 2
    assert "cannot name a repository" in done.stderr


@pytest.mark.night
def test_a_hub_that_cannot_be_reached_is_said(recipe: Recipe, hub: Hub) -> None:
    hub.endpoint = "http://127.0.0.1:9"
    done = push(hub, REPO, "--run", run_of(recipe).url)
    assert done.returncode == 1
    assert "the Hub cannot be reached" in done.stderr
