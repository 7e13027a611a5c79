"""Commits behind the loop's back: coalesced, never the last one, errors raised where somebody listens."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from trainer.errors import StorageError, where_of
from trainer.run.events import CheckpointEvent
from trainer.worker.async_committer import Committer
from trainer.worker.train_state import Snapshot

WAIT_S = 30.0


def snapshot(step: int, *, final: bool = False, best: bool = False) -> Snapshot:
    state = {"best": {"metric": "eval_loss", "value": 1.0, "step": step, "attempt": 1}} if best else {}
    return Snapshot(step, {}, {}, state, final)


class Slow:
    """A commit that waits for ``let_go`` and says with ``began`` that it has begun."""

    def __init__(self, *, fails_at: int | None = None) -> None:
        self.began, self.let_go = threading.Semaphore(0), threading.Semaphore(0)
        self.steps: list[int] = []
        self.folders: list[Path] = []
        self.fails_at = fails_at

    def __call__(self, snapshot: Snapshot, folder: Path) -> Mapping[str, Any]:
        self.began.release()
        assert self.let_go.acquire(timeout=WAIT_S)
        if snapshot.step == self.fails_at:
            raise StorageError(f"no reply for step {snapshot.step}")
        assert folder.is_dir()
        (folder / "file").write_text("x")
        self.folders.append(folder)
        self.steps.append(snapshot.step)
        return {"uri": f"memory://{snapshot.step}", "bytes": 7}

    def wait_until_begun(self) -> None:
        assert self.began.acquire(timeout=WAIT_S)

    def finish(self, commits: int) -> None:
        for _ in range(commits):
            self.let_go.release()


def test_a_newer_snapshot_takes_the_place_of_one_that_waits() -> None:
    commit, told = Slow(), list[CheckpointEvent]()
    committer = Committer(commit, told.append)
    committer.submit(snapshot(1))
    commit.wait_until_begun()
    for step in (2, 3, 4):
        committer.submit(snapshot(step))
    commit.finish(2)
    committer.close()
    assert commit.steps == [1, 4]
    assert [(c.step, c.uri, c.bytes) for c in told] == [(1, "memory://1", 7), (4, "memory://4", 7)]
    assert all(c.upload_s is not None and c.upload_s >= 0 for c in told)
    assert not any(folder.exists() for folder in commit.folders), "nothing is left on the disk"


LEAVES = """
import threading
from trainer.worker.async_committer import scratch_folder

entered = threading.Event()

def work():
    with scratch_folder() as folder:
        (folder / "weights").write_text("x")
        print(folder, flush=True)
        entered.set()
        threading.Event().wait()

threading.Thread(target=work, daemon=True).start()
entered.wait()
"""


def test_an_interpreter_that_exits_leaves_the_folder_to_the_thread_at_work_in_it() -> None:
    """It would be committed without its files."""
    done = subprocess.run([sys.executable, "-c", LEAVES], capture_output=True, text=True, timeout=WAIT_S, check=True)
    folder = Path(done.stdout.strip())
    assert (folder / "weights").read_text() == "x"
    shutil.rmtree(folder)


def test_the_final_snapshot_is_never_replaced() -> None:
    commit = Slow()
    committer = Committer(commit, lambda done: None)
    committer.submit(snapshot(1))
    commit.wait_until_begun()
    committer.submit(snapshot(2))
    committer.submit(snapshot(3, final=True))
    with pytest.raises(AssertionError, match="nothing comes after the final snapshot"):
        committer.submit(snapshot(4))
    commit.finish(2)
    committer.close()
    assert commit.steps == [1, 3]


def test_the_best_snapshot_is_replaced_only_by_a_better_one() -> None:
    commit, told = Slow(), list[CheckpointEvent]()
    committer = Committer(commit, told.append)
    committer.submit(snapshot(1))
    commit.wait_until_begun()
    for step in (2, 4):
        committer.submit(snapshot(step, best=True))
    for step in (5, 6):
        committer.submit(snapshot(step))
    assert committer.lag().backlog == 2
    commit.finish(2)
    committer.close()
    assert commit.steps == [1, 4]
    assert [event.coalesced for event in told] == [0, 3]


def test_the_final_snapshot_waits_for_the_best_one() -> None:
    commit = Slow()
    committer = Committer(commit, lambda event: None)
    committer.submit(snapshot(1))
    commit.wait_until_begun()
    committer.submit(snapshot(2, best=True))
    last = threading.Thread(target=committer.submit, args=[snapshot(3, final=True)])
    last.start()
    assert committer.lag().backlog == 2
    commit.finish(3)
    last.join(WAIT_S)
    committer.close()
    assert commit.steps == [1, 2, 3]


def test_the_final_snapshot_does_not_wait_for_a_best_one_that_fails() -> None:
    commit = Slow(fails_at=1)
    committer = Committer(commit, lambda event: None)
    committer.submit(snapshot(1))
    commit.wait_until_begun()
    committer.submit(snapshot(2, best=True))
    raised: list[StorageError] = []

    def submit() -> None:
        try:
            committer.submit(snapshot(3, final=True))
        except StorageError as error:
            raised.append(error)

    last = threading.Thread(target=submit)
    last.start()
    commit.finish(1)
    last.join(WAIT_S)
    assert [str(error) for error in raised] == ["no reply for step 1"]


def test_close_waits_for_what_was_submitted() -> None:
    commit = Slow()
    committer = Committer(commit, lambda done: None)
    committer.submit(snapshot(1))
    commit.wait_until_begun()
    committer.submit(snapshot(2, final=True))
    closer = threading.Thread(target=committer.close)
    closer.start()
    assert commit.steps == []
    assert closer.is_alive()
    commit.finish(2)
    closer.join(WAIT_S)
    assert not closer.is_alive()
    assert commit.steps == [1, 2]


def test_closing_an_idle_one_ends_it() -> None:
    committer = Committer(Slow(), lambda done: None)
    committer.close()
    committer.close()


def test_the_first_error_is_raised_by_every_call_and_nothing_is_committed_after_it() -> None:
    commit = Slow(fails_at=1)
    committer = Committer(commit, lambda done: None)
    committer.submit(snapshot(1))
    commit.wait_until_begun()
    committer.submit(snapshot(2))
    commit.finish(2)
    committer.drain()
    for call in (committer.check, lambda: committer.submit(snapshot(3)), committer.close):
        with pytest.raises(StorageError, match="no reply for step 1") as found:
            call()
        assert where_of(found.value) == "step 1, commit of the checkpoint", "whatever the loop does by now"
    assert commit.steps == []


def test_an_error_of_the_one_who_is_told_counts_too() -> None:
    commit = Slow()

    def told(done: CheckpointEvent) -> None:
        raise RuntimeError(f"step {done.step}")

    committer = Committer(commit, told)
    committer.submit(snapshot(5))
    commit.finish(1)
    with pytest.raises(RuntimeError, match="step 5"):
        committer.close()


def test_draining_commits_what_waits_without_raising() -> None:
    commit = Slow(fails_at=2)
    committer = Committer(commit, lambda done: None)
    committer.submit(snapshot(1))
    commit.wait_until_begun()
    committer.submit(snapshot(2))
    commit.finish(2)
    committer.drain()
    assert commit.steps == [1]
    with pytest.raises(StorageError, match="step 2"):
        committer.check()
