"""How a wish to stop reaches a worker."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from tests.storage.doubles import faulty
from tests.support.waiting import wait_for
from trainer.run import layout
from trainer.run.stop_poller import StopPoller
from trainer.storage import Storage

HOLDER = {"host": "a", "boot_id": "b", "pid": 1, "process_start": 0.0, "job": None}


def lease(run: Storage, driver: int, state: str, gathers: int = 0) -> None:
    row = {"driver": driver, "state": state, "time": 0.0, "beat": 1, "gathers": gathers, **HOLDER}
    run.write_json(layout.LEASE, row)


class Looks:
    """Counts how often the lease was read; ``more`` waits until it has been read twice more."""

    def __init__(self, backend: Any) -> None:
        self.count = 0
        self._changed = threading.Condition()
        backend.before = self._before

    def _before(self, verb: str, path: str) -> None:
        if verb == "read" and path.endswith("lease"):
            with self._changed:
                self.count += 1
                self._changed.notify_all()

    def more(self) -> None:
        with self._changed:
            target = self.count + 2
            assert self._changed.wait_for(lambda: self.count >= target, 30.0)


def watching(run: Storage, driver: int = 2) -> StopPoller:
    return StopPoller(run, driver, enabled=True, poll_s=0.001)


@pytest.mark.parametrize(
    ("driver", "state"),
    [(2, "stopping"), (2, "interrupted"), (2, "failed"), (3, "running"), (3, "stopping")],
)
def test_it_stops_for_its_driver_and_for_a_newer_one(driver: int, state: str) -> None:
    run, backend = faulty()
    lease(run, 2, "running")
    looks = Looks(backend)
    with watching(run) as watch:
        looks.more()
        assert not watch.stop_requested()
        lease(run, driver, state)
        wait_for(watch.stop_requested, "the stop to arrive")


def test_workers_are_gathered_once_for_each_wish() -> None:
    """What was asked for before these workers began was fulfilled by their beginning."""
    run, backend = faulty()
    lease(run, 2, "running", gathers=3)
    looks = Looks(backend)
    with watching(run) as watch:
        looks.more()
        assert not watch.stop_requested()
        lease(run, 1, "running", gathers=9)
        looks.more()
        assert not watch.stop_requested()
        lease(run, 2, "running", gathers=4)
        wait_for(watch.stop_requested, "the wish to arrive")
        assert watch.resize
    with watching(run) as watch:
        lease(run, 2, "stopping", gathers=5)
        wait_for(watch.stop_requested, "the stop to arrive")
        assert not watch.resize, "a stop is no wish to go on"


def test_what_an_overtaken_driver_still_writes_does_not_count() -> None:
    run, backend = faulty()
    lease(run, 1, "stopping")
    looks = Looks(backend)
    with watching(run) as watch:
        looks.more()
        assert not watch.stop_requested()


def test_storage_that_fails_or_holds_nonsense_changes_nothing() -> None:
    run, backend = faulty()
    looks = Looks(backend)
    with watching(run) as watch:
        looks.more()  # no lease at all
        run.write(layout.LEASE, b"{torn")
        looks.more()
        run.write(layout.LEASE, b'{"driver": 2}')
        looks.more()
        assert not watch.stop_requested()
        lease(run, 2, "stopping")
        wait_for(watch.stop_requested, "the stop to arrive after all that")


def test_it_looks_only_where_it_is_enabled() -> None:
    run, backend = faulty()
    lease(run, 2, "stopping")
    looks = Looks(backend)
    with StopPoller(run, 2, enabled=False, poll_s=0.001) as watch:
        assert not watch.stop_requested()
    assert looks.count == 0


def test_it_ends_with_its_block() -> None:
    run, backend = faulty()
    lease(run, 2, "running")
    looks = Looks(backend)
    with watching(run):
        looks.more()
    wait_for(lambda: not any(t.name == "stop-watch" for t in threading.enumerate()), "the thread to end")
