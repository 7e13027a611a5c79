"""``muster plan``: JSON alone on stdout, a report of 80 columns, exit code 2 for what cannot be planned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launcher.cli.app import main
from launcher.plan.table import WIDTH
from launcher.plan.units import bandwidths, size
from tests.support.planning import LLAMA_70B, plan_recipe
from tests.support.training import run_of, small_recipe, train_here, write_pairs
from trainer.errors import UsageError
from trainer.plan.run_length import RunLengthQuery
from trainer.recipe import Recipe, dump

Outcome = tuple[int, str, str]


class Muster:
    """Calls the program in this process: exit code, stdout, stderr."""

    def __init__(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self._capsys, self._monkeypatch, self._folder = capsys, monkeypatch, folder

    def plan(self, recipe: Recipe, *arguments: str) -> Outcome:
        path = self._folder / "recipe.yaml"
        path.write_text(dump(recipe))
        self._monkeypatch.setattr("sys.argv", ["muster", "plan", str(path), *arguments])
        self._capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0), *self._capsys.readouterr()

    def json(self, recipe: Recipe, *arguments: str) -> dict[str, Any]:
        code, out, err = self.plan(recipe, "--json", *arguments)
        assert code == 0, err
        found: dict[str, Any] = json.loads(out)
        return found


@pytest.fixture
def muster(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Muster:
    return Muster(capsys, monkeypatch, tmp_path)


@pytest.mark.night
def test_a_70b_is_told_in_80_columns(muster: Muster, tmp_path: Path) -> None:
    changes = {"model.quantization": "nf4", "model.dtype": "bfloat16", "training.gradient_checkpointing": True}
    changes |= {"strategy.kind": "fsdp", "resources.gpus_per_worker": 1, "data.sequence_length": 2048}
    recipe = plan_recipe(tmp_path, LLAMA_70B, **changes)
    code, out, err = muster.plan(recipe, "--gpu-memory", "24GiB", "--price-per-gpu-hour", "2", "resources.workers=2")
    assert code == 0
    said = err.splitlines()
    assert said[0].endswith(" s] planning")
    assert said[1] == "estimate from config.json, for 2 ranks, without activations:"
    assert "  GiB per rank: frozen weights" in err
    assert any(line.endswith("it does not fit; looking for what does") for line in said)
    lines = out.splitlines()
    assert max(map(len, lines)) <= WIDTH
    assert any(line.split() == ["frozen", "weights", "17.90"] for line in lines)
    assert any(line.startswith("Does NOT fit:") for line in lines)
    assert any(line.startswith("  strategy.offload=true ") for line in lines)


def test_json_has_stdout_to_itself(muster: Muster, tmp_path: Path) -> None:
    told = muster.json(
        plan_recipe(tmp_path), "--gpu-memory", "1TB", "--tokens-per-s", "64", "--price-per-gpu-hour", "3"
    )
    assert told["fits"] is True
    assert told["device_memory_bytes"] == 10**12
    assert told["steps"] == 10
    assert told["hours"] == pytest.approx(10 * 6 * 64 / 64 / 3600)
    assert told["cost"] == pytest.approx(3 * told["hours"])
    assert told["suggestions"] == []


def test_the_network_is_told_for_every_strategy(muster: Muster, tmp_path: Path) -> None:
    shape = {"strategy.kind": "fsdp", "strategy.replicas": 2, "resources.workers": 4}
    recipe = plan_recipe(tmp_path, **shape, **{"training.global_batch": 8})
    told = muster.json(recipe, "--network", "2GB/s,8Gbit/s")
    sent = told["sent_bytes"]
    assert sent["inside"] > sent["across"] > 0
    assert told["network"]["inside_bytes_per_s"] == 2e9
    assert told["network"]["across_bytes_per_s"] == 1e9
    by = told["network"]["strategies"]
    assert list(by) == ["ddp", "fsdp", "zero2", "zero3"]
    assert by["fsdp"]["seconds"] == by["fsdp"]["inside"] / 1e9, "a ring of all ranks passes the slow connections"
    assert by["ddp"]["inside"] == 0
    code, out, _ = muster.plan(recipe, "--network", "2GB/s,8Gbit/s", "--tokens-per-s", "1000")
    assert code == 0
    assert max(map(len, out.splitlines())) <= WIDTH
    assert any(line.startswith("  fsdp, 2 replicas (this recipe)") and line.endswith("%)") for line in out.splitlines())
    assert "of 0.5 s" in " ".join(out.split())


def test_the_other_strategies_of_an_exact_run_are_told_as_they_are(muster: Muster, tmp_path: Path) -> None:
    shape = {"resources.workers": 2, "training.global_batch": 8}
    plain = muster.json(plan_recipe(tmp_path, **shape), "--network", "1GB/s")
    exact = muster.json(plan_recipe(tmp_path, **shape, exact=True), "--network", "1GB/s")
    assert exact["sent_bytes"]["across"] == 2 * plain["sent_bytes"]["across"], "integers of eight bytes"
    assert exact["network"]["strategies"] == plain["network"]["strategies"]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("25GB/s", (25e9, 25e9)), ("200Gbit/s", (25e9, 25e9)), ("300GB/s,400gbit", (3e11, 5e10)), ("1GiB", (2**30,) * 2)],
)
def test_bandwidths(text: str, wanted: tuple[float, float]) -> None:
    assert bandwidths(text) == wanted


@pytest.mark.parametrize("text", ["fast", "25GB/h", "0GB/s", "1GB/s,2GB/s,3GB/s", "", "1GB/s,"])
def test_no_bandwidths(text: str) -> None:
    with pytest.raises(UsageError, match="bandwidth"):
        bandwidths(text)


def test_an_elastic_run_is_planned_for_its_fewest_workers(muster: Muster, tmp_path: Path) -> None:
    told = muster.json(plan_recipe(tmp_path, **{"strategy.kind": "fsdp", "resources.workers": [2, 4]}))
    assert told["world_size"] == 2
    assert "fewest workers, 2" in " ".join(told["notes"])


def test_without_a_limit_sizes_are_told(muster: Muster, tmp_path: Path) -> None:
    recipe = plan_recipe(tmp_path)
    code, out, _ = muster.plan(recipe)
    assert code == 0
    assert "give --gpu-memory 24GiB" in out
    assert "each rank sends" not in out, "there is one"
    assert muster.json(recipe)["fits"] is None


def test_prepared_data_and_a_past_run_are_told_of(muster: Muster, tmp_path: Path, tiny_model: Path) -> None:
    write_pairs(tmp_path / "data" / "a.jsonl", 30)
    recipe = small_recipe(
        "told", tiny_model, tmp_path, **{"training": {"epochs": 1, "global_batch": 4, "micro_batch": 2}}
    )
    before = RunLengthQuery(recipe, None).outlook()
    assert (before.steps, before.samples_per_epoch, before.tokens_per_s) == (None, None, None)
    assert train_here(recipe) == "succeeded"
    told = muster.json(recipe)
    assert told["samples_per_epoch"] == 30
    assert told["steps"] == told["steps_per_epoch"] > 0
    assert told["tokens_per_s"] > 0
    assert told["hours"] > 0
    # The same data under another name: found by what it is, not by whose run prepared it.
    other = recipe.model_copy(update={"name": "other"})
    assert RunLengthQuery(other, None).outlook().samples_per_epoch == 30
    assert not run_of(other).list("")


@pytest.mark.parametrize(
    ("changes", "arguments", "said"),
    [
        ({"model.path": "./nowhere"}, (), "'./nowhere' is no folder on this host"),
        ({}, ("--gpu-memory", "lots"), "'lots' is not a size of memory"),
        ({}, ("training.steps=0",), "training.steps"),
        ({"adapter.target_modules": ["q_prog"]}, (), "q_prog"),
    ],
)
def test_what_cannot_be_planned(
    muster: Muster, tmp_path: Path, changes: dict[str, Any], arguments: tuple[str, ...], said: str
) -> None:
    code, out, err = muster.plan(plan_recipe(tmp_path, **changes), *arguments)
    assert (code, out) == (2, "")
    assert said in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("text", "bytes_"),
    [("24GiB", 24 * 2**30), ("80GB", 80 * 10**9), ("1.5 TiB", 3 * 2**39), ("64g", 64 * 10**9), ("1024", 1024)],
)
def test_sizes(text: str, bytes_: int) -> None:
    assert size(text) == bytes_


@pytest.mark.parametrize("text", ["", "GiB", "24 gallons", "-1GiB"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(UsageError, match="not a size of memory"):
        size(text)
