"""What doctor makes of what it saw: no process is started."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest

from cluster.ray_nodes import NODE_SETTINGS
from launcher.doctor.diagnosis import diagnose
from launcher.doctor.findings import Finding, verdict
from launcher.doctor.observations import (
    Clock,
    Examination,
    GroupBandwidth,
    Inputs,
    NodeObservation,
    Pair,
    RankObservation,
    Room,
    Silent,
    Wanted,
)
from launcher.doctor.pairing import representatives, rounds
from launcher.doctor.probe_placement import in_order
from launcher.doctor.probes import Bandwidth, Computed, Gpu, HostFacts, Memory, PairTimes, RoundTrip, Space, Timing
from launcher.doctor.report import tables, to_json
from launcher.doctor.stages import Time, worse
from trainer.recipe.strategies import Mesh

GIB = 2**30
FINE = PairTimes((Timing("gloo", 0.01, 150.0, 0.8),))
FAILED = PairTimes((), "timed out", "connect")
GPU = Gpu(0, "GPU-1", "H100", 80 * GIB, 79 * GIB, driver="550", temperature_c=40, ecc_errors=0)


def facts(number: int) -> HostFacts:
    disk = Space("/tmp", 100 * GIB, 50 * GIB)
    versions: dict[str, str | None] = {"python": "3.11.7", "torch": "2.13.0", "ray": "2.60.0", "deepspeed": None}
    disks = {"temporary": disk, "storage": disk}
    memory, shared = Memory(64 * GIB, 60 * GIB), Space("/dev/shm", 8 * GIB, 8 * GIB)
    return HostFacts(f"h{number}", 100 + number, 8, versions, (), memory, disks, shared, 0.0)


def cluster(hosts: int = 3) -> Examination:
    """One rank on each host; all is well."""
    addresses = [f"10.0.0.{i}" for i in range(hosts)]
    nodes = [NodeObservation(f"n{i}", f"h{i}", a, alive=True, answers=True) for i, a in enumerate(addresses)]
    ranks = [
        RankObservation(
            i, f"n{i}", a, (), facts(i), "disabled", dict(NODE_SETTINGS) if i == 0 else None, Clock(0.001, 0.001)
        )
        for i, a in enumerate(addresses)
    ]
    pairs = [Pair(p, FINE) for p in combinations(range(hosts), 2)]
    return Examination("10.0.0.0:6379", None, "disabled", nodes, None, ranks, [], pairs)


def with_recipe(seen: Examination, **changes: Any) -> Examination:
    wanted = Wanted("r", "/shared/runs", True, 0, len(seen.ranks), 3)
    seen.wanted = replace(wanted, **changes)
    for rank in seen.ranks:
        rank.storage = RoundTrip(seen.wanted.storage, {"put": 0.01, "delete": 0.01}, conditional=True)
        rank.model_error = ""
    seen.inputs = Inputs()
    seen.room = Room(True, (GIB,) * len(seen.ranks), (GIB,) * len(seen.ranks), GIB)
    return seen


def told(seen: Examination) -> list[Finding]:
    """The findings; whatever they are, they can be shown."""
    findings = diagnose(seen)
    assert json.loads(json.dumps(to_json(seen, findings)))["verdict"] == verdict(findings)
    assert list(tables(seen, findings))
    assert all(f.what and f.where and f.do for f in findings)
    return findings


def only(seen: Examination, level: str) -> Finding:
    (finding,) = told(seen)
    assert finding.level == level, finding
    return finding


def change(rank: RankObservation, **changes: Any) -> None:
    rank.facts = replace(rank.facts, **changes)


@pytest.mark.parametrize("hosts", [1, 2, 3, 8])
def test_a_sound_cluster_is_ready(hosts: int) -> None:
    assert told(cluster(hosts)) == []
    assert told(with_recipe(cluster(hosts))) == []


GONE = {
    "cut off, and Ray has not noticed": (True, False, "timed out", None, False),
    "dead": (False, None, "health check failed", 12.0, False),
    "dead, and Ray does not say since when": (False, None, "", None, False),
}


@pytest.mark.parametrize("case", GONE)
def test_a_host_that_is_gone_is_named(case: str) -> None:
    seen = cluster(3)
    alive, answers, reason, dead_for_s, expected = GONE[case]
    seen.nodes = [*seen.nodes, NodeObservation("n9", "h9", "10.0.0.9", alive, answers, reason, expected, dead_for_s)]
    finding = only(seen, "failure")
    assert finding.where == "h9 (10.0.0.9)"
    assert reason in finding.what


def test_a_node_that_came_back_or_was_taken_away_is_no_news() -> None:
    seen = cluster(3)
    died = NodeObservation("n8", "h0", "10.0.0.0", False, reason="restarted")
    taken = NodeObservation("n9", "h9", "10.0.0.9", False, expected=True)
    seen.nodes = [*seen.nodes, died, taken]
    assert told(seen) == []
    assert [h["address"] for h in to_json(seen, [])["hosts"]] == ["10.0.0.0", "10.0.0.1", "10.0.0.2"]


def test_a_dead_host_is_a_warning_when_it_died_long_ago_or_the_workers_have_places_elsewhere() -> None:
    seen, spared = cluster(3), with_recipe(cluster(3))
    seen.nodes = [*seen.nodes, NodeObservation("n9", "h9", "10.0.0.9", False, dead_for_s=7200.0)]
    only(seen, "warning")
    spared.nodes = [*spared.nodes, NodeObservation("n9", "h9", "10.0.0.9", False, dead_for_s=5.0)]
    only(spared, "warning")


def test_a_silent_host_is_named_once() -> None:
    seen = cluster(3)
    seen.silent = [Silent("h1 (10.0.0.1)", "10.0.0.1", stage, "no answer within 9 s") for stage in ("a", "b")]
    assert only(seen, "failure").where == "h1 (10.0.0.1)"


def test_a_host_without_muster_is_told_to_install_it() -> None:
    seen = cluster(2)
    seen.silent = [Silent("h9", "10.0.0.9", "starting a probe", "ModuleNotFoundError: No module named 'launcher'")]
    assert "install the same muster" in only(seen, "failure").do


def test_no_host_at_all() -> None:
    assert verdict(told(Examination("10.0.0.0:6379"))) == "not ready"


@pytest.mark.parametrize("hosts", [3, 4, 7])
def test_a_host_all_of_whose_pairs_fail_is_cut_off(hosts: int) -> None:
    for lost in range(hosts):
        seen = cluster(hosts)
        seen.pairs = [replace(p, times=FAILED) if lost in p.ranks else p for p in seen.pairs]
        finding = only(seen, "failure")
        assert finding.where == f"h{lost} (10.0.0.{lost})"
        assert "cut off" in finding.what


@pytest.mark.parametrize("stage", ["connect", "store", "answer", "gloo", "nccl"])
def test_a_pair_that_fails_alone_is_named_as_a_pair(stage: str) -> None:
    seen = cluster(4)
    failed = PairTimes((), "no luck", stage)
    seen.pairs = [replace(p, times=failed) if p.ranks == (1, 2) else p for p in seen.pairs]
    assert only(seen, "failure").where == "h1 (10.0.0.1) and h2 (10.0.0.2)"


def test_pairs_that_were_left_out_are_told_unless_a_host_is_why() -> None:
    seen = cluster(3)
    seen.pairs = [replace(p, times=None) if 1 in p.ranks else p for p in seen.pairs]
    assert "0-1" in only(seen, "warning").what
    seen.silent = [Silent("h1 (10.0.0.1)", "10.0.0.1", "x", "no answer")]
    only(seen, "failure")


def test_a_group_that_fails_or_is_left_out_is_told_and_the_others_keep_their_figures() -> None:
    seen = cluster(4)
    fine = Bandwidth("gloo", 4 * 2**20, 2e9, 5e8)
    refused = GroupBandwidth("inside", (2, 3), error="connection refused")
    across = GroupBandwidth("across", (0, 2), Bandwidth("gloo", 4 * 2**20, 1e9, 3e8))
    seen.mesh = Mesh(2, 2, 1)
    seen.groups = [GroupBandwidth("inside", (0, 1), fine), refused, across, GroupBandwidth("across", (1, 3))]
    failed, left_out = told(seen)
    assert (failed.level, failed.where) == ("failure", "ranks 2, 3 on h2 (10.0.0.2), h3 (10.0.0.3)")
    assert failed.what == "the all-reduce and all-gather inside a replica failed: connection refused"
    assert left_out.what == "1 of 4 groups were left out because time ran out: across replicas (ranks 1, 3)"
    assert to_json(seen, [])["network"] == "500MB/s,300MB/s"
    assert [group["state"] for group in to_json(seen, [])["groups"]] == ["ok", "failed", "ok", "left out"]
    seen.groups = [refused, across]
    assert to_json(seen, [])["network"] is None


def test_replicas_that_share_nodes_are_told() -> None:
    seen = cluster(6)
    for rank in seen.ranks:
        rank.node_id = "n0" if rank.rank < 4 else "n4"
    seen.mesh = Mesh(3, 2, 1)
    assert told(seen) == []
    seen.mesh = Mesh(2, 3, 1)
    finding = only(seen, "warning")
    assert (finding.where, finding.do.partition(",")[0]) == ("replicas", "set strategy.replicas to 1")
    assert "each has 3 ranks, and a node has up to 4" in finding.what


def test_a_slow_connection_points_at_dns() -> None:
    seen = cluster(2)
    seen.pairs = [Pair((0, 1), PairTimes((Timing("gloo", 10.1, 150.0, 0.8),)))]
    assert "DNS" in only(seen, "warning").do


@pytest.mark.parametrize("name", ["python", "torch", "ray", "deepspeed"])
def test_a_version_that_differs_names_host_and_both(name: str) -> None:
    seen = cluster(3)
    change(seen.ranks[2], versions={**seen.ranks[2].facts.versions, name: "9.9"})
    finding = only(seen, "failure")
    assert finding.where == "h2 (10.0.0.2)"
    assert "9.9" in finding.what
    assert str(seen.ranks[0].facts.versions[name] or "not installed") in finding.what


def test_two_hosts_of_one_name() -> None:
    seen = cluster(3)
    change(seen.ranks[2], hostname="h0")
    assert only(seen, "warning").where == "h0"


@pytest.mark.parametrize(
    ("skew_s", "uncertainty_s", "level"),
    [(1.9, 0.0, None), (-2.1, 0.05, "warning"), (2.5, 1.0, None), (9.9, 0.1, "warning"), (-11.0, 0.5, "failure")],
)
def test_clock_skew(skew_s: float, uncertainty_s: float, level: str | None) -> None:
    seen = cluster(2)
    seen.ranks[1].clock = Clock(skew_s, uncertainty_s)
    assert [f.level for f in told(seen)] == ([level] if level else [])


def test_a_head_without_fast_failure_detection() -> None:
    seen = cluster(3)
    seen.ranks[0].head_settings = {**NODE_SETTINGS, "RAY_health_check_period_ms": None}
    finding = only(seen, "warning")
    assert "RAY_health_check_period_ms=1000" in finding.do
    assert "initial_delay" not in finding.do
    alone = cluster(1)
    alone.ranks[0].head_settings = dict.fromkeys(NODE_SETTINGS)
    assert told(alone) == []


def test_authentication_that_differs() -> None:
    seen = cluster(2)
    seen.ranks[1].auth_mode = None
    assert "not set on h1" in only(seen, "warning").what


@pytest.mark.parametrize(
    ("free", "total", "level"),
    [(50, 100, None), (4, 100, "warning"), (0.5, 100, "failure"), (40, 1000, "warning")],
)
def test_room_in_the_temporary_folder(free: float, total: float, level: str | None) -> None:
    seen = cluster(1)
    change(seen.ranks[0], disks={"temporary": Space("/tmp", int(total * GIB), int(free * GIB))})
    assert [f.level for f in told(seen)] == ([level] if level else [])


@pytest.mark.parametrize(
    ("shared", "level"),
    [
        (Space("/dev/shm", 8 * GIB, 8 * GIB), None),
        (Space("/dev/shm", GIB // 2, GIB // 2), "warning"),
        (Space("/dev/shm", 8 * GIB, GIB // 100), "failure"),
        (None, "warning"),
    ],
)
def test_shared_memory(shared: Space | None, level: str | None) -> None:
    seen = cluster(1)
    change(seen.ranks[0], shared_memory=shared)
    assert [f.level for f in told(seen)] == ([level] if level else [])


def broken_computation(rank: RankObservation) -> None:
    rank.computed = (Computed(GPU.uuid, error="unspecified launch failure"),)


SICK: dict[str, tuple[Gpu, Callable[[RankObservation], None], str]] = {
    "errors": (replace(GPU, problems=("3 uncorrected memory errors",)), lambda rank: None, "failure"),
    "slow": (replace(GPU, slow=("slowed down by heat",)), lambda rank: None, "warning"),
    "hot": (replace(GPU, temperature_c=95), lambda rank: None, "warning"),
    "does not compute": (GPU, broken_computation, "failure"),
}


@pytest.mark.parametrize("case", SICK)
def test_a_sick_gpu_is_named_once(case: str) -> None:
    gpu, act, level = SICK[case]
    seen = cluster(2)
    change(seen.ranks[1], gpus=(gpu,))
    act(seen.ranks[1])
    assert only(seen, level).where == "h1 (10.0.0.1) GPU 0 (H100)"


def test_a_gpu_that_ray_gave_and_nobody_sees() -> None:
    seen = with_recipe(cluster(2), gpus_per_worker=1)
    change(seen.ranks[0], gpus=(GPU,))
    assert only(seen, "failure").where == "h1 (10.0.0.1)"


def test_workers_without_a_place() -> None:
    seen = with_recipe(cluster(2), min_workers=8)
    seen.placement_error = "resources.workers asks for 8 workers"
    assert "asks for 8" in only(seen, "failure").what


def test_storage() -> None:
    def seen(**changes: Any) -> Examination:
        found = with_recipe(cluster(2))
        assert found.ranks[1].storage is not None
        found.ranks[1].storage = replace(found.ranks[1].storage, **changes)
        return found

    assert "denied" in only(seen(error="access denied"), "failure").what
    assert "not the place" in only(seen(same_place=False), "failure").what
    assert "conditional put" in only(seen(conditional=False), "warning").what
    assert "put took 4.0 s" in only(seen(seconds={"put": 4.0}), "warning").what
    untried = with_recipe(cluster(1))
    untried.ranks[0].storage = None
    only(untried, "failure")


def test_model_and_data() -> None:
    wrong = with_recipe(cluster(2))
    wrong.inputs = Inputs("model.path 'x' is no folder")
    wrong.ranks[0].model_error = "model.path 'x' is no folder"
    assert only(wrong, "failure").where == "model and data"
    one_host = with_recipe(cluster(2))
    one_host.ranks[1].model_error = "model.path 'x' is no folder"
    assert only(one_host, "failure").where == "h1 (10.0.0.1)"
    late = with_recipe(cluster(1))
    late.inputs = Inputs(late=True)
    only(late, "failure")


def test_room_for_the_plan() -> None:
    crowded = with_recipe(cluster(2))
    for rank in crowded.ranks:
        rank.address = "10.0.0.0"
    crowded.pairs = []
    crowded.room = Room(True, (40 * GIB,) * 2, (40 * GIB,) * 2, GIB)
    assert "80.0 GiB of host memory together" in only(crowded, "failure").what
    small = with_recipe(cluster(2), gpus_per_worker=1)
    for rank in small.ranks:
        change(rank, gpus=(replace(GPU, free_bytes=(79 - 40 * rank.rank) * GIB),))
    small.room = Room(False, (60 * GIB,) * 2, (GIB,) * 2, GIB)
    assert only(small, "failure").where == "rank 1 on h1 (10.0.0.1)"
    full = with_recipe(cluster(1))
    full.room = Room(True, (GIB,), (GIB,), 11 * GIB)
    assert "checkpoints that are kept take 55.0 GiB" in only(full, "failure").what
    unplanned = with_recipe(cluster(1))
    unplanned.room, unplanned.plan_error = None, "no such shape"
    only(unplanned, "warning")


@pytest.mark.parametrize("players", range(12))
def test_every_two_meet_once_and_nobody_twice_in_a_round(players: int) -> None:
    held = rounds(range(players))
    assert sorted(m for meetings in held for m in meetings) == list(combinations(range(players), 2))
    for meetings in held:
        busy = [rank for m in meetings for rank in m]
        assert len(busy) == len(set(busy))
    assert len(held) == max(0, players - 1 + players % 2)


def test_who_meets_whom() -> None:
    assert representatives(["a", "a", "b", "b", "c"]) == [0, 2, 4]
    assert representatives(["a", "a", "a"]) == [0, 1]
    assert representatives(["a"]) == [0]
    assert representatives([]) == []


def test_ranks_of_a_node_follow_one_another() -> None:
    assert in_order(["b", "a", "b", "a", "c"]) == [0, 2, 1, 3, 4]


def test_of_two_reports_the_earlier_failure_is_told() -> None:
    late = PairTimes((), "wait timeout", "gloo")
    assert worse(late, FAILED) == FAILED
    assert worse(FINE, FINE) == FINE
    assert worse(FINE, late).error == "wait timeout"


def test_the_whole_is_bounded() -> None:
    now = [0.0]
    left = Time(50.0, clock=lambda: now[0])
    assert left.within(20.0) == 20.0
    now[0] = 45.0
    assert left.within(20.0) == 5.0
    now[0] = 60.0
    assert left.within(20.0) == 0.0
