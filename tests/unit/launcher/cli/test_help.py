"""The help texts at 80 columns, the examples in them, the version, and what a shell completes."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from launcher.cli import completion
from launcher.cli.app import COMMANDS, app
from tests.unit.launcher.cli.test_app import Muster

ROOT = Path(__file__).resolve().parents[4]
NAMES = [name for commands in COMMANDS.values() for name, _, _ in commands]
PROGRAM: Any = typer.main.get_command(app)


@pytest.fixture
def muster(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Muster:
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setenv("COLUMNS", "80")
    return Muster(capsys, monkeypatch)


def test_the_commands_are_shown_in_groups_and_nothing_is_cut(muster: Muster) -> None:
    assert muster("--help") == 0
    assert max(map(len, muster.out.splitlines())) <= 80
    assert "..." not in muster.out.replace("[ARGS]...", "")
    headings = re.findall(r"^(\S.*):$", muster.out, flags=re.M)
    assert headings == [*COMMANDS, "Options"]
    assert re.findall(r"^  ([a-z]+) +[A-Z]", muster.out, flags=re.M) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_commands_help_is_readable_and_has_an_example_that_is_a_command(muster: Muster, name: str) -> None:
    assert muster(name, "--help") == 0
    assert max(map(len, muster.out.splitlines())) <= 80
    assert not re.search(r"<\w+|list\[", muster.out), "types of Python are no names of values"
    example = muster.out.split("Example:\n")[1].strip()
    assert example.startswith(f"muster {name}")
    words = shlex.split(example.partition(" > ")[0])[2:]
    PROGRAM.commands[name].make_context(name, words)  # raises for an option that does not exist


def test_every_option_says_what_it_takes(muster: Muster) -> None:
    assert muster("generate", "--help") == 0
    assert "--run RUN_URI" in muster.out
    assert "[default: 256]" in muster.out
    assert muster("merge", "--help") == 0
    assert "--out FOLDER" in muster.out
    assert "[required]" in muster.out
    assert muster("run", "--help") == 0
    assert muster.out.startswith("Usage: muster run RECIPE [KEY=VALUE]... [OPTIONS]\n")


def test_the_version(muster: Muster) -> None:
    assert muster("--version") == 0
    assert re.fullmatch(r"muster \d+\.\d+\S*\n", muster.out)
    assert muster.err == ""


def completed(words: str, folder: Path) -> list[str]:
    """What bash gets for the last word."""
    environment = {**os.environ, "_MUSTER_COMPLETE": "complete_bash", "PYTHONPATH": str(ROOT)}
    environment |= {"COMP_WORDS": words, "COMP_CWORD": str(len(words.split(" ")) - 1)}
    done = subprocess.run(
        [sys.executable, "-m", "launcher"], env=environment, cwd=folder, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.split()


def test_a_shell_completes_commands_options_and_runs(tmp_path: Path) -> None:
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "runs" / "mine" / "recipe.yaml").touch()
    assert completed("muster st", tmp_path) == ["status"]
    assert completed("muster run my.yaml --det", tmp_path) == ["--detach"]
    assert completed("muster chat --run runs/m", tmp_path) == ["runs/mine"]


def test_what_is_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("my.yaml", "my.json", "my.txt", "runs/a/recipe.yaml", "runs/b/notes", "runs/_data/x", ".hidden/x"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert completion.recipes("my") == ["my.json", "my.yaml"]
    assert completion.recipes("ru") == ["runs/a/", "runs/b/"]
    assert "quickstart" in completion.recipes("")
    assert completion.runs("") == ["runs/a", "runs/b/"], "a shell would put a space after the only answer runs/"
    assert completion.runs("runs/") == ["runs/a", "runs/b/"]
    assert completion.runs(f"{tmp_path}/runs/a") == [f"{tmp_path}/runs/a"]
    assert completion.runs("s3://runs/") == [], "no storage is asked"
    assert completion.runs("nowhere/x") == []
    assert completion.one_of("local", "ray")("r") == ["ray"]
