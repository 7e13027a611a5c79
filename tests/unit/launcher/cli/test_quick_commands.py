"""The commands that only read recipes and storage run where the heavy libraries cannot even be imported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[4]
HEAVY = ("accelerate", "bitsandbytes", "datasets", "deepspeed", "peft", "ray", "torch", "transformers")
BLOCKED = f"""
import sys
sys.modules.update(dict.fromkeys({HEAVY}))
from launcher.cli.app import main
sys.exit(main())
"""


def muster(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """The command line with every heavy library blocked: importing one raises ModuleNotFoundError."""
    command = [sys.executable, "-c", BLOCKED, *arguments]
    return subprocess.run(command, cwd=cwd, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=60)


def test_validate_all() -> None:
    result = muster("validate", "--all")
    assert result.returncode == 0, result.stderr
    assert "quickstart" in result.stdout + result.stderr


def test_validate_finds_what_a_cluster_of_the_recipe_would_refuse() -> None:
    for change, said in {
        "cluster.kubernetes.pod={nodeSelector: [a]}": "pod.nodeSelector: expected a mapping, got a list",
        "cluster.kubernetes.memory_per_worker=16GB": "cluster.kubernetes.memory_per_worker is '16GB'",
    }.items():
        result = muster("validate", "recipes/quickstart.yaml", change)
        assert result.returncode == 2
        assert said in result.stderr
        assert "Traceback" not in result.stderr


def test_schema_writes_json_and_nothing_else() -> None:
    result = muster("schema")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == json.loads((ROOT / "recipes" / "recipe.schema.json").read_text())


def test_convert(tmp_path: Path) -> None:
    file = tmp_path / "theirs.yml"
    file.write_text("base_model: a/b\nlearning_rate: 1e-4\ndatasets: [{path: a/b, type: alpaca}]\n")
    result = muster("convert", "axolotl", str(file), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "path: hf://a/b" in result.stdout


def test_help_and_version() -> None:
    assert "Use what was trained:" in muster("--help").stdout
    assert muster("--version").stdout.startswith("muster ")


def test_rm(tmp_path: Path) -> None:
    (tmp_path / "my").mkdir()
    (tmp_path / "my" / "recipe.yaml").write_text("name: my\n")
    result = muster("rm", str(tmp_path / "my"), "--yes")
    assert result.returncode == 0, result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [[], ["qwen3-0.6b-chat"]])
def test_init_of_what_is_shipped(arguments: list[str], tmp_path: Path) -> None:
    result = muster("init", *arguments, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "Qwen3-0.6B" in result.stdout


def test_ls_of_an_empty_storage(tmp_path: Path) -> None:
    result = muster("ls", str(tmp_path))
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("arguments", [["status", "nowhere"], ["validate", "missing.yaml"], ["unheard-of"]])
def test_what_is_not_there_is_exit_code_2_and_a_sentence(arguments: list[str], tmp_path: Path) -> None:
    result = muster(*arguments, cwd=tmp_path)
    assert result.returncode == 2, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    assert arguments[-1] in result.stderr
    assert not list(tmp_path.iterdir()), "a command that only reads made something"
