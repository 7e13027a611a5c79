"""A driver of several runs: each ends with its own state, and what concerns all is requested of all."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launcher.driver import driver as module
from launcher.driver.driver import HeldRun, RunDriver, Signals
from tests.support.training import small_recipe
from trainer.errors import Interrupted, MusterError, RunHeld, StorageError, WorkerFailed
from trainer.recipe import Recipe
from trainer.run.events import ResizeEvent
from trainer.run.jsonl import read_events
from trainer.run.lease import Lease, read_lease, request_end
from trainer.storage import Storage, open_storage

Train = Callable[[RunDriver], None]


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return open_storage(str(tmp_path / "runs"))


@pytest.fixture
def complete(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The names of the runs that count as complete."""
    names: set[str] = set()

    def finished(run: Storage, length: Any) -> Any:
        return SimpleNamespace(step=10) if run.url.rpartition("/")[2] in names else None

    for place in ("launcher.driver.driver.finished", "trainer.worker.held_run.finished"):
        monkeypatch.setattr(place, finished)
    return names


def driver_of(storage: Storage, folder: Path, *names: str) -> RunDriver:
    progress: Any = SimpleNamespace(say=lambda text: None)
    held = []
    for name in names:
        recipe = small_recipe(name, folder / "model", folder)
        held.append(HeldRun(recipe, storage.child(name), Lease.acquire(storage.child(name), renew_s=0.05)))
    signals, phases = Signals(progress), SimpleNamespace()
    for one in held:
        signals.tell(one.lease)
    return RunDriver(tuple(held), storage, signals, progress, phases)  # type: ignore[arg-type]


def drive(driver: RunDriver, train: Train, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Returns the states of the runs after ``train``, which stands for the attempts."""
    monkeypatch.setattr(RunDriver, "_train", train)
    try:
        driver.drive()
    finally:
        leases = {one.recipe.name: read_lease(one.run) for one in driver.held}
        drive.states = {name: lease.state for name, lease in leases.items() if lease}  # type: ignore[attr-defined]
    return drive.states  # type: ignore[attr-defined, no-any-return]


def cancel(one: HeldRun) -> None:
    request_end(one.run, one.lease.driver)
    assert one.lease.asked.wait(10)


def test_a_run_that_is_cancelled_alone_is_interrupted(
    storage: Storage, tmp_path: Path, complete: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(driver: RunDriver) -> None:
        cancel(driver.held[1])
        complete.update({"a", "c"})

    with pytest.raises(Interrupted, match=r"stopped on request; .*runs/b"):
        drive(driver_of(storage, tmp_path, "a", "b", "c"), train, monkeypatch)
    assert drive.states == {"a": "succeeded", "b": "interrupted", "c": "succeeded"}  # type: ignore[attr-defined]


def test_the_failure_of_another_run_is_none_of_a_cancelled_one(
    storage: Storage, tmp_path: Path, complete: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(driver: RunDriver) -> None:
        cancel(driver.held[0])
        complete.add("c")
        raise WorkerFailed("run b: the loss is not finite")

    with pytest.raises(WorkerFailed, match="run b"):
        drive(driver_of(storage, tmp_path, "a", "b", "c"), train, monkeypatch)
    assert drive.states == {"a": "interrupted", "b": "failed", "c": "succeeded"}  # type: ignore[attr-defined]


class Waiting:
    """A runner whose attempt ends once every lease in ``expected`` has the state."""

    def __init__(self, done: Callable[[], bool]) -> None:
        self.done = done

    def nodes(self) -> list[Any]:
        from tests.support.nodes import node

        return [node(1, {"CPU": 8.0})]

    def start(self, job: Any, workers: int) -> Any:
        def wait(timeout_s: float) -> bool:
            threading.Event().wait(0.05)
            return self.done()

        return SimpleNamespace(wait=wait, result=lambda: None)


def state(one: HeldRun) -> str:
    lease = read_lease(one.run)
    assert lease is not None
    return lease.state


@pytest.mark.timeout(60)
def test_the_workers_of_a_cancelled_run_are_told(storage: Storage, tmp_path: Path) -> None:
    from contextlib import contextmanager

    from trainer.run.startup_phases import Phases

    driver = driver_of(storage, tmp_path, "a", "b")
    said: list[str] = []

    @contextmanager
    def training(*arguments: Any, **others: Any) -> Any:
        yield lambda: False

    progress: Any = SimpleNamespace(say=said.append, training=training)
    driver = RunDriver(driver.held, storage, driver.signals, progress, Phases(0.0))
    request_end(driver.held[1].run, driver.held[1].lease.driver)
    runner: Any = Waiting(lambda: state(driver.held[1]) == "stopping")
    driver._fit(runner, [10, 20], lambda: None)
    assert state(driver.held[0]) == "running"
    assert said[0].startswith("the steps below are those of b; `muster ls ")  # the longest
    assert said[1:] == [f"muster cancel: {driver.held[1].run.url} commits and ends; the others continue"]
    for one in driver.held:
        one.lease.release("interrupted")


def test_a_resize_is_requested_of_all_runs(storage: Storage, tmp_path: Path) -> None:
    driver = driver_of(storage, tmp_path, "a", "b")
    driver._resize("there is room for 2 workers instead of 1")
    for one in driver.held:
        one.lease.release("interrupted")
        lease = read_lease(one.run)
        assert lease is not None
        assert lease.gathers == 1
        assert [type(event) for event in read_events(one.run)] == [ResizeEvent]


def hold(recipes: list[Recipe], storage: Storage, say: Callable[[str], None] = print) -> tuple[HeldRun, ...]:
    progress: Any = SimpleNamespace(say=say)
    return module._hold(recipes, storage, Signals(progress), progress, takeover=False)


def test_what_was_cancelled_in_a_job_is_left_out_when_the_job_starts_again(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    recipes = [small_recipe(name, tmp_path / "model", tmp_path) for name in "abc"]
    request_end(storage.child("b"), None, ["slurm:7"])
    said: list[str] = []
    held = hold(recipes, storage, said.append)
    assert [one.recipe.name for one in held] == ["a", "c"]
    assert said == [f"{storage.child('b').url} was cancelled in slurm:7, which trains the others; it is left out"]
    for one in held:
        lease = read_lease(one.run)
        assert lease is not None
        assert lease.shared
        one.lease.release("interrupted")
        request_end(one.run, one.lease.driver, ["slurm:7"])
    with pytest.raises(Interrupted, match="slurm:7 was cancelled"):
        hold(recipes, storage)


def test_a_run_that_another_driver_holds_leaves_no_lease_behind(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    acquire, release = Lease.acquire, Lease.release

    def held_elsewhere(run: Storage, **settings: Any) -> Lease:
        if run.url.endswith("/c"):
            raise RunHeld("process 7 on another holds it")
        return acquire(run, job=None)

    def unreachable(lease: Lease, state: str, **settings: Any) -> None:
        release(lease, state, **settings)
        if lease._run.url.endswith("/a"):
            raise StorageError("no answer")

    monkeypatch.setattr(Lease, "acquire", staticmethod(held_elsewhere))
    monkeypatch.setattr(Lease, "release", unreachable)
    recipes = [small_recipe(name, tmp_path / "model", tmp_path) for name in "abc"]
    with pytest.raises(RunHeld):
        hold(recipes, storage)
    assert [lease.state for name in "ab" if (lease := read_lease(storage.child(name)))] == ["interrupted"] * 2


def test_a_storage_that_does_not_answer_is_a_failure(
    storage: Storage, tmp_path: Path, complete: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(driver: RunDriver) -> None:
        raise StorageError("no answer")

    with pytest.raises(MusterError):
        drive(driver_of(storage, tmp_path, "a", "b"), train, monkeypatch)
    assert set(drive.states.values()) == {"failed"}  # type: ignore[attr-defined]
