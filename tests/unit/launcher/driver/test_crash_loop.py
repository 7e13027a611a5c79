"""Restarts are bounded by what fails, not only by how often."""

from __future__ import annotations

import pytest

from launcher.driver.crash_loop import CrashSignature, in_a_row, is_hopeless

KILLED = "rank 1 died: ActorDiedError: The actor died unexpectedly (pid 4711, actor 0f3c9a7d11aa44bb)"
DIED = KILLED.replace("rank 1", "rank 0 on host-b").replace("died:", "died (after step 5):")
DIED_SEEN = KILLED.replace("rank 1", "rank 2 on host-a").replace("died:", "died (step 6, optimizer):")
LOST = "rank 0 on host-a: FileNotFoundError: /tmp/muster-restore-4zmc_wc_/checkpoint/config.json"
BROKEN = "rank 0 on host-a: CorruptObject: block 7 of w000000.data is damaged"


@pytest.mark.parametrize(
    ("faults", "count"),
    [
        ([], 0),
        ([CrashSignature(5, KILLED)], 1),
        ([CrashSignature(5, KILLED)] * 3, 3),
        ([CrashSignature(5, KILLED), CrashSignature(5, KILLED.replace("4711", "12").replace("rank 1", "rank 0"))], 2),
        ([CrashSignature(5, DIED), CrashSignature(5, DIED_SEEN), CrashSignature(5, KILLED)], 3),
        ([CrashSignature(7, BROKEN), CrashSignature(7, BROKEN.replace("rank 0 on host-a", "rank 3 on host-b"))], 2),
        ([CrashSignature(7, LOST), CrashSignature(7, LOST.replace("4zmc_wc_", "n80aib7s"))], 2),
        ([CrashSignature(7, LOST), CrashSignature(7, LOST.replace("checkpoint", "elsewhere"))], 1),
        ([CrashSignature(5, KILLED), CrashSignature(6, KILLED), CrashSignature(6, KILLED)], 2),
        ([CrashSignature(5, KILLED), CrashSignature(5, BROKEN), CrashSignature(5, KILLED)], 1),
        ([CrashSignature(None, KILLED)] * 5, 1),
        ([CrashSignature(5, KILLED), CrashSignature(None, KILLED), CrashSignature(5, KILLED)], 1),
    ],
)
def test_faults_in_a_row_are_of_one_step_and_one_kind(faults: list[CrashSignature], count: int) -> None:
    assert in_a_row(faults) == count
    assert is_hopeless(faults) == (count >= 3)


def test_a_run_that_gets_on_between_failures_is_never_hopeless() -> None:
    assert not is_hopeless([CrashSignature(step, KILLED) for step in range(50)])
