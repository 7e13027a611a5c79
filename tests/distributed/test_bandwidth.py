"""The bandwidth inside and across replicas, measured by four processes that play doctor's probes."""

from __future__ import annotations

import json
import multiprocessing as mp
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from launcher.doctor.collectives import Call, Calls, groups_of, measure_groups, network_option
from launcher.doctor.diagnosis import diagnose
from launcher.doctor.observations import GroupBandwidth
from launcher.doctor.probes import measure_bandwidth, open_store
from launcher.doctor.report import tables, to_json
from launcher.plan.units import bandwidths
from tests.unit.launcher.doctor.test_diagnosis import cluster
from trainer.recipe.strategies import Mesh

ADDRESS = "127.0.0.1"
RANKS = 4


def _serve(connection: Any) -> None:
    """A probe: answers one call after the other, until it is told None."""
    store: Any = None
    while (asked := connection.recv()) is not None:
        method, arguments = asked
        if method == "open_store":
            store = store or open_store(ADDRESS, 20)
            connection.send(store.port)
        elif method == "bandwidth":
            name, at, rank, size, gpu, timeout_s = arguments
            connection.send(measure_bandwidth(name, at or store, rank, size, gpu=gpu, timeout_s=timeout_s))
        elif method == "hang":
            time.sleep(60)
        else:
            import torch.distributed  # noqa: F401

            connection.send(0.0)


class Probes:
    """Four processes. A rank whose process is gone, or that does not answer in time, is an error of the call."""

    def __init__(self) -> None:
        context = mp.get_context("spawn")
        pipes = [context.Pipe() for _ in range(RANKS)]
        self.pipes = [ours for ours, _ in pipes]
        self.processes = [context.Process(target=_serve, args=(theirs,)) for _, theirs in pipes]
        for process in self.processes:
            process.start()
        self._gather(dict.fromkeys(range(RANKS), ("clock", ())), 60)

    def _gather(self, calls: Calls, timeout_s: float) -> tuple[dict[int, Any], dict[int, str]]:
        answers, errors, deadline = dict[int, Any](), dict[int, str](), time.monotonic() + timeout_s
        for rank, call in calls.items():
            try:
                self.pipes[rank].send(call)
            except OSError:
                errors[rank] = "the probe has ended"
        for rank in calls.keys() - errors.keys():
            try:
                if self.pipes[rank].poll(max(0.0, deadline - time.monotonic())) and self.processes[rank].is_alive():
                    answers[rank] = self.pipes[rank].recv()
                    continue
            except EOFError:
                pass
            errors[rank] = "no answer"
        return answers, errors

    def call(self) -> Call:
        return self._gather

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join(20)


@contextmanager
def probes() -> Iterator[Probes]:
    made = Probes()
    try:
        yield made
    finally:
        made.close()


def measured(made: Probes, mesh: Mesh) -> list[GroupBandwidth]:
    addresses = dict.fromkeys(range(mesh.ranks), ADDRESS)
    return measure_groups(mesh, addresses, made.call(), lambda limit_s: limit_s, gpu=False)


def test_both_axes_are_measured_and_a_dead_rank_is_named() -> None:
    mesh = Mesh(replicas=2, shards=2, context=1)
    with probes() as made:
        begin = time.monotonic()
        found = measured(made, mesh)
        assert time.monotonic() - begin < 20
        assert [(group.axis, group.ranks) for group in found] == [
            ("inside", (0, 1)),
            ("inside", (2, 3)),
            ("across", (0, 2)),
            ("across", (1, 3)),
        ]
        for group in found:
            assert group.error is None, group
            assert group.bandwidth is not None
            assert group.bandwidth.backend == "gloo"
            assert 0 < group.bandwidth.all_reduce_bytes_per_s < 1e12
            assert 0 < group.bandwidth.all_gather_bytes_per_s < 1e12
        seen = cluster(RANKS)
        seen.mesh, seen.groups = mesh, found
        assert diagnose(seen) == []
        option = network_option(found)
        assert option is not None
        inside, across = bandwidths(option)
        assert inside == pytest.approx(min(rate_of(group) for group in found[:2]), rel=0.01)
        assert across == pytest.approx(min(rate_of(group) for group in found[2:]), rel=0.01)
        assert json.loads(json.dumps(to_json(seen, [])))["network"] == option

        made.processes[3].kill()
        made.processes[3].join(20)
        begin = time.monotonic()
        rest = measured(made, mesh)
        assert time.monotonic() - begin < 20
        assert [group.bandwidth is not None for group in rest] == [True, False, True, False]
        seen.groups = rest
        (finding,) = diagnose(seen)
        assert (finding.level, finding.where) == ("failure", "rank 3 on h3 (10.0.0.3)")
        assert "inside a replica, with ranks 2, 3: the probe has ended" in finding.what
        assert list(tables(seen, [finding]))
        assert network_option(rest) is not None, "one group of each axis is left"


def test_a_rank_that_hangs_is_waited_for_a_bounded_time_and_named() -> None:
    mesh = Mesh(replicas=1, shards=3, context=1)
    with probes() as made:

        def stuck(calls: Calls, timeout_s: float) -> tuple[dict[int, Any], dict[int, str]]:
            changed = {r: ("hang", ()) if r == 1 and call[0] == "bandwidth" else call for r, call in calls.items()}
            return made.call()(changed, timeout_s)

        begin = time.monotonic()
        (group,) = measure_groups(mesh, dict.fromkeys(range(3), ADDRESS), stuck, lambda s: s, gpu=False)
        assert time.monotonic() - begin < 20
        assert (group.axis, group.ranks, list(group.silent)) == ("all", (0, 1, 2), [1])
        assert network_option([group]) is None
        seen = cluster(3)
        seen.groups = [group]
        (finding,) = diagnose(seen)
        assert finding.where == "rank 1 on h1 (10.0.0.1)"


def rate_of(group: GroupBandwidth) -> float:
    assert group.bandwidth is not None
    return min(group.bandwidth.all_reduce_bytes_per_s, group.bandwidth.all_gather_bytes_per_s)


def test_the_groups_of_a_mesh() -> None:
    assert groups_of(Mesh(1, 1, 1)) == {}
    assert groups_of(Mesh(1, 4, 1)) == {"all": [(0, 1, 2, 3)]}
    assert groups_of(Mesh(4, 1, 1)) == {"all": [(0, 1, 2, 3)]}
    found = groups_of(Mesh(2, 1, 2))
    assert found == {"inside": [(0, 1), (2, 3)], "across": [(0, 2), (1, 3)]}
