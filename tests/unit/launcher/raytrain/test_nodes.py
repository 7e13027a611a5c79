"""Nodes as Ray lists them, and those that answer."""

from __future__ import annotations

import re
import socket
from pathlib import Path

import pytest

from launcher.raytrain.nodes import answering, nodes_of_cluster
from tests.support.nodes import node

ROOT = Path(__file__).resolve().parents[4]


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
