"""Which runs need no Ray, and what the death of their worker means."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from launcher.attempt import AttemptFailed
from launcher.driver.local import LocalAttempt, needs_no_ray
from tests.support.training import small_recipe
from trainer.recipe import ResourcesSection
from trainer.worker.job import Job


def test_one_worker_that_may_run_anywhere_needs_no_ray() -> None:
    def asked(**resources: object) -> bool:
        return needs_no_ray(ResourcesSection.model_validate(resources))

    assert asked(workers=1)
    assert asked(workers=1, gpus_per_worker=1)
    assert not asked(workers=2)
    assert not asked(workers=[1, 2])
    assert not asked(workers=1, labels={"zone": "a"})
    assert not asked(workers=1, gpus_per_worker=1, accelerator_type="A100")


def test_a_worker_that_is_killed_has_died(tmp_path: Path) -> None:
    attempt = LocalAttempt()
    os.kill(attempt.pid, signal.SIGKILL)
    attempt.begin(Job(str(tmp_path), 1, small_recipe("killed", tmp_path, tmp_path), 1, {}))
    assert attempt.wait(60)
    with pytest.raises(AttemptFailed, match="rank 0 died: killed by SIGKILL") as failed:
        attempt.result()
    assert failed.value.cause.died
