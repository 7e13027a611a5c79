"""Room for inference servers beside the workers: the most workers that any placing leaves, and what is missing."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from launcher.capacity import Servers, arrange, check_resources, missing, places, room, wanted, workers_that_fit
from launcher.driver.attempts import SETTLE_S, WorkerCount
from launcher.driver.resize import CurrentWorkers, Resize, ResizePolicy
from tests.support.nodes import node, nodes
from trainer.errors import InputError
from trainer.recipe import Recipe, ResourcesSection


def resources(**values: Any) -> ResourcesSection:
    return ResourcesSection.model_validate(values)


def gpus(count: int, gpus: int, cpus: int = 1) -> Servers:
    return Servers(count, {"CPU": float(cpus), "GPU": float(gpus)})


def every_placing(servers: Servers, have: Sequence[dict[str, float]]) -> Iterator[tuple[int, ...]]:
    for counts in itertools.product(range(servers.count + 1), repeat=len(have)):
        fits = all(servers.each[k] * n <= node[k] for n, node in zip(counts, have, strict=True) for k in servers.each)
        if sum(counts) == servers.count and fits:
            yield counts


def beside(asked: ResourcesSection, servers: Servers, have: Sequence[dict[str, float]], counts: Sequence[int]) -> int:
    return sum(
        places(asked, {k: amount - n * servers.each[k] for k, amount in node.items()})
        for n, node in zip(counts, have, strict=True)
    )


def test_no_placing_of_servers_leaves_room_for_more_workers() -> None:
    """Against all placings, on small random clusters."""
    draw = random.Random(1)
    impossible = 0
    for _ in range(300):
        have = [{"CPU": float(draw.randint(0, 9)), "GPU": float(draw.randint(0, 5))} for _ in range(draw.randint(1, 4))]
        asked = resources(gpus_per_worker=draw.randint(1, 3), cpus_per_worker=draw.randint(1, 3))
        servers = gpus(draw.randint(1, 3), draw.randint(1, 3), draw.randint(1, 3))
        best = max((beside(asked, servers, have, counts) for counts in every_placing(servers, have)), default=None)
        found = arrange(asked, servers, have)
        if best is None:
            impossible += 1
            assert found is None
            continue
        assert found is not None
        assert found.workers == best == beside(asked, servers, have, found.servers)
        assert found.servers in set(every_placing(servers, have))
    assert 30 < impossible < 270


def test_servers_go_where_they_take_no_worker_its_place() -> None:
    """A node with an odd GPU holds the server, and a worker keeps its two on each."""
    have = [{"CPU": 8.0, "GPU": 2.0}, {"CPU": 8.0, "GPU": 3.0}]
    found = arrange(resources(gpus_per_worker=2), gpus(1, 1), have)
    assert found is not None
    assert (found.workers, found.servers) == (2, (0, 1))


def test_room_counts_servers_that_have_to_be_placed_and_not_those_that_run() -> None:
    asked, servers = resources(workers=[1, 8], gpus_per_worker=1), gpus(2, 2)
    idle = nodes({"CPU": 8.0, "GPU": 4.0}, {"CPU": 8.0, "GPU": 4.0})
    assert room(asked, idle, {}, servers) == workers_that_fit(asked, idle, servers) == 4
    busy = [node(0, {"CPU": 8.0, "GPU": 4.0}, {"CPU": 3.0, "GPU": 1.0})]
    assert room(asked, busy, {}) == 1
    assert room(asked, busy, {}, servers) == 0


def test_what_is_wanted_and_missing_names_the_servers() -> None:
    asked, servers = resources(workers=2, gpus_per_worker=1), gpus(2, 2)
    assert wanted(asked, servers) == {"CPU": 4.0, "GPU": 6.0}
    assert missing(asked, nodes({"CPU": 8.0, "GPU": 4.0}), servers) == (
        "resources.workers asks for 2 workers with 1 CPU and 1 GPU each, rollout.vllm.servers for 2 servers with 1 CPU "
        "and 2 GPUs each, and the cluster has room for 2 servers and 0 workers (1 node with 8 CPUs and 4 GPUs in all; "
        "missing: 2 GPUs): add nodes, or lower resources.workers or rollout.vllm.servers (null places them on the "
        "training's GPUs) or rollout.vllm.tensor_parallel or resources.gpus_per_worker (0 trains on CPUs)"
    )
    split = nodes(*[{"CPU": 8.0, "GPU": 1.0}] * 8)
    assert "no single node has enough for one more server" in missing(asked, split, servers)
    with pytest.raises(InputError, match="room for 2 servers and 0 workers"):
        check_resources(asked, lambda: nodes({"CPU": 8.0, "GPU": 4.0}), servers=servers, timeout_s=0.0)
    check_resources(asked, lambda: nodes({"CPU": 8.0, "GPU": 6.0}), servers=servers, timeout_s=0.0)


def test_an_attempt_gets_the_workers_that_fit_beside_its_servers() -> None:
    decides = WorkerCount(resources(workers=[1, 8], gpus_per_worker=1), 0.0, 1, gpus(1, 3))
    assert decides.decide(nodes({"CPU": 8.0, "GPU": 8.0}), 0.0) == 5
    settling = [node(0, {"CPU": 8.0, "GPU": 8.0}, {"CPU": 8.0, "GPU": 6.0})]
    assert decides.decide(settling, 1.0) is None, "a server that has just ended may count as used"
    assert decides.decide(settling, SETTLE_S) == 3


def test_a_run_grows_into_what_its_servers_leave() -> None:
    """During an attempt they hold their GPUs, which are not free."""
    asked = resources(workers=[1, 8], gpus_per_worker=1)
    policy = ResizePolicy(asked, lambda nodes: "", servers=gpus(1, 2))
    group = CurrentWorkers(1, ("h0", "h0"), 0.0)
    now = [node(0, {"CPU": 8.0, "GPU": 5.0}, {"CPU": 5.0, "GPU": 1.0})]
    assert policy.look(now, lambda: group, 1000.0) is None
    assert policy.look(now, lambda: group, 1002.0) == Resize("there is room for 3 workers instead of 2")
    full = [node(0, {"CPU": 8.0, "GPU": 4.0}, {"CPU": 5.0, "GPU": 0.0})]
    policy = ResizePolicy(asked, lambda nodes: "", servers=gpus(1, 2))
    assert [policy.look(full, lambda: group, now) for now in (1000.0, 1002.0)] == [None, None]


def test_a_node_with_a_server_that_will_be_taken_away_is_left_in_time() -> None:
    policy = ResizePolicy(resources(workers=2), lambda nodes: "", servers=Servers(1, {"CPU": 1.0}))
    group = CurrentWorkers(1, ("h0", "h0"), 0.0)
    there = node(0, {"CPU": 4.0})
    assert policy.look([there, node(1, {"CPU": 4.0}, draining=True)], lambda: group, 1.0) is None
    serving = node(2, {"CPU": 4.0}, draining=True, serves=True)
    found = policy.look([there, serving], lambda: group, 2.0)
    assert found == Resize("h2 (10.0.0.2) will be taken away")


@pytest.mark.parametrize(
    ("changes", "count", "each"),
    [
        ({"servers": None}, 0, {"CPU": 3.0}),
        ({"servers": 2, "tensor_parallel": 4}, 2, {"CPU": 3.0}),
    ],
)
def test_a_recipe_asks_for_servers(
    changes: dict[str, Any], count: int, each: dict[str, float], make_recipe: Any
) -> None:
    found = Servers.of(make_recipe(0, **changes))
    assert (found.count, dict(found.each)) == (count, each)
    found = Servers.of(make_recipe(2, **changes))
    assert found.each["GPU"] == changes.get("tensor_parallel", 1)
    assert len(found.bundles) == count


@pytest.fixture
def make_recipe(tmp_path: Any) -> Any:
    from tests.support.tasks import task_recipe

    def make(gpus_per_worker: int, **vllm: Any) -> Recipe:
        changes = {
            "rollout": {"engine": "vllm", "vllm": {"python": "/opt/vllm/bin/python", **vllm}},
            "resources": {"workers": 2, "cpus_per_worker": 3, "gpus_per_worker": gpus_per_worker},
        }
        return task_recipe("grpo", "asks", tmp_path, tmp_path, **changes)

    return make
