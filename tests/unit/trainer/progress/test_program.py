"""A command that is printed starts muster in the shell that it is copied into."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from trainer.progress.program import program


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The script of an environment that is not activated."""
    script = tmp_path / ".venv" / "bin" / "muster"
    script.parent.mkdir(parents=True)
    script.touch(mode=0o755)
    monkeypatch.setattr(sys, "executable", str(script.with_name("python")))
    monkeypatch.setenv("PATH", "/nowhere")
    return script


def test_a_script_that_the_shell_does_not_find_is_named_by_its_path(
    installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert program() == ".venv/bin/muster"
    monkeypatch.chdir("/")
    assert program() == str(installed).lstrip("/")
    monkeypatch.chdir(installed.parent)
    assert program() == "muster"


def test_what_the_shell_finds_has_its_name(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(installed.parent))
    assert program() == "muster"
    monkeypatch.setenv("PATH", "/nowhere")
    installed.unlink()
    assert program() == "muster", "a checkout without its script"
