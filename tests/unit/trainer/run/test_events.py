"""Every event as a row and back, whatever version wrote it."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from tests.support.filled import filled, wrong_for
from tests.unit.trainer.run.test_malformed_run import EVENTS
from trainer.parsing import Malformed
from trainer.run.events import KINDS, Event, FailureEvent, HangEvent, Pulse, StartEvent, TextsEvent
from trainer.run.jsonl import plain

HEAD = {"attempt", "time", "writer", "row"}
WATCHING = Path(__file__).parents[4] / "docs" / "watching.md"


def own_fields(kind: type[Event]) -> dict[str, Any]:
    """The type of each field that the class adds to the head."""
    return {name: hint for name, hint in hints(kind).items() if name not in HEAD}


def hints(kind: type[Event]) -> dict[str, Any]:
    found = get_type_hints(kind)
    return {field.name: found[field.name] for field in dataclasses.fields(kind)}


def stored(event: Event) -> dict[str, Any]:
    row: dict[str, Any] = json.loads(json.dumps(plain(event.to_row())))
    return row


@pytest.mark.parametrize("kind", KINDS)
def test_an_event_is_read_as_it_was_written(kind: str) -> None:
    event = filled(KINDS[kind], row={})
    row = stored(event)
    assert list(row)[:4] == ["attempt", "event", "time", "writer"]
    assert set(row) == {"attempt", "event", "time", "writer", *own_fields(KINDS[kind])}
    assert row["event"] == kind
    back = Event.from_row(row)
    assert type(back) is KINDS[kind]
    assert back == event
    assert back.row == row


@pytest.mark.parametrize("kind", KINDS)
def test_an_old_row_lacks_fields_and_is_read(kind: str) -> None:
    event = Event.from_row({"event": kind})
    assert type(event) is KINDS[kind]
    assert (event.attempt, event.time, event.writer) == (0, 0.0, None)
    assert not any(getattr(event, name) for name in own_fields(KINDS[kind]))


@pytest.mark.parametrize("kind", KINDS)
def test_null_counts_as_missing(kind: str) -> None:
    nulls = dict.fromkeys([*own_fields(KINDS[kind]), "writer"])
    assert Event.from_row({"event": kind, **nulls}) == Event.from_row({"event": kind})


@pytest.mark.parametrize("name", ["attempt", "time"])
def test_the_place_of_an_event_is_never_null(name: str) -> None:
    with pytest.raises(Malformed, match=rf"^{name} is None"):
        Event.from_row({"event": "end", name: None})


@pytest.mark.parametrize("kind", KINDS)
def test_fields_that_are_not_known_are_kept_in_the_row_alone(kind: str) -> None:
    event = filled(KINDS[kind], row={})
    row = {**stored(event), "mood": {"a": [1]}}
    back = Event.from_row(row)
    assert back == event
    assert back.row["mood"] == {"a": [1]}
    assert "mood" not in back.to_row()


@pytest.mark.parametrize(
    ("kind", "field"),
    [
        (kind, field)
        for kind, one in KINDS.items()
        for field, hint in hints(one).items()
        if field != "row" and hint is not Any
    ],
)
def test_a_field_of_another_type_was_not_written_by_muster(kind: str, field: str) -> None:
    row = {**stored(filled(KINDS[kind], row={})), field: wrong_for(hints(KINDS[kind])[field])}
    with pytest.raises(Malformed, match=rf"^{field} is "):
        Event.from_row(row)


@pytest.mark.parametrize("row", [{}, {"event": None}, {"event": 3}, [], None, "start"])
def test_a_row_that_names_no_event_is_none(row: Any) -> None:
    with pytest.raises(Malformed):
        Event.from_row(row)


def test_an_event_of_a_newer_version_is_one_of_no_known_kind() -> None:
    row = {"event": "moved", "attempt": 2, "time": 5.0, "writer": "rank0", "to": [1]}
    event = Event.from_row(row)
    assert type(event) is Event
    assert (event.kind, event.attempt, event.time, event.row) == ("", 2, 5.0, row)


@pytest.mark.parametrize("row", EVENTS, ids=[row["event"] for row in EVENTS])
def test_the_names_that_runs_have_stored_are_those_of_the_fields(row: dict[str, Any]) -> None:
    assert row.keys() - {"event"} <= own_fields(KINDS[row["event"]]).keys()


def test_a_failure_has_its_place_even_where_that_is_not_known() -> None:
    unknown = dict.fromkeys(("rank", "host", "phase", "step"))
    event = FailureEvent(cause="died", trace="", advice="", retried=True, driver=None, **unknown)
    row = event.to_row()
    assert {name: row[name] for name in unknown} == unknown
    assert "driver" not in row


def test_examples_of_a_step_are_not_from_before_or_after_training() -> None:
    row = TextsEvent(step=3).to_row()
    assert row.keys().isdisjoint({"when", "seconds"})
    assert row["texts"] == []


def test_parts_of_an_event_are_plain_data() -> None:
    pulse = Pulse(rank=1, host="b", pid=7, step=3, phase="forward", stack="s")
    (rank,) = HangEvent(cause="c", ranks=(pulse,)).to_row()["ranks"]
    assert list(rank) == ["rank", "host", "pid", "step", "phase", "moves", "beat", "stack"]
    older = {name: rank[name] for name in ("rank", "host", "step", "phase")}
    read = Event.from_row({"event": "hang", "ranks": [older]})
    assert isinstance(read, HangEvent)
    assert read.ranks[0].place == pulse.place
    with pytest.raises(Malformed, match=r"ranks\.0\.phase is missing"):
        Event.from_row({"event": "hang", "ranks": [{"rank": 1, "host": "b", "step": 3}]})


@pytest.mark.parametrize(
    ("writer", "driver"),
    [
        ("driver12", 12),
        ("driver2-controller", 2),
        ("driver2-rank3", 2),
        ("rank0", None),
        ("drivers", None),
        (None, None),
    ],
)
def test_the_driver_that_wrote_an_event(writer: str | None, driver: int | None) -> None:
    assert StartEvent(step=0, writer=writer).writing_driver == driver


def test_the_documented_events_are_those_that_are_written() -> None:
    (section,) = re.findall(r"^## Events$(.*?)^## ", WATCHING.read_text(), re.MULTILINE | re.DOTALL)
    assert re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE) == list(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_each_class_says_who_writes_it_and_when(kind: str) -> None:
    assert re.search(r"\bwrites? it (when|once|after|before|at|for)\b", KINDS[kind].__doc__ or "")
