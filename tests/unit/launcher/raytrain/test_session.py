"""Finding out whether a cluster answers, without a cluster: dialling and time are played."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from launcher.raytrain.environment import Environment
from launcher.raytrain.session import (
    ANSWER_WAIT_S,
    ROOT,
    await_answer,
    health_check_interval_s,
    locate_cluster,
    runtime_environment,
)
from launcher.raytrain.tasks import ray_map
from tests.support.played_time import PlayedTime
from tests.support.waiting import free_port
from trainer.errors import InputError


def test_workers_find_the_program_by_its_path_or_in_the_jobs_folder(tmp_path: Path) -> None:
    by_path = {"env_vars": {"PYTHONPATH": "p"}}
    job = {"RAY_JOB_CONFIG_JSON_ENV_VAR": "{}", "PYTHONPATH": "p"}
    assert runtime_environment({"PYTHONPATH": "p"}, ROOT) == by_path
    assert runtime_environment(job, ROOT) == {}
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
    time, calls = PlayedTime(), []

    def dial(found: str) -> None:
        calls.append(found)
        if len(calls) < 4:
            raise ConnectionRefusedError(111, "Connection refused")

    await_answer("head:6379", "10.0.0.1:6379", dial=dial, clock=time.clock, sleep=time.sleep)
    assert calls == ["10.0.0.1:6379"] * 4


def test_a_head_that_never_answers_is_given_up() -> None:
    time = PlayedTime()

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


@pytest.mark.parametrize(("workers", "interval_s"), [(1, 0.5), (80, 0.5), (160, 1.0), (1024, 6.4)])
def test_the_controller_of_many_workers_asks_them_less_often(workers: int, interval_s: float) -> None:
    assert health_check_interval_s(workers) == interval_s
