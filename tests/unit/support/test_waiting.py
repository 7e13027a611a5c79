"""Waits are bounded in seconds that count less on a busy machine."""

from __future__ import annotations

import os
import time

import pytest

from tests.support.waiting import IdleClock, wait_for


@pytest.mark.parametrize(("load", "seconds"), [(0.0, 10.0), (1.0, 10.0), (2.0, 10.0), (8.0, 2.5)])
def test_a_second_counts_less_while_processes_wait_for_a_core(
    load: float, seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    clock = IdleClock()
    now[0] += 10
    assert clock.seconds() == seconds
    assert clock.seconds() == seconds


def test_what_does_not_come_is_named() -> None:
    with pytest.raises(AssertionError, match=r"a wonder: not within 0\.1 s\nthe log"):
        wait_for(lambda: False, "a wonder", 0.1, logs=lambda: "the log")
