"""Checks across hosts: which hosts are there, which pairs connect, and what must be the same on all of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from cluster.ray_nodes import NODE_SETTINGS
from launcher.doctor.findings import Finding, failure, warning
from launcher.doctor.observations import Axis, Examination, GroupBandwidth, NodeObservation
from trainer.distributed.replica_nodes import advice, replica_nodes, share_nodes

RECENT_S = 3600.0  # Ray never removes dead nodes from its list; one that died long ago is only a warning
SKEW_WARN_S = 2.0  # people compare times in the logs of several hosts; servers check the time of a signature
SKEW_FAIL_S = 10.0
AXES: dict[Axis, str] = {"inside": "inside a replica", "across": "across replicas", "all": "of all ranks"}
MOST_NAMED = 8
SLOW_CONNECT_S = 5.0  # a reverse DNS look-up without an answer takes 10 s
REACH = (
    "check that it is up, that its network is connected, and that no firewall blocks it (nodes need all TCP ports); "
    "then run `ray stop` and `ray start --address=HEAD:6379` on it; or remove it from the cluster"
)
HINTS = {
    "connect": "open all TCP ports between the two hosts: a firewall or a routing fault blocks the connection",
    "store": "open all TCP ports between the two hosts, and check that no proxy or VPN answers for them",
    "answer": "run `muster doctor` again; if it fails again, check load and /tmp/ray/session_latest/logs there",
    "gloo": (
        "check that each host's own name resolves to the address that the others reach (`getent hosts $(hostname)`), "
        "or set GLOO_SOCKET_IFNAME to the interface of that address where `ray start` runs"
    ),
    "nccl": (
        "set NCCL_SOCKET_IFNAME to the interface of the address above where `ray start` runs, check that the driver "
        "versions are equal, and read the output of NCCL_DEBUG=INFO"
    ),
}


def hosts(seen: Examination) -> Iterator[Finding]:
    """Yields one finding for each host that is lost, cut off, or silent."""
    live = {node.address for node in seen.nodes if node.alive and node.answers}
    reported: set[str] = set()
    for node in seen.nodes:
        if node.address in reported or node.address in live or (not node.alive and node.expected):
            continue
        reported.add(node.address)
        yield _gone(seen, node)
    for silent in seen.silent:
        if silent.address not in reported:
            reported.add(silent.address)
            yield failure(
                silent.host, f"did not answer while {silent.stage}: {silent.reason}", _unanswered(silent.reason)
            )
    cut = cut_off(seen)
    for rank in seen.ranks:
        if rank.address in cut and rank.address not in reported:
            reported.add(rank.address)
            yield failure(rank.host, "is cut off: it reaches no other host, and none reaches it", REACH)


def _gone(seen: Examination, node: NodeObservation) -> Finding:
    if node.alive:
        what = f"is not reachable: {node.reason}, but Ray still lists it as alive"
        return failure(node.host, what, REACH)
    ago = "" if node.dead_for_s is None else f" for {node.dead_for_s:.0f} s"
    what = f"is not reachable: Ray has listed it as dead{ago} ({node.reason or 'Ray gives no reason'})"
    stale = node.dead_for_s is not None and node.dead_for_s > RECENT_S
    # A recipe trains without this host if its workers have been placed on other hosts.
    spared = seen.wanted is not None and seen.placement_error is None
    return warning(node.host, what, REACH) if stale or spared else failure(node.host, what, REACH)


def _unanswered(reason: str) -> str:
    if "ModuleNotFoundError" in reason or "No module named" in reason:
        return (
            "install the same muster on that host, at the same path as here, or submit with `ray job submit "
            "--working-dir .`, which copies it there"
        )
    if "no answer" in reason:
        return f"if the host is under load, it may answer late: run this again; otherwise {REACH}"
    return REACH


def cut_off(seen: Examination) -> set[str]:
    """Returns the addresses of the hosts whose measured pairs all failed, if any other pair succeeded."""
    address = {rank.rank: rank.address for rank in seen.ranks}
    met = [pair for pair in seen.pairs if pair.times is not None]
    of = {rank: [pair for pair in met if rank in pair.ranks] for rank in address}
    fine = {rank for pair in met if not pair.failed for rank in pair.ranks}
    return {address[r] for r, mine in of.items() if mine and fine and all(p.failed for p in mine)}


def pairs(seen: Examination) -> Iterator[Finding]:
    """Yields findings on pairs that fail, are slow to connect, or were left out.

    Pairs of a host that is cut off are skipped: `hosts` reports that host once.
    """
    hosts_of = {rank.rank: rank for rank in seen.ranks}
    cut = cut_off(seen)
    for pair in seen.pairs:
        a, b = (hosts_of[rank] for rank in pair.ranks)
        where = f"{a.host} and {b.host}"
        if pair.times is None or {a.address, b.address} & cut:
            continue
        if pair.failed:
            stage = pair.times.stage or "gloo"
            yield failure(where, f"no all-reduce between them: {stage}: {pair.times.error}", HINTS[stage])
        elif (slowest := max(t.connect_s for t in pair.times.timings)) > SLOW_CONNECT_S:
            yield warning(
                where,
                f"took {slowest:.0f} s to connect",
                "check DNS: a reverse look-up without an answer takes 10 s; put the hosts into /etc/hosts",
            )
    gone = cut | {silent.address for silent in seen.silent}
    left_out = [p for p in seen.pairs if p.times is None and not {hosts_of[r].address for r in p.ranks} & gone]
    if left_out:
        names = ", ".join(f"{a}-{b}" for a, b in (pair.ranks for pair in left_out[:8]))
        more = f" and {len(left_out) - 8} more" if len(left_out) > 8 else ""
        what = f"{len(left_out)} of {len(seen.pairs)} pairs were left out because time ran out: ranks {names}{more}"
        yield warning(
            "all-reduce", what, "nothing to do if the measured pairs are fine; a check of fewer hosts takes less time"
        )


def groups(seen: Examination) -> Iterator[Finding]:
    """Yields one finding for each rank that did not answer in a group, one for each group whose ranks all answered and
    could not be measured, and one for the groups that were left out."""
    hosts_of = {rank.rank: rank.host for rank in seen.ranks}
    reported: set[int] = set()
    for group in seen.groups:
        what = f"the all-reduce and all-gather {AXES[group.axis]}"
        for rank, error in group.silent.items():
            if rank not in reported:
                reported.add(rank)
                where = f"rank {rank} on {hosts_of.get(rank, 'a host that did not answer')}"
                yield failure(where, f"did not answer in {what}, with {ranks_text(group)}: {error}", _unanswered(error))
        if group.error is not None and not group.silent:
            on = list(dict.fromkeys(hosts_of.get(rank, "?") for rank in group.ranks))
            more = f" and {len(on) - MOST_NAMED} more" if len(on) > MOST_NAMED else ""
            where = f"{ranks_text(group)} on {', '.join(on[:MOST_NAMED])}{more}"
            do = "correct what is wrong with pairs of these hosts first; if nothing is, run `muster doctor` again"
            yield failure(where, f"{what} failed: {group.error}", do)
    left_out = [group for group in seen.groups if group.bandwidth is None and group.error is None]
    if left_out:
        names = ", ".join(f"{AXES[group.axis]} ({ranks_text(group)})" for group in left_out[:MOST_NAMED])
        what = f"{len(left_out)} of {len(seen.groups)} groups were left out because time ran out: {names}"
        yield warning("bandwidth", what, "correct the other findings, which took the time, and run this again")


def ranks_text(group: GroupBandwidth) -> str:
    shown = ", ".join(map(str, group.ranks[:MOST_NAMED]))
    return f"ranks {shown}" + (f" and {len(group.ranks) - MOST_NAMED} more" if len(group.ranks) > MOST_NAMED else "")


def replicas(seen: Examination) -> Iterator[Finding]:
    """Warns if replicas share nodes, where the ranks are now."""
    if seen.mesh is None or len(seen.ranks) < seen.mesh.ranks:
        return
    placed = replica_nodes(seen.mesh, [rank.node_id for rank in seen.ranks[: seen.mesh.ranks]])
    if share_nodes(placed):
        per_node = max(Counter(rank.node_id for rank in seen.ranks).values())
        each = seen.mesh.ranks_per_replica
        what = f"share nodes: each has {each} ranks, and a node has up to {per_node}, so that parameters travel between"
        yield warning("replicas", f"{what} nodes in every layer", advice(seen.mesh, per_node))


def alike(seen: Examination) -> Iterator[Finding]:
    """Yields findings on versions and GPU drivers that differ between hosts, and on host names that are used twice."""
    ranks = seen.ranks
    if not ranks:
        return
    for name in sorted({name for rank in ranks for name in rank.facts.versions}):
        common = Counter(rank.facts.versions.get(name) for rank in ranks).most_common(1)[0][0]
        for address, there in seen.by_address().items():
            other = there[0].facts.versions.get(name)
            if other != common:
                reference = next(rank for rank in ranks if rank.facts.versions.get(name) == common)
                what = f"{name} is {other or 'not installed'}, and {common or 'not installed'} on {reference.host}"
                yield failure(there[0].host, what, f"install {name} {common or ''}".rstrip() + f" at {address} as well")
    drivers = {gpu.driver for rank in ranks for gpu in rank.facts.gpus if gpu.driver}
    if len(drivers) > 1:
        yield warning("GPU drivers", f"differ: {', '.join(sorted(drivers))}", "install one NVIDIA driver on all hosts")
    yield from _names(seen)


def _names(seen: Examination) -> Iterator[Finding]:
    named: dict[str, list[str]] = {}
    for address, there in seen.by_address().items():
        named.setdefault(there[0].facts.hostname, []).append(address)
    for name, addresses in named.items():
        if len(addresses) > 1:
            what = f"{len(addresses)} hosts have this name: {', '.join(addresses)}"
            yield warning(
                name, what, "give each host its own name (`hostnamectl set-hostname`): logs identify hosts by name"
            )


def clocks(seen: Examination) -> Iterator[Finding]:
    for there in seen.by_address().values():
        clock = there[0].clock
        if clock is None:
            continue
        least = abs(clock.skew_s) - clock.uncertainty_s
        what = f"its clock is {abs(clock.skew_s):.1f} s {'ahead of' if clock.skew_s > 0 else 'behind'} this one's"
        do = "turn on time synchronisation (chrony, `timedatectl set-ntp true`): leases and signatures depend on clocks"
        if least > SKEW_FAIL_S:
            yield failure(there[0].host, what, do)
        elif least > SKEW_WARN_S:
            yield warning(there[0].host, what, do)


def settings(seen: Examination) -> Iterator[Finding]:
    """Checks that RAY_AUTH_MODE is the same everywhere, and that the head has `NODE_SETTINGS`.

    With them, Ray notices a lost host in seconds. They are not checked on a cluster of one node.
    """
    modes: dict[str, list[str]] = {}
    for there in seen.by_address().values():
        modes.setdefault(there[0].auth_mode or "not set", []).append(there[0].host)
    modes.setdefault(seen.driver_auth_mode or "not set", []).append("this driver")
    if len(modes) > 1:
        what = "RAY_AUTH_MODE differs: " + "; ".join(f"{mode} on {', '.join(on)}" for mode, on in sorted(modes.items()))
        yield warning(
            "Ray", what, "set the same RAY_AUTH_MODE for every `ray start`, driver and CLI; else some are rejected"
        )
    head = next((rank for rank in seen.ranks if rank.head_settings is not None), None)
    if head is None or seen.ray is None or len(seen.nodes) < 2:
        return
    assert head.head_settings is not None
    missing = {name: value for name, value in NODE_SETTINGS.items() if head.head_settings.get(name) != value}
    if missing:
        wanted = " ".join(f"{name}={value}" for name, value in missing.items())
        yield warning(
            head.host,
            f"Ray's head needs 30 s or more to notice a lost host: its environment lacks {', '.join(missing)}",
            f"start the head with `env {wanted} ray start --head …`: then it needs a few seconds",
        )
