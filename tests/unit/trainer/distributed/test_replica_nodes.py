"""Where replicas are: from the node of each rank, and from the workers per node."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from launcher.cli.submit import render
from launcher.cli.validate import validate
from launcher.replica_warnings import replica_warnings
from tests.support.training import small_recipe
from trainer.distributed.replica_nodes import (
    advice,
    fits_nodes,
    placement_text,
    placement_warning,
    replica_nodes,
    share_nodes,
)
from trainer.progress.texts import event_text
from trainer.recipe import Recipe
from trainer.recipe.strategies import Mesh
from trainer.run.events import Event, StartEvent


def recipe(workers: Any, replicas: int, **changes: Any) -> Recipe:
    changes |= {"resources.workers": workers, "strategy.kind": "fsdp", "strategy.replicas": replicas}
    return small_recipe("placed", Path("/model"), Path("/folder"), **changes)


def on(*counts: int) -> list[str]:
    """The node of each rank, node after node."""
    return [node for node, count in zip("abcdefgh", counts, strict=False) for _ in range(count)]


@pytest.mark.parametrize(
    ("mesh", "counts", "placed", "shared", "text"),
    [
        (Mesh(2, 4, 1), (4, 4), ("a", "b"), False, "2 replicas, each on one node"),
        (Mesh(4, 2, 1), (4, 4), ("a", "a", "b", "b"), False, "4 replicas, each on one node"),
        (Mesh(2, 2, 2), (2, 2, 2, 2), ("ab", "cd"), False, "2 replicas, each on 2 nodes"),
        (Mesh(2, 4, 1), (4, 2, 2), ("a", "bc"), False, "2 replicas, each on 1 to 2 nodes"),
        (Mesh(2, 2, 1), (4,), ("a", "a"), False, "2 replicas on one node"),
        (Mesh(2, 3, 1), (4, 2), ("a", "ab"), True, "2 replicas that share nodes, which is slow"),
        (Mesh(1, 8, 1), (4, 4), (), False, ""),
        (Mesh(8, 1, 1), (4, 4), (), False, ""),
    ],
)
def test_replicas_are_on_the_nodes_of_their_ranks(
    mesh: Mesh, counts: tuple[int, ...], placed: tuple[str, ...], shared: bool, text: str
) -> None:
    nodes = on(*counts)
    assert replica_nodes(mesh, nodes) == tuple(map(tuple, placed))
    assert share_nodes(placed) is shared
    assert placement_text(mesh, nodes).startswith(text)
    assert bool(text) == bool(placement_text(mesh, nodes))


@pytest.mark.parametrize("workers", [12, 16, 24, 48, 64])
@pytest.mark.parametrize("per_node", [1, 2, 3, 4, 6, 8])
def test_what_is_advised_leaves_no_node_shared_and_no_rank_with_more(workers: int, per_node: int) -> None:
    for replicas in (n for n in range(2, workers) if workers % n == 0):
        text = placement_warning(recipe(workers, replicas), workers, per_node)
        mesh = Mesh(replicas, workers // replicas, 1)
        whole = [per_node] * (workers // per_node) + [workers % per_node]
        nodes = [f"n{i}" for i, count in enumerate(whole) for _ in range(count)]
        assert (text is None) == fits_nodes(mesh.ranks_per_replica, per_node)
        if text is None:
            if workers % per_node == 0:
                assert not share_nodes(replica_nodes(mesh, nodes))
            continue
        assert f"strategy.replicas is {replicas}" in text
        better = int(advice(mesh, per_node).split()[3].rstrip(","))
        assert better < replicas
        assert placement_warning(recipe(workers, better), workers, per_node) is None


def test_the_recipes_settings_for_a_cluster_tell_how_many_workers_a_node_has() -> None:
    gpus = {"resources.gpus_per_worker": 1}
    assert list(replica_warnings(recipe(24, 4, **gpus))) == [], "nothing is known of the nodes"
    even = recipe(24, 4, **gpus, **{"cluster.slurm.gpus_per_node": 8})
    assert list(replica_warnings(even)) == [], "the job asks for nodes of six"
    (slurm,) = replica_warnings(recipe(24, 4, **gpus, **{"cluster.slurm.nodes": 3}))
    assert "on Slurm, strategy.replicas is 4, so that 6 of 24 workers are a replica, and a node has 8" in slurm
    assert "set strategy.replicas to 3" in slurm
    (pods,) = replica_warnings(recipe(24, 4, **gpus, **{"cluster.kubernetes.workers_per_pod": 4}))
    assert "on Kubernetes" in pods
    (scattered,) = replica_warnings(recipe(24, 4, **gpus), "kubernetes")
    assert "cluster.kubernetes.workers_per_pod is 1" in scattered
    assert "set it to 6" in scattered
    assert list(replica_warnings(recipe(24, 4, **gpus), "ray")) == []
    assert list(replica_warnings(recipe(24, 1, **gpus), "kubernetes")) == []


def test_validate_and_render_warn_and_say_the_rest_as_ever(capsys: pytest.CaptureFixture[str]) -> None:
    shipped, odd = "llama3_70b_qlora_hsdp", "cluster.kubernetes.workers_per_pod=6"
    validate([shipped])
    assert "warning" not in capsys.readouterr().err
    validate([shipped, odd])
    told = capsys.readouterr().err
    assert "warning: on Kubernetes, strategy.replicas is 8" in told
    assert f"ok  {shipped}" in told
    render(shipped, [odd], on="kubernetes")
    found = capsys.readouterr()
    assert found.err.count("warning: on Kubernetes") == 1
    assert "warning" not in found.out


def test_the_start_event_and_its_line_have_the_nodes_of_the_replicas() -> None:
    hosts = ("a", "a", "b", "b")
    strategy = {"kind": "fsdp", "mesh": Mesh(2, 2, 1).to_json()}
    event = StartEvent(attempt=1, step=0, hosts=hosts, replica_nodes=(("a",), ("b",)), strategy=strategy)
    assert event.to_row()["replica_nodes"] == [["a"], ["b"]]
    read = Event.from_row(event.to_row())
    assert isinstance(read, StartEvent)
    assert read.replica_nodes == (("a",), ("b",))
    assert event_text(read) == (
        "attempt 1: workers 2 on a, 2 on b, fsdp, 2 replicas, each on one node, from the first step"
    )
    for odd in ({}, {"replicas": "2", "shards": 2, "context": 1}, {"replicas": 10**9, "shards": 2, "context": 1}):
        stored = {**event.to_row(), "strategy": {"kind": "fsdp", "mesh": odd}}
        assert "replicas" not in str(event_text(Event.from_row(stored)))
