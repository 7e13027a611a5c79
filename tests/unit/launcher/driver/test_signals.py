"""What a signal to a driver says and does, by how far the run is."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from launcher.driver.driver import Signals
from trainer.errors import Interrupted
from trainer.interruption import RESUMES, STARTS, Interruption


@pytest.fixture
def interruption(monkeypatch: pytest.MonkeyPatch) -> Interruption:
    mine = Interruption()
    mine.command(STARTS)
    monkeypatch.setattr("launcher.driver.driver.current", mine)
    return mine


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def signals(said: list[str], interruption: Interruption) -> Signals:
    progress: Any = SimpleNamespace(say=said.append)
    return Signals(progress)


def lease(asked: bool = False) -> Any:
    stops: list[bool] = []
    event = SimpleNamespace(is_set=lambda: asked)
    return SimpleNamespace(asked=event, request_stop=lambda: stops.append(True), stops=stops)


def test_before_the_first_step_nothing_is_promised_of_workers(signals: Signals, said: list[str]) -> None:
    held = lease()
    signals.tell(held)
    signals.ask("SIGINT")
    signals.ask("SIGINT")
    assert said == ["SIGINT: the run ends, with a checkpoint if it has done a step; once more to leave at once"]
    assert held.stops == [True]
    with pytest.raises(Interrupted, match=f"stopped before training began; {STARTS}"):
        signals.check()


def test_after_a_step_the_workers_commit(signals: Signals, said: list[str], interruption: Interruption) -> None:
    signals.note_step()
    signals.ask("SIGTERM")
    assert said == ["SIGTERM: the workers commit and end; once more to leave at once"]
    assert interruption.promise == RESUMES


def test_a_request_in_the_storage_is_a_signal(signals: Signals, said: list[str]) -> None:
    signals.tell(lease(asked=True))
    assert signals.stopped
    assert said[0].startswith("muster cancel: the run ends, with a checkpoint if it has done a step")
