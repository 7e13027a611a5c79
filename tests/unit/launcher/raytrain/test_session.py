"""Finding out whether a cluster answers and has room, without a cluster: nodes, dialling and time are played."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher.raytrain.environment import Environment
from launcher.raytrain.session import (
    ANSWER_WAIT_S,
    JOIN_WAIT_S,
    RESOURCE_WAIT_S,
    ROOT,
    TRAIN_SETTINGS,
    await_answer,
    check_resources,
    locate_cluster,
    runtime_environment,
)
from launcher.raytrain.tasks import ray_map
from tests.support.nodes import nodes
from tests.support.waiting import free_port
from trainer.errors import InputError, Interrupted, StartAgain
from trainer.recipe import ResourcesSection


class Time:
    def __init__(self) -> None:
        self.now = 0.0

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def resources(**values: Any) -> ResourcesSection:
    return ResourcesSection.model_validate(values)


def check(asked: ResourcesSection, have: Callable[[], list[dict[str, float]]], **options: Any) -> Time:
    time = Time()
    check_resources(asked, nodes=lambda: nodes(*have()), clock=time.clock, sleep=time.sleep, **options)
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
    time = Time()
    with pytest.raises(InputError) as caught:
        check_resources(resources(workers=3), nodes=lambda: nodes({"CPU": 1.0}), clock=time.clock, sleep=time.sleep)
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
        check_resources(
            resources(gpus_per_worker=1), nodes=lambda: nodes({"CPU": 8.0}), timeout_s=0.0, sleep=pytest.fail
        )


def test_a_stop_ends_the_wait() -> None:
    with pytest.raises(Interrupted):
        check(resources(workers=9), lambda: [{"CPU": 1.0}], stopped=lambda: True)


def test_workers_find_the_program_by_its_path_or_in_the_jobs_folder(tmp_path: Path) -> None:
    by_path = {"env_vars": {"PYTHONPATH": "p", **TRAIN_SETTINGS}}
    job = {"RAY_JOB_CONFIG_JSON_ENV_VAR": "{}", "PYTHONPATH": "p"}
    assert runtime_environment({"PYTHONPATH": "p"}, ROOT) == by_path
    assert runtime_environment(job, ROOT) == {"env_vars": TRAIN_SETTINGS}
    assert runtime_environment(job, tmp_path) == by_path, "an installed muster, with a folder of recipes"


@pytest.mark.parametrize("address", ["ray://10.0.0.1:10001", "http://10.0.0.1:8265"])
def test_addresses_of_ray_that_cannot_be_joined(address: str) -> None:
    with pytest.raises(InputError, match=r"is not a cluster to join: give HOST:PORT .*`ray job submit"):
        locate_cluster(address)


def test_an_address_that_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(InputError, match="no Ray cluster answers at 'not an address'"):
        locate_cluster("not an address")


def test_a_head_that_is_just_starting_is_dialled_again() -> None:
    time, calls = Time(), []

    def dial(found: str) -> None:
        calls.append(found)
        if len(calls) < 4:
            raise ConnectionRefusedError(111, "Connection refused")

    await_answer("head:6379", "10.0.0.1:6379", dial=dial, clock=time.clock, sleep=time.sleep)
    assert calls == ["10.0.0.1:6379"] * 4


def test_a_head_that_never_answers_is_given_up() -> None:
    time = Time()

    def dial(found: str) -> None:
        raise TimeoutError("timed out")

    with pytest.raises(
        InputError, match=r"no Ray cluster answers at 'head:6379' \(timed out\): start one .*--on local"
    ):
        await_answer("head:6379", "10.0.0.1:6379", dial=dial, clock=time.clock, sleep=time.sleep)
    assert ANSWER_WAIT_S <= time.now < 30


def test_dialling_for_real() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        await_answer("x", f"127.0.0.1:{server.getsockname()[1]}")
    with pytest.raises(InputError, match="Connection refused"):
        await_answer("x", f"127.0.0.1:{free_port()}", timeout_s=0.0)


def test_a_single_job_is_mapped_in_this_process() -> None:
    results = ray_map(Environment({}, "/"))(lambda job: (job, os.getpid()), [7])
    assert list(results) == [(7, os.getpid())]


def test_the_environment_that_travels_shows_no_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret-77aa")
    monkeypatch.setenv("UNRELATED", "stays")
    environment = Environment.current()
    assert environment.variables["AWS_SECRET_ACCESS_KEY"] == "secret-77aa"
    assert "UNRELATED" not in environment.variables
    assert "secret-77aa" not in repr(environment)
