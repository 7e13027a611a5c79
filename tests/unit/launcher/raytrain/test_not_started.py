"""A Ray of this machine's own that does not start: one sentence with what to do, and exit code 1."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from launcher.child import ChildEnded
from launcher.raytrain import runner
from launcher.raytrain.session import connect
from tests.support.training import small_recipe
from trainer.errors import MusterError


class PlayedRay:
    """Instead of the child that uses Ray: its ``connect`` does what the test says."""

    def __init__(self, connected: Future[None]) -> None:
        self.connected, self.killed = connected, False

    def submit(self, method: str, *arguments: Any) -> Future[None]:
        assert method == "connect"
        return self.connected

    def kill(self) -> None:
        self.killed = True


def check(error: MusterError, cause: str) -> None:
    text = str(error)
    assert error.exit_code == 1
    assert text.startswith(f"Ray cannot be started on this machine ({cause}")
    assert "\n" not in text
    for advice in ("busy", "/dev/shm", "ulimit", "MUSTER_DEBUG=1"):
        assert advice in text


def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, play: Callable[[Future[None]], None]) -> MusterError:
    connected: Future[None] = Future()
    play(connected)
    ray = PlayedRay(connected)
    monkeypatch.setattr(runner, "Child", lambda *given: ray)
    monkeypatch.setattr(runner, "START_S", 0.01)
    recipe = small_recipe("r", tmp_path / "model", tmp_path, resources={"workers": 1})
    with pytest.raises(MusterError) as error, runner.RayRunner(recipe, None):
        pass
    assert ray.killed
    return error.value


def test_its_process_dies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    died = ChildEnded("its process ended with exit code 1")
    check(
        refused(tmp_path, monkeypatch, lambda future: future.set_exception(died)), "its process ended with exit code 1"
    )


def test_it_never_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check(refused(tmp_path, monkeypatch, lambda future: None), "it has not answered within")


def test_it_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    def init(**settings: Any) -> None:
        raise Exception("The current node timed out during startup.\nThis could happen because …")

    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(MusterError) as error:
        connect(None, small_recipe("r", tmp_path / "model", tmp_path).resources)
    check(error.value, "Exception: The current node timed out during startup. This could happen because …")
