"""A child of the driver, without a model: what it sends, and what its silence and its death mean."""

from __future__ import annotations

import os
import signal

import pytest

from launcher.attempt import AttemptFailed
from launcher.driver import local
from launcher.driver.local import LocalAttempt, needs_no_ray
from trainer.recipe import ResourcesSection


def test_one_worker_that_may_run_anywhere_needs_no_ray() -> None:
    def asked(**resources: object) -> bool:
        return needs_no_ray(ResourcesSection.model_validate(resources))

    assert asked(workers=1)
    assert asked(workers=1, gpus_per_worker=1)
    assert not asked(workers=2)
    assert not asked(workers=[1, 2])
    assert not asked(workers=1, labels={"zone": "a"})
    assert not asked(workers=1, gpus_per_worker=1, accelerator_type="A100")


def test_a_child_that_is_killed_while_it_waits_has_died() -> None:
    attempt = LocalAttempt()
    assert not attempt.wait(0.1)
    os.kill(attempt.pid, signal.SIGKILL)
    assert attempt.wait(60)
    with pytest.raises(AttemptFailed, match="rank 0 died: killed by SIGKILL") as failed:
        attempt.result()
    assert failed.value.cause.died


def test_a_child_that_is_stopped_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    attempt = LocalAttempt()
    attempt.wait(0.1)
    os.kill(attempt.pid, signal.SIGSTOP)
    monkeypatch.setattr(local, "SILENCE_S", 1.0)
    assert attempt.wait(60)
    with pytest.raises(AttemptFailed, match="had not answered for 1 s and was killed"):
        attempt.result()
