"""Where the seconds of made-up runs went: killed, resized, with clocks that disagree."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.monitor.goodput import (
    CHECKPOINT,
    COMPILING,
    EVALUATING,
    KINDS,
    LOST,
    STARTING,
    TRAINING,
    WAITING,
    Goodput,
    goodput_of,
)
from launcher.monitor.goodput import goodput as goodput_of_rows
from trainer.run import layout
from trainer.run.events import Event
from trainer.run.jsonl import JsonLinesWriter
from trainer.run.lease import Holder, LeaseRecord, to_row
from trainer.run.metrics import read_metrics_row
from trainer.storage import open_storage

Rows = list[dict[str, Any]]
SPENT = {"import": 2.0, "ray": 3.0, "data": 1.0, "workers": 4.0, "model": 5.0, "first_step": 3.0}


def goodput(events: Rows, rows: Rows, **more: Any) -> Goodput:
    return goodput_of_rows(map(Event.from_row, events), map(read_metrics_row, rows), **more)


def event(attempt: int, kind: str, time: float, **fields: Any) -> dict[str, Any]:
    return {"attempt": attempt, "event": kind, "time": time, **fields}


def trained(attempt: int, step: int, time: float, **fields: Any) -> dict[str, Any]:
    return {"attempt": attempt, "step": step, "time": time, "loss": 1.0, "step_s": 2.0, "stall_s": 0.0, **fields}


def one_attempt(number: int, first: int, last: int, at: float) -> tuple[Rows, Rows]:
    """Its command was given at ``at``; a step every 2 s, the first of them 18 s later."""
    events = [
        event(number, "start", at + 15, step=first - 1, build_s=4.0, restore_s=1.0),
        event(number, "startup", at + 18, seconds=SPENT, total_s=18.0),
    ]
    return events, [trained(number, step, at + 18 + 2 * (step - first)) for step in range(first, last + 1)]


def whole(found: Goodput) -> None:
    assert sum(found.seconds.values()) == pytest.approx(found.wall_s, abs=1e-6)
    assert all(a.end == b.begin for a, b in pairwise(found.pieces))
    assert all(piece.end > piece.begin for piece in found.pieces)
    assert sum(found.starting.values()) == pytest.approx(found.seconds[STARTING], abs=1e-6)


def seconds(found: Goodput) -> dict[str, float]:
    whole(found)
    return {kind: round(value, 6) for kind, value in found.seconds.items() if value > 1e-9}


def test_an_undisturbed_run() -> None:
    events, rows = one_attempt(1, 1, 4, 1000.0)
    rows[2] = trained(1, 3, 1022.5, stall_s=0.5)
    rows[3] = trained(1, 4, 1024.5)
    rows.append({"attempt": 1, "step": 4, "time": 1027.5, "eval_loss": 2.0, "eval_s": 3.0})
    events.append(event(1, "end", 1029.0, state="succeeded", step=4))
    found = goodput(events, rows)
    assert seconds(found) == {STARTING: 16.0, TRAINING: 8.0, CHECKPOINT: 2.0, EVALUATING: 3.0}
    assert found.wall_s == 29.0
    assert found.share == pytest.approx(8 / 29)
    assert found.starting == {**SPENT, "first_step": 1.0}
    assert set(found.to_json()["seconds"]) == set(KINDS)


def test_a_killed_run_loses_what_is_done_again() -> None:
    events, rows = one_attempt(1, 1, 5, 0.0)  # the last step ends at 26
    more, again = one_attempt(2, 4, 6, 40.0)  # from the checkpoint of step 3
    events += [event(1, "failure", 27.0, cause="killed"), *more, event(2, "end", 62.0, state="succeeded")]
    assert seconds(goodput(events, rows + again)) == {
        STARTING: 32.0,
        TRAINING: 2.0 * (3 + 3),
        LOST: 2.0 * 2 + 1.0,
        WAITING: 13.0,
    }


def test_a_driver_that_was_killed_leaves_no_event() -> None:
    events, rows = one_attempt(1, 1, 5, 0.0)
    rows.append({"attempt": 1, "step": 5, "time": 27.0, "eval_loss": 2.0, "eval_s": 1.0})
    more, again = one_attempt(2, 4, 6, 500.0)
    found = goodput(events + more, rows + again, until=530.0)
    assert seconds(found)[WAITING] == 500.0 - 27.0 + 530.0 - 522.0
    assert seconds(found)[LOST] == 2.0 * 2 + 1.0  # the evaluation of step 5 is done again, too


def test_a_resize_waits_for_the_commit_and_loses_nothing() -> None:
    events, rows = one_attempt(1, 1, 5, 0.0)
    more, again = one_attempt(2, 6, 7, 30.0)
    events += [event(1, "resize", 26.5, reason="a host has joined"), event(1, "end", 27.0, state="interrupted"), *more]
    assert seconds(goodput(events, rows + again)) == {STARTING: 32.0, TRAINING: 14.0, CHECKPOINT: 0.5, WAITING: 3.5}


def test_an_attempt_that_never_reached_a_step() -> None:
    events, rows = one_attempt(1, 1, 5, 0.0)
    events += [event(2, "start", 50.0, step=5, build_s=3.0, restore_s=2.0), event(2, "failure", 55.0, cause="killed")]
    assert seconds(goodput(events, rows)) == {STARTING: 26.0, TRAINING: 10.0, WAITING: 19.0}


def test_a_running_step_is_under_way_and_that_of_a_dead_driver_is_not() -> None:
    events, rows = one_attempt(1, 1, 5, 0.0)
    assert seconds(goodput(events, rows, until=29.0, running=True)) == {STARTING: 16.0, TRAINING: 13.0}
    assert seconds(goodput(events, rows, until=29.0)) == {STARTING: 16.0, TRAINING: 10.0, WAITING: 3.0}


def test_what_a_new_driver_does_is_nothing_of_the_old_ones_attempt() -> None:
    events, rows = one_attempt(1, 1, 5, 0.0)  # its driver was killed; the last step ends at 26
    events[0]["driver"] = 1
    before = {STARTING: 16.0, TRAINING: 10.0}
    assert seconds(goodput(events, rows, until=29.0, running=True, driver=1)) == {**before, TRAINING: 13.0}
    assert seconds(goodput(events, rows, until=500.0, running=True, driver=2)) == {**before, WAITING: 474.0}
    events.append(event(1, "end", 500.0, state="failed", writer="driver2"))
    assert seconds(goodput(events, rows, until=501.0, driver=2)) == {**before, WAITING: 475.0}
    events.append(event(1, "failure", 27.0, cause="killed", writer="driver1-controller"))
    assert seconds(goodput(events, rows, until=501.0, driver=2)) == {**before, LOST: 1.0, WAITING: 474.0}


def test_texts_after_the_last_step_are_no_checkpoint() -> None:
    events, rows = one_attempt(1, 1, 5, 0.0)  # to 26
    events.append(event(1, "texts", 29.0, step=5, when="after", seconds=2.5))
    events.append(event(1, "end", 30.0, state="succeeded"))
    assert seconds(goodput(events, rows)) == {STARTING: 16.0, TRAINING: 10.0, EVALUATING: 2.5, CHECKPOINT: 1.5}


def test_compiling_is_a_part_of_the_step() -> None:
    events, rows = one_attempt(1, 1, 5, 0.0)
    rows[0]["compile_s"], rows[1]["compile_s"], rows[1]["stall_s"] = 1.5, 9.0, 0.5
    assert seconds(goodput(events, rows)) == {STARTING: 16.0, COMPILING: 1.5 + 1.5, CHECKPOINT: 0.5, TRAINING: 6.5}


def test_the_driver_of_the_lease_is_the_one_that_was_heard_of(tmp_path: Path) -> None:
    run = open_storage(str(tmp_path))
    events, rows = one_attempt(1, 1, 5, 0.0)
    events[0]["driver"] = 1
    for prefix, told in ((layout.events_part(1, "rank0"), events), (layout.metrics_part(1), rows)):
        lines = JsonLinesWriter(run, prefix)
        for row in told:
            lines.add(row)
        lines.close()
    for driver, expected in ((1, 10.0 + 474.0), (2, 10.0)):
        holder = Holder("a", "boot/1", 4711, 1000.0, None)
        run.write_json(layout.LEASE, to_row(LeaseRecord(driver, "running", holder, 500.0, 7)))
        assert seconds(goodput_of(run, until=500.0, running=True))[TRAINING] == expected


def test_a_start_that_overlaps_the_attempt_before_gives_way() -> None:
    events, rows = one_attempt(1, 1, 5, 0.0)  # to 26
    more, again = one_attempt(2, 4, 6, 20.0)  # taken over: it started while the other still trained
    assert seconds(goodput(events + more, rows + again)) == {STARTING: 16.0 + 10.0, TRAINING: 12.0, LOST: 4.0}


def test_a_host_whose_clock_is_behind_loses_no_work() -> None:
    events, rows = one_attempt(1, 1, 5, 1000.0)
    more, again = one_attempt(2, 6, 8, 0.0)
    assert seconds(goodput(events + more, rows + again))[TRAINING] == 16.0


def test_rows_without_times_follow_from_their_seconds() -> None:
    rows = [trained(1, step, 0.0) for step in (1, 2, 3)]
    for row in rows:
        del row["time"]
    assert seconds(goodput([event(1, "start", 10.0, step=0, build_s=5.0, restore_s=0.0)], rows)) == {
        STARTING: 5.0,
        TRAINING: 6.0,
    }


def test_nothing_comes_to_nothing() -> None:
    assert goodput([], []).to_json()["wall_s"] == goodput([], []).share == 0.0
    assert goodput([event(0, "failure", 5.0, cause="no room")], []).pieces == ()


@given(
    st.lists(
        st.tuples(
            st.integers(1, 9), st.integers(0, 9), st.floats(-60, 90), st.sampled_from(["failure", "end", "", "resize"])
        ),
        min_size=1,
        max_size=6,
    ),
    st.booleans(),
)
def test_it_adds_up_whatever_happens(tries: list[tuple[int, int, float, str]], running: bool) -> None:
    events, rows, at = [], [], 1e9
    for number, (first, steps, gap, stop) in enumerate(tries, 1):
        more, again = one_attempt(number, first, first + steps - 1, at)
        events += more if steps else more[:1]
        rows += again
        at += 18 + 2 * steps + gap
        if stop:
            events.append(event(number, stop, at - gap / 2))
    whole(goodput(events, rows, until=at, running=running))
