from __future__ import annotations

import json
import logging
import threading

import pytest

from tests.storage.doubles import faulty, unreachable
from tests.support.waiting import wait_for
from trainer.errors import StorageError
from trainer.run.events import EndEvent, ResizeEvent
from trainer.run.jsonl import Events, JsonLinesWriter, plain, read_rows, rows_backwards

LONG_S = 3600.0


def keys(storage: object) -> list[str]:
    return [o.key for o in storage.list()]  # type: ignore[attr-defined]


def test_rows_are_stored_within_the_interval_without_being_asked() -> None:
    storage, _ = faulty()
    lines = JsonLinesWriter(storage, "metrics/a000001", flush_s=0.01)
    lines.add({"step": 1, "loss": 2.5})
    assert wait_for(lambda: read_rows(storage, "metrics"), "the row") == [{"step": 1, "loss": 2.5}]
    lines.close()


def test_a_part_grows_in_place_and_no_row_comes_twice() -> None:
    storage, _ = faulty()
    lines = JsonLinesWriter(storage, "metrics/a000001", flush_s=LONG_S)
    for step in range(1, 6):
        lines.add({"step": step})
        assert lines.flush()
        assert [r["step"] for r in read_rows(storage, "metrics")] == list(range(1, step + 1))
    lines.close()
    assert keys(storage) == ["metrics/a000001-000000.jsonl"]


def test_full_parts_are_followed_by_new_ones() -> None:
    storage, _ = faulty()
    lines = JsonLinesWriter(storage, "metrics/a000001", flush_s=LONG_S, roll_rows=4)
    for step in range(10):
        lines.add({"step": step})
        if step % 3 == 0:
            lines.flush()
    lines.close()
    assert keys(storage) == [f"metrics/a000001-00000{i}.jsonl" for i in range(3)]
    assert [r["step"] for r in read_rows(storage, "metrics")] == list(range(10))
    assert [r["step"] for r in rows_backwards(storage, "metrics")] == list(range(9, -1, -1))


def test_parts_are_bounded_in_bytes_too() -> None:
    storage, backend = faulty()
    lines = JsonLinesWriter(storage, "ledger/a000001-r00000", flush_s=LONG_S)
    for step in range(30):
        lines.add({"step": step, "samples": ["0:" + "9" * 1000] * 100})
    lines.close()
    assert max(len(d) for d in backend.objects.values()) <= 512 * 1024
    assert len(read_rows(storage, "ledger")) == 30


def test_a_later_writer_of_the_same_prefix_overwrites_nothing() -> None:
    storage, _ = faulty()
    for value in (1, 2):
        lines = JsonLinesWriter(storage, "ledger/a000001-driver", flush_s=LONG_S)
        lines.add({"value": value})
        lines.close()
    other = JsonLinesWriter(storage, "ledger/a000001", flush_s=LONG_S)
    other.add({"value": 0})
    other.close()
    assert [r["value"] for r in read_rows(storage, "ledger")] == [0, 1, 2]


def test_a_first_writer_lists_nothing_of_the_others() -> None:
    storage, backend = faulty()
    asked: list[str] = []
    backend.before = lambda verb, path: asked.append(verb)
    lines = JsonLinesWriter(storage, "ledger/a000001-r01023", flush_s=LONG_S)
    lines.add({"step": 1})
    lines.close()
    assert asked == ["read", "put"]


def test_a_storage_that_is_down_costs_no_row(caplog: pytest.LogCaptureFixture) -> None:
    storage, backend = faulty(deadline_s=0.0)
    lines = JsonLinesWriter(storage, "metrics/a000001", flush_s=LONG_S, roll_rows=2)
    backend.before = unreachable
    for step in range(5):
        lines.add({"step": step})
    with caplog.at_level(logging.WARNING):
        assert not lines.flush()
    assert "not stored yet" in caplog.text
    with pytest.raises(StorageError):
        lines.flush(strict=True)
    backend.before = lambda verb, path: None
    assert lines.flush(strict=True)
    assert [r["step"] for r in read_rows(storage, "metrics")] == list(range(5))
    lines.close()


def test_close_raises_when_rows_are_left() -> None:
    storage, backend = faulty(deadline_s=0.0)
    lines = JsonLinesWriter(storage, "metrics/a000001", flush_s=LONG_S)
    backend.before = unreachable
    lines.add({"step": 1})
    with pytest.raises(StorageError, match="metrics"):
        lines.close()
    with pytest.raises(RuntimeError, match="was closed"):
        lines.add({"step": 2})
    assert not [t for t in threading.enumerate() if t.name == "rows metrics/a000001"]


def test_many_threads_add_whole_rows() -> None:
    storage, _ = faulty()
    lines = JsonLinesWriter(storage, "ledger/a000001", flush_s=0.001, roll_rows=7)
    threads = [threading.Thread(target=lambda t=t: [lines.add({"t": t, "i": i}) for i in range(50)]) for t in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lines.close()
    rows = read_rows(storage, "ledger")
    assert sorted((r["t"], r["i"]) for r in rows) == [(t, i) for t in range(4) for i in range(50)]


def test_values_become_what_json_has() -> None:
    import numpy as np

    row = {"a": float("nan"), "b": [float("inf"), 1], "c": (np.float32(0.5), np.int64(3)), "d": {"e": True, "f": None}}
    assert plain(row) == {"a": None, "b": [None, 1], "c": [0.5, 3], "d": {"e": True, "f": None}}
    assert json.dumps(plain(row), allow_nan=False)
    with pytest.raises(TypeError, match="JSON has no form"):
        plain({"a": object()})


def test_events_are_there_when_emit_returns() -> None:
    storage, _ = faulty()
    events = Events(storage, 3, "driver")
    events.emit(ResizeEvent(reason="c has joined", driver=2))
    (row,) = read_rows(storage, "events")
    assert row.pop("time") > 1.7e9
    assert row == {"attempt": 3, "event": "resize", "writer": "driver", "reason": "c has joined", "driver": 2}
    events.close()
    assert keys(storage) == ["events/a000003-driver-000000.jsonl"]


def test_events_do_not_decide_how_a_run_ends(caplog: pytest.LogCaptureFixture) -> None:
    storage, backend = faulty(deadline_s=0.0)
    backend.before = unreachable
    events = Events(storage, 1, "rank0")
    with caplog.at_level(logging.WARNING):
        events.emit(EndEvent(state="succeeded"))
        events.close()
    assert "'end' of attempt 1 is not stored yet" in caplog.text


def test_a_line_that_is_not_json_is_left_out() -> None:
    storage, _ = faulty()
    storage.write("metrics/a000001-000000.jsonl", b'{"step": 1}\n{"st')
    assert read_rows(storage, "metrics") == [{"step": 1}]
