"""How many workers nodes hold: whole ones only, where they may run, beside what others use; and what is missing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from launcher.capacity import (
    JOIN_WAIT_S,
    RESOURCE_WAIT_S,
    check_resources,
    room,
    suits,
    wanted,
    workers_that_fit,
)
from tests.support.nodes import node, nodes
from tests.support.played_time import PlayedTime
from trainer.errors import InputError, Interrupted, StartAgain
from trainer.recipe import ResourcesSection


def resources(**values: Any) -> ResourcesSection:
    return ResourcesSection.model_validate(values)


def test_no_worker_is_split_over_two_nodes() -> None:
    have = nodes({"CPU": 3.0, "GPU": 1.0, "memory": 1e9}, {"CPU": 5.0})
    assert workers_that_fit(resources(cpus_per_worker=2), have) == 3
    assert workers_that_fit(resources(cpus_per_worker=1, gpus_per_worker=1), have) == 1
    assert workers_that_fit(resources(cpus_per_worker=6), have) == 0
    assert workers_that_fit(resources(), []) == 0


def test_wanted_is_for_the_least_number_of_workers() -> None:
    assert wanted(resources(workers=[2, 8], gpus_per_worker=4, cpus_per_worker=3)) == {"CPU": 6.0, "GPU": 8.0}
    assert wanted(resources(workers=2)) == {"CPU": 2.0}


@pytest.mark.parametrize(
    ("changes", "asked", "right"),
    [
        ({}, {}, True),
        ({"alive": False}, {}, False),
        ({"draining": True}, {}, False),
        ({}, {"accelerator_type": "A100"}, False),
        ({"total": {"CPU": 1.0, "accelerator_type:A100": 1.0}}, {"accelerator_type": "A100"}, True),
        ({}, {"labels": {"zone": "a"}}, False),
        ({"labels": {"zone": "b"}}, {"labels": {"zone": "a"}}, False),
        ({"labels": {"zone": "a", "tier": "spot"}}, {"labels": {"zone": "a"}}, True),
        ({"labels": {"zone": "b"}}, {"labels": {"zone": "!a"}}, True),
    ],
)
def test_where_a_worker_may_run(changes: dict[str, Any], asked: dict[str, Any], right: bool) -> None:
    total = changes.pop("total", {"CPU": 1.0})
    assert suits(resources(**asked), node(1, total, **changes)) is right


def test_room_is_what_is_free_and_what_the_run_holds_itself() -> None:
    """A worker that died still holds its place; another job's places are not ours."""
    have = [node(1, {"CPU": 4.0}, {"CPU": 1.0}), node(2, {"CPU": 4.0}, {"CPU": 0.0}), node(3, {"CPU": 4.0}, {})]
    asked = resources(workers=[1, 9], cpus_per_worker=2)
    assert room(asked, have, {}) == 0
    assert room(asked, have, {"n1": 1, "n2": 1}) == 2
    assert room(asked, [node(1, {"CPU": 4.0}, {"CPU": 0.0}, alive=False)], {"n1": 2}) == 0


def check(asked: ResourcesSection, have: Callable[[], list[dict[str, float]]], **options: Any) -> PlayedTime:
    time = PlayedTime()
    check_resources(asked, lambda: nodes(*have()), clock=time.clock, sleep=time.sleep, **options)
    return time


def refusal(asked: ResourcesSection, *have: dict[str, float]) -> str:
    with pytest.raises(InputError) as caught:
        check(asked, lambda: list(have))
    return str(caught.value)


def test_enough_is_enough_at_once() -> None:
    assert check(resources(workers=[2, 9]), lambda: [{"CPU": 2.0}]).now == 0


def test_nodes_that_a_scheduler_has_given_are_waited_for() -> None:
    """An elastic run does not begin with the first of them, and a slow file system is no lack of nodes."""
    asked = resources(workers=[1, 2])
    joined: list[dict[str, float]] = [{"CPU": 1.0}]

    def joining() -> list[dict[str, float]]:
        if len(ticks := times) > 60 and len(joined) < 2:
            joined.append({"CPU": 1.0})
        ticks.append(0)
        return joined

    times: list[int] = []
    assert RESOURCE_WAIT_S < check(asked, joining, expected_nodes=2).now < JOIN_WAIT_S
    assert check(asked, lambda: [{"CPU": 1.0}], expected_nodes=2).now >= JOIN_WAIT_S
    assert check(asked, lambda: [{"CPU": 1.0}] * 2, expected_nodes=3).now == 0


def test_a_node_that_was_given_and_does_not_come_up_is_no_mistake_of_the_recipe() -> None:
    """Another start of the job gets other nodes; too small a job gets no better."""
    with pytest.raises(StartAgain, match=r"1 of 2 nodes came up within 300 s: resources.workers asks for 2"):
        check(resources(workers=2), lambda: [{"CPU": 1.0}], expected_nodes=2)
    with pytest.raises(InputError):
        check(resources(workers=3), lambda: [{"CPU": 1.0}] * 2, expected_nodes=2)


def test_a_cluster_that_grows_is_waited_for() -> None:
    have: list[dict[str, float]] = []

    def growing() -> list[dict[str, float]]:
        have.append({"CPU": 1.0})
        return have

    assert 0 < check(resources(workers=5), growing).now < RESOURCE_WAIT_S


def test_what_is_missing_is_said_within_a_minute() -> None:
    time = PlayedTime()
    with pytest.raises(InputError) as caught:
        check_resources(resources(workers=3), lambda: nodes({"CPU": 1.0}), clock=time.clock, sleep=time.sleep)
    assert str(caught.value) == (
        "resources.workers asks for 3 workers with 1 CPU each, and the cluster has room for 1 (1 node with 1 CPU in "
        "all; missing: 2 CPUs): add nodes, or lower resources.workers"
    )
    assert time.now < 50


def test_only_settings_that_can_be_lowered_are_named() -> None:
    text = refusal(resources(gpus_per_worker=1), {"CPU": 8.0})
    assert "1 worker with 1 CPU and 1 GPU each" in text
    assert "missing: 1 GPU)" in text
    assert text.endswith("lower resources.gpus_per_worker (0 trains on CPUs)")


def test_enough_in_all_but_on_no_single_node() -> None:
    text = refusal(resources(workers=1, cpus_per_worker=4), {"CPU": 3.0}, {"CPU": 3.0})
    assert "no single node has enough" in text
    assert "missing" not in text


def test_a_machine_of_ones_own_is_not_waited_for() -> None:
    with pytest.raises(InputError):
        check_resources(resources(gpus_per_worker=1), lambda: nodes({"CPU": 8.0}), timeout_s=0.0, sleep=pytest.fail)


def test_a_stop_ends_the_wait() -> None:
    with pytest.raises(Interrupted):
        check(resources(workers=9), lambda: [{"CPU": 1.0}], stopped=lambda: True)
