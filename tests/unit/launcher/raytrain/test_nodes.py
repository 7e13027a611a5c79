"""How many workers nodes hold: whole ones only, where they may run, beside what others use."""

from __future__ import annotations

import re
import socket
from pathlib import Path
from typing import Any

import pytest

from launcher.raytrain.nodes import answering, nodes_of_cluster, room, suits, wanted, workers_that_fit
from tests.support.nodes import node, nodes
from trainer.recipe import ResourcesSection

ROOT = Path(__file__).resolve().parents[4]


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


def test_a_node_that_does_not_answer_is_not_counted() -> None:
    """Ray's head takes seconds to notice, and would place workers there."""
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_server(("127.0.0.1", 0)) as gone:
        there, left = server.getsockname()[1], gone.getsockname()[1]
        gone.close()
        have = [
            node(1, {"CPU": 1.0}, port=there),
            node(2, {"CPU": 1.0}, port=left),
            node(3, {"CPU": 1.0}, port=there, alive=False),
        ]
        local = [n.__class__(**{**vars(n), "address": "127.0.0.1"}) for n in have]
        assert [n.id for n in answering(local)] == ["n1"]
        assert answering([]) == []


def test_without_rays_private_tables_every_node_counts_as_free(monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"NodeID": "n1", "NodeManagerHostname": "a", "NodeManagerAddress": "10.0.0.1", "NodeManagerPort": 7}
    monkeypatch.setattr("ray.nodes", lambda: [row | {"Alive": True, "Resources": {"CPU": 2.0}}])
    monkeypatch.setattr("launcher.raytrain.nodes._private_tables", lambda: None)
    (found,) = nodes_of_cluster()
    assert (found.free, found.draining) == ({"CPU": 2.0}, False)


def test_one_file_alone_reads_private_tables_of_ray() -> None:
    private = re.compile(r"ray[a-z.]*\._(internal|private)")
    files = [path for folder in ("launcher", "trainer", "cluster") for path in (ROOT / folder).rglob("*.py")]
    assert [str(p.relative_to(ROOT)) for p in files if private.search(p.read_text())] == ["launcher/raytrain/nodes.py"]
