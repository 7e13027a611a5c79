"""`muster doctor` as users start it, on a Ray of this machine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.jobs import ROOT, write_recipe
from tests.support.s3 import CREDENTIALS
from tests.support.training import small_recipe, write_pairs

pytestmark = [pytest.mark.ray, pytest.mark.timeout(200)]


def doctor(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "launcher", "doctor", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=90
    )


def test_two_workers_are_ready(joined: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", CREDENTIALS["AWS_SECRET_ACCESS_KEY"])
    write_pairs(tmp_path / "data" / "a.jsonl", 20)
    recipe = small_recipe("preflight", tiny_model, tmp_path, **{"resources.workers": 2})
    found = doctor(write_recipe(recipe, tmp_path), "--json")
    assert found.returncode == 0, found.stdout + found.stderr
    told = json.loads(found.stdout)
    assert told["verdict"] in ("ready", "warnings"), told[
        "findings"
    ]  # this machine may be full or have a small /dev/shm
    assert not [f for f in told["findings"] if f["level"] == "failure"]
    (host,) = told["hosts"]
    assert (host["state"], host["model_readable"], host["storage"]["conditional"]) == ("ok", True, True)
    assert {"python", "torch", "ray", "muster"} <= set(host["versions"])
    assert [rank["rank"] for rank in told["ranks"]] == [0, 1]
    (pair,) = told["pairs"]
    assert (pair["ranks"], pair["state"]) == ([0, 1], "ok")
    assert pair["timings"][0]["bus_gb_s"] > 0
    assert told["inputs"] == {"error": None, "warnings": [], "late": False}
    assert len(told["plan"]["host_bytes"]) == 2
    assert told["seconds"] < 60
    assert CREDENTIALS["AWS_SECRET_ACCESS_KEY"] not in found.stdout + found.stderr
    assert not list((tmp_path / "runs").glob("*"))


@pytest.mark.night
def test_the_bandwidth_inside_and_across_replicas(joined: str, tiny_model: Path, tmp_path: Path) -> None:
    write_pairs(tmp_path / "data" / "a.jsonl", 20)
    changes = {"resources.workers": 4, "strategy.kind": "fsdp", "strategy.replicas": 2}
    recipe = write_recipe(small_recipe("preflight", tiny_model, tmp_path, **changes), tmp_path)
    found = doctor(recipe, "--json")
    assert found.returncode == 0, found.stdout + found.stderr
    told = json.loads(found.stdout)
    assert told["mesh"] == {"replicas": 2, "shards": 2, "context": 1}
    assert [(g["axis"], g["ranks"], g["state"]) for g in told["groups"]] == [
        ("inside", [0, 1], "ok"),
        ("inside", [2, 3], "ok"),
        ("across", [0, 2], "ok"),
        ("across", [1, 3], "ok"),
    ]
    assert all(g["all_reduce_bytes_per_s"] > 0 and g["all_gather_bytes_per_s"] > 0 for g in told["groups"])
    assert len(told["network"].split(",")) == 2


def test_a_storage_that_cannot_be_written_and_workers_that_do_not_fit(
    joined: str, tiny_model: Path, tmp_path: Path
) -> None:
    write_pairs(tmp_path / "data" / "a.jsonl", 20)
    (tmp_path / "file").touch()
    changes = {"resources.workers": 40, "storage": str(tmp_path / "file" / "runs")}
    found = doctor(write_recipe(small_recipe("preflight", tiny_model, tmp_path, **changes), tmp_path))
    assert found.returncode == 1, found.stdout + found.stderr
    said = " ".join(found.stdout.split())
    assert said.count("not ready: ") == 1
    assert "what to do" in said
    assert str(tmp_path / "file") in said.replace(" ", "")
    assert "has room for 4" in said


@pytest.mark.night
def test_a_ray_of_this_machine_is_started_where_no_cluster_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    found = doctor("--json")
    assert found.returncode in (0, 1), found.stderr  # this machine may be full
    told = json.loads(found.stdout)
    assert (told["ray"], len(told["ranks"]), told["groups"]) == ("local", 1, [])


def test_no_cluster_and_no_recipe_are_usage(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert doctor(str(tmp_path / "none.yaml")).returncode == 2
    assert doctor("--on", "moon").returncode == 2
