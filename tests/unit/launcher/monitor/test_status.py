from __future__ import annotations

import itertools
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from launcher.monitor.status import list_runs, read_status
from tests.storage.doubles import faulty
from trainer.checkpoint import CommitRecord, claim_attempt, claim_driver, commit, put_checkpoint
from trainer.errors import InputError
from trainer.run.jsonl import JsonLinesWriter
from trainer.run.lease import Holder, LeaseRecord, to_row
from trainer.storage import Storage, to_json

LEASE = LeaseRecord(1, "running", Holder("another-host", "boot/1", 4711, 1000.0, None), 5000.0, 7)


def make_run(run: Storage, *, attempts: int = 2) -> None:
    run.write("recipe.yaml", b"name: x\n")
    driver = claim_driver(run, {})
    for attempt in range(1, attempts + 1):
        assert claim_attempt(run, driver, {}) == attempt
        rows = JsonLinesWriter(run, f"metrics/a{attempt:06d}")
        for step in range(5 * attempt - 4, 5 * attempt + 1):
            rows.add(
                {"attempt": attempt, "step": step, "total_steps": 20, "loss": 10.0 - step, "lr": 0.1, "world_size": 2}
                | {"samples": 8 * step, "epoch": 0}
            )
            if step % 4 == 0:
                rows.add({"attempt": attempt, "step": step, "eval_loss": 100.0 - step})
        rows.close()
        name, files = put_checkpoint(run, {"x": b"1"}, attempt=attempt, step=5 * attempt)
        commit(run, CommitRecord(5 * attempt, attempt, driver, name, name, files, {}, f"2026-01-0{attempt}T00:00:00Z"))


def test_a_running_run_tells_all_that_was_promised() -> None:
    run, _ = faulty()
    make_run(run)
    run.write_json("lease", to_row(LEASE))
    got = json.loads(json.dumps(read_status(run, now=5010.0).to_json()))
    assert {k: got[k] for k in ("state", "step", "total_steps", "attempts", "world_size", "samples")} == {
        "state": "running", "step": 10, "total_steps": 20, "attempts": 2, "world_size": 2, "samples": 80,
    }  # fmt: skip
    assert got["metrics"] == {"loss": 0.0, "lr": 0.1, "eval_loss": 92.0}
    assert [(c["step"], c["committed_at"]) for c in got["checkpoints"]] == [
        (5, "2026-01-01T00:00:00Z"),
        (10, "2026-01-02T00:00:00Z"),
    ]
    assert all(c["uri"].startswith("faulty://run/checkpoints/a00000") for c in got["checkpoints"])
    assert got["holder"] == "process 4711 on another-host"


@pytest.mark.parametrize(
    ("record", "now", "state"),
    [
        (LEASE, 5015.0, "running"),
        (LEASE, 5016.0, "interrupted"),
        (replace(LEASE, state="stopping"), 5001.0, "running"),
        (replace(LEASE, state="succeeded"), 9999.0, "succeeded"),
        (replace(LEASE, state="failed"), 5000.0, "failed"),
        (None, 5000.0, "interrupted"),
    ],
)
def test_the_state_follows_the_lease(
    record: LeaseRecord | None, now: float, state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.run.lease.GLANCE_S", 0.0)
    run, _ = faulty()
    make_run(run, attempts=1)
    if record is not None:
        run.write_json("lease", to_row(record))
    assert read_status(run, now=now).state == state


@pytest.mark.parametrize("behind_s", [20.0, 4000.0, -4000.0])
def test_a_holder_whose_clock_differs_is_running_while_it_renews(
    behind_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `muster run` finds it."""
    storage, backend = faulty()
    run = storage.child("r")
    make_run(run, attempts=1)
    monkeypatch.setattr("trainer.run.lease._POLL_S", 1e-3)
    monkeypatch.setattr("launcher.monitor.status.GLANCE_S", 0.0)
    beats = itertools.count(1)

    def renew(verb: str, path: str) -> None:
        if verb == "read" and path == run.uri("lease"):
            record = replace(LEASE, time=time.time() - behind_s, beat=next(beats))
            backend.objects[path] = to_json(to_row(record))

    backend.before = renew
    assert read_status(run).state == "running"
    assert [status.state for status in list_runs(storage)] == ["running"]


def test_a_run_before_its_first_step_is_at_step_0() -> None:
    run, _ = faulty()
    run.write("recipe.yaml", b"")
    status = read_status(run)
    assert (status.state, status.step, status.attempts, status.checkpoints) == ("interrupted", 0, 0, ())


def test_a_step_that_two_generations_committed_is_the_newer_ones() -> None:
    run, _ = faulty()
    make_run(run)
    name, files = put_checkpoint(run, {"x": b"2"}, attempt=2, step=5)
    commit(run, CommitRecord(5, 2, 1, "n", name, files, {}, "2026-02-01T00:00:00Z"))
    assert [(c.step, c.committed_at[:7]) for c in read_status(run).checkpoints] == [(5, "2026-02"), (10, "2026-01")]


def test_no_run_is_a_sentence() -> None:
    run, _ = faulty()
    with pytest.raises(InputError, match=r"no run at faulty://run; `muster ls faulty://run` lists the runs there"):
        read_status(run)


def test_runs_are_listed_and_other_folders_are_not() -> None:
    storage, _ = faulty()
    make_run(storage.child("b"))
    make_run(storage.child("a"), attempts=1)
    storage.write("_data/0123/manifest.json", b"{}")
    storage.write("notes/x.txt", b"")
    assert [(s.name, s.step, s.uri) for s in list_runs(storage)] == [
        ("a", 5, "faulty://run/a"),
        ("b", 10, "faulty://run/b"),
    ]


def test_reading_a_status_imports_nothing_heavy() -> None:
    code = (
        "import sys, tempfile; from launcher.monitor.status import list_runs; from trainer.storage import open_storage;"
        "list_runs(open_storage(tempfile.mkdtemp()));"
        "print([m for m in ('torch', 'ray', 'numpy', 'transformers', 'botocore', 's3fs') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


def calls(storage: Storage, look: Callable[[], object]) -> list[tuple[str, str]]:
    asked: list[tuple[str, str]] = []
    backend: Any = storage._backend
    backend.before = lambda verb, path: asked.append((verb, path))
    look()
    backend.before = lambda verb, path: None
    return asked


def crowd(run: Storage, objects: int) -> None:
    """What a long run leaves beside its records: ledgers, plans, events, files of checkpoints."""
    for i in range(objects):
        for folder in ("ledger", "plan", "events", "checkpoints/a000001-s000000001-0123456789ab"):
            run.write(f"{folder}/{i:06d}", b"x")


def test_a_look_costs_the_same_however_many_objects_there_are() -> None:
    counts = []
    for objects in (1, 1000):
        storage, _ = faulty()
        for name in ("a", "b"):
            make_run(storage.child(name))
            crowd(storage.child(name), objects)
        one = calls(storage, lambda storage=storage: read_status(storage.child("a")))
        all_of_them = calls(storage, lambda storage=storage: list_runs(storage))
        listed = {path for verb, path in one if verb == "list"}
        assert listed == {f"faulty://run/a/{folder}" for folder in ("claims", "commits", "metrics")}
        counts.append((len(one), len(all_of_them)))
    assert counts[0] == counts[1]
    assert counts[0][0] <= 10


def test_a_list_of_runs_reads_one_record_of_each() -> None:
    storage, _ = faulty()
    for attempts in (1, 40):
        make_run(storage.child(f"r{attempts}"), attempts=attempts)
    asked = calls(storage, lambda: list_runs(storage))
    assert sum("/commits/" in path for _, path in asked) == 2
    assert [status.step for status in list_runs(storage)] == [5, 200]


def failed_event(run: Storage, attempt: int, writer: str, event: str, at: float, **fields: Any) -> None:
    row = {"attempt": attempt, "event": event, "time": at, "writer": writer, **fields}
    number = len(run.list("events"))
    run.write(f"events/a{attempt:06d}-{writer}-{number:06d}.jsonl", json.dumps(row).encode() + b"\n")


def test_the_failure_is_the_newest_of_the_last_driver() -> None:
    run, _ = faulty()
    make_run(run)
    run.write_json("lease", to_row(replace(LEASE, driver=2)))

    def cause() -> str | None:
        found = read_status(run, now=5010.0).failure
        return found and found["cause"]

    failed_event(run, 1, "driver1-controller", "failure", 1.0, cause="of a driver before", retried=False)
    assert cause() is None
    failed_event(run, 1, "driver2-controller", "failure", 2.0, cause="first", retried=True)
    failed_event(run, 2, "driver2-controller", "failure", 3.0, cause="second", retried=True, trace="t", advice="a")
    failed_event(run, 2, "driver2-resize", "resize", 4.0, reason="x")
    failed_event(run, 2, "rank0", "failure", 9.0, cause="nobody writes this")
    assert cause() == "second"
    failed_event(run, 2, "driver2", "end", 5.0, state="failed", cause="the data has gone")
    assert cause() == "the data has gone"
    failed_event(run, 2, "driver2-controller", "failure", 4.5, cause="the last", retried=False, trace="t", advice="a")
    assert read_status(run, now=5010.0).to_json()["failure"] == {
        "attempt": 2, "time": 4.5, "cause": "the last", "retried": False, "trace": "t", "advice": "a",
    }, "it has more to say than the end that came of it"  # fmt: skip
    run.write_json("lease", to_row(replace(LEASE, driver=2, state="succeeded")))
    assert cause() is None


def test_a_failure_is_found_in_a_few_reads_however_long_the_run() -> None:
    counts = []
    for attempts in (2, 30):
        run, _ = faulty()
        make_run(run)
        run.write_json("lease", to_row(LEASE))
        for attempt in range(1, attempts + 1):
            failed_event(
                run, attempt, "driver1-controller", "failure", float(attempt), cause=str(attempt), retried=True
            )
            run.write(f"events/a{attempt:06d}-rank0-000000.jsonl", b"{}\n" * 1000)
        asked = calls(run, lambda run=run: read_status(run, now=5010.0))
        assert not any("-rank0-" in path for _, path in asked)
        counts.append(sum("/events/" in path for _, path in asked))
    assert counts == [2, 4]
    found = read_status(run, now=5010.0).failure
    assert found is not None
    assert found["cause"] == "30"


def test_a_look_reads_the_end_of_the_metrics_and_the_evaluation_that_a_checkpoint_kept() -> None:
    run, _ = faulty()
    driver = claim_driver(run, {})
    attempt = claim_attempt(run, driver, {})
    run.write("recipe.yaml", b"")
    rows = JsonLinesWriter(run, f"metrics/a{attempt:06d}")
    for step in range(1, 1901):
        rows.add({"attempt": 1, "step": step, "loss": 1.0, "filling": "x" * 200})
        if step == 10:
            rows.add({"attempt": 1, "step": step, "eval_loss": 7.0})
    rows.close()
    facts = {"step": 1000, "loss": 1.0, "eval_loss": 3.5, "eval_accuracy": 0.5}
    name, files = put_checkpoint(run, {"x": b"1"}, attempt=1, step=1000)
    commit(run, CommitRecord(1000, 1, driver, "n", name, files, {"facts": facts}, "2026-01-01T00:00:00Z"))
    ranges: list[int] = []
    backend: Any = run._backend
    read_range = backend.read_range
    backend.read_range = lambda path, start, stop: ranges.append(stop - start) or read_range(path, start, stop)
    asked = calls(run, lambda: read_status(run))
    assert sum("metrics" in path for verb, path in asked if verb == "read") == len(ranges) == 1
    assert sum(ranges) <= 128 * 1024
    found = read_status(run)
    assert (found.step, found.metrics["eval_loss"], found.metrics["eval_accuracy"]) == (1900, 3.5, 0.5)
    more = JsonLinesWriter(run, f"metrics/a{attempt:06d}")
    more.add({"attempt": 1, "step": 1900, "eval_loss": 2.5})
    more.add({"attempt": 1, "step": 1901, "loss": 1.0})
    more.close()
    assert read_status(run).metrics["eval_loss"] == 2.5


def test_a_part_that_begins_with_an_evaluation_does_not_hide_the_step() -> None:
    run, _ = faulty()
    make_run(run, attempts=1)
    run.write("metrics/a000001-000001.jsonl", b'{"attempt": 1, "step": 5, "eval_loss": 2.0}\n')
    found = read_status(run)
    assert (found.step, found.metrics["loss"], found.metrics["eval_loss"]) == (5, 5.0, 2.0)
