"""When a run is resized, and when it ends for lack of nodes: nodes, workers and time are played."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from launcher.capacity import Node, missing
from launcher.driver.resize import (
    LONGEST_RESIZE_S,
    RESIZE_S,
    CurrentWorkers,
    Lost,
    NodeMonitor,
    Resize,
    ResizePolicy,
    newest_group,
)
from tests.support.nodes import node
from trainer.errors import StartAgain, StorageError
from trainer.recipe import ResourcesSection
from trainer.run.events import EndEvent, Event, ResizeEvent, SkippedCheckpointEvent, StartEvent
from trainer.run.failure import Failure
from trainer.run.jsonl import Events
from trainer.storage import open_storage

FULL = {"CPU": 0.0}


def lookout(workers: Any, patience_s: float = 60.0, multiple: int = 1) -> ResizePolicy:
    resources = ResourcesSection.model_validate({"workers": workers})
    return ResizePolicy(resources, lambda nodes: missing(resources, nodes), patience_s, multiple)


def busy(number: int, **changes: Any) -> Node:
    return node(number, {"CPU": 1.0}, FULL, **changes)


def group(*hosts: str, attempt: int = 1, since: float = 0.0) -> Callable[[], CurrentWorkers]:
    return lambda: CurrentWorkers(attempt, hosts, since)


def never() -> CurrentWorkers:
    raise AssertionError("the storage is read only when it matters")


def test_a_full_cluster_is_left_alone() -> None:
    look = lookout([1, 3])
    assert look.look([busy(1), busy(2)], never, 1000.0) is None


def test_room_that_stays_makes_the_run_grow() -> None:
    look, have = lookout([1, 3]), [busy(1), node(2, {"CPU": 1.0})]
    assert look.look(have, group("h1"), 1000.0) is None, "one look may be wrong"
    found = look.look(have, group("h1"), 1002.0)
    assert found == Resize("there is room for 2 workers instead of 1")
    assert look.look(have, group("h1"), 1004.0) is None, "asked once"


def test_room_for_a_part_of_the_ranks_that_compute_together_is_no_room() -> None:
    look = lookout([2, 8], multiple=2)
    for now in (1000.0, 1002.0):
        assert look.look([busy(1), node(2, {"CPU": 1.0})], never, now) is None
    more = [busy(1), node(2, {"CPU": 3.0})]
    look.look(more, group("h1", "h1"), 1004.0)
    assert look.look(more, group("h1", "h1"), 1006.0) == Resize("there is room for 4 workers instead of 2")


def test_a_run_that_is_fixed_or_has_all_it_wants_does_not_grow() -> None:
    have = [busy(1), node(2, {"CPU": 4.0})]
    fixed, full = lookout(1), lookout([1, 2])
    for now in (1000.0, 1002.0, 1004.0):
        assert fixed.look(have, never, now) is None
        assert full.look(have, group("h1", "h1"), now) is None


def test_workers_that_have_just_begun_are_left_to_train() -> None:
    look, have = lookout([1, 3]), [busy(1), node(2, {"CPU": 1.0})]
    young = group("h1", since=1000.0)
    assert look.look(have, young, 1001.0) is None
    assert look.look(have, young, 1000.0 + RESIZE_S - 1) is None
    assert isinstance(look.look(have, young, 1000.0 + RESIZE_S), Resize)


def test_gathering_in_vain_is_tried_less_and_less_often() -> None:
    look, have = lookout([1, 3]), [busy(1), node(2, {"CPU": 1.0})]
    now, waits = 1000.0, []
    look.look(have, group("h1"), now)
    for attempt in range(1, 12):
        began = now
        while look.look(have, group("h1", attempt=attempt, since=began), now) is None:
            now += 1.0
            assert now < began + 2 * LONGEST_RESIZE_S
        waits.append(now - began)
    assert waits[:4] == [RESIZE_S, 2 * RESIZE_S, 4 * RESIZE_S, 8 * RESIZE_S]
    assert max(waits) == LONGEST_RESIZE_S


def test_growth_that_came_makes_the_next_one_quick_again() -> None:
    look, have = lookout([1, 9]), [busy(1), node(2, {"CPU": 1.0})]
    look.look(have, group("h1"), 1000.0)
    assert look.look(have, group("h1"), 1000.0)
    grown = group("h1", "h2", attempt=2, since=2000.0)
    assert look.look(have, grown, 2000.0 + RESIZE_S - 1) is None
    assert look.look(have, grown, 2000.0 + RESIZE_S)


def test_workers_leave_a_node_that_will_be_taken_away() -> None:
    look = lookout([1, 2])
    have = [busy(1), busy(2, draining=True), busy(3, draining=True)]
    assert look.look(have, group("h1", "h2"), 5.0) == Resize("h2 (10.0.0.2) will be taken away")
    assert look.look(have, never, 7.0) is None, "told once"


def test_a_notice_for_other_nodes_or_before_the_start_gathers_nobody() -> None:
    have = [busy(1), busy(2, draining=True)]
    assert lookout([1, 2]).look(have, group("h1"), 5.0) is None
    look = lookout([1, 2])
    assert look.look(have, lambda: None, 5.0) is None
    assert look.look(have, group("h2", "h1"), 7.0), "the notice is not forgotten while workers start"


def test_too_few_nodes_for_too_long_end_the_run_and_are_named() -> None:
    look = lookout(2)
    have = [busy(1), busy(2, alive=False, lost="health check failed")]
    assert look.look(have, never, 100.0) is None
    assert look.look(have, never, 159.0) is None
    found = look.look(have, never, 160.0)
    assert isinstance(found, Lost)
    assert found.reason.startswith("lost h2 (10.0.0.2): health check failed. resources.workers asks for 2 workers")


def test_nodes_that_come_back_in_time_are_taken() -> None:
    look, short = lookout(2), [busy(1)]
    assert look.look(short, never, 100.0) is None
    assert look.look([busy(1), busy(2)], never, 150.0) is None
    assert look.look(short, never, 170.0) is None
    assert look.look(short, never, 229.0) is None
    assert isinstance(look.look(short, never, 230.0), Lost)


def watched(nodes: Callable[[], list[Node]], gathered: Callable[[str], None], look: Any) -> NodeMonitor:
    return NodeMonitor(look, nodes, never, gathered, clock=lambda: 0.0)


class Script:
    """Plays one answer after another, then says that it is through."""

    def __init__(self, *answers: Any) -> None:
        self._answers, self.through = list(answers), threading.Event()

    def look(self, nodes: Sequence[Node], group: Any, now: float) -> Any:
        answer = self._answers.pop(0) if self._answers else None
        if not self._answers:
            self.through.set()
        if isinstance(answer, Exception):
            raise answer
        return answer


def test_the_watch_acts_on_what_is_decided(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launcher.driver.resize.LOOK_S", 0.01)
    script, gathered = Script(Resize("room"), StorageError("away"), OSError("Ray is away"), Lost("too few")), []
    with watched(lambda: [], gathered.append, script) as watch:
        watch.check()
        assert script.through.wait(10)
        while watch._lost is None:
            threading.Event().wait(0.01)
        with pytest.raises(StartAgain, match="too few"):
            watch.check()
    assert gathered == ["room"]


def test_the_newest_workers_are_read_off_the_events(tmp_path: Any) -> None:
    run = open_storage(str(tmp_path))
    assert newest_group(run, 0) is None
    for attempt, hosts in ((1, ["a", "b"]), (2, ["b"])):
        events = Events(run, attempt, "rank0")
        events.emit(StartEvent(step=0, hosts=tuple(hosts)))
        events.emit(SkippedCheckpointEvent(step=3, uri="u", reason="torn"))
        events.close()
    found = newest_group(run, 1)
    assert found is not None
    assert (found.attempt, found.hosts) == (2, ("b",))
    assert newest_group(run, 2) is None


@pytest.mark.parametrize(
    "event", [Failure("x").event("", retried=True), ResizeEvent(reason="x", driver=1), EndEvent(state="failed")]
)
def test_workers_that_are_over_are_no_group(event: Event, tmp_path: Any) -> None:
    """What is asked of them now, those that come after them would not hear."""
    run = open_storage(str(tmp_path))
    for attempt, writer, told in ((1, "rank0", StartEvent(step=0, hosts=("a",))), (1, "driver1-resize", event)):
        events = Events(run, attempt, writer)
        events.emit(told)
        events.close()
    assert newest_group(run, 0) is None
    events = Events(run, 2, "rank0")
    events.emit(StartEvent(step=0, hosts=("b",)))
    events.close()
    found = newest_group(run, 0)
    assert found is not None
    assert found.hosts == ("b",)
