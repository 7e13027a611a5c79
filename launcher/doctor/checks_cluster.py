"""Judges what the hosts have to do with one another: who is there, who reaches whom, and what has to be alike."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from cluster.ray_nodes import NODE_SETTINGS
from launcher.doctor.findings import Finding, failure, warning
from launcher.doctor.observations import Examination, NodeObservation

RECENT_S = 3600.0  # Ray remembers dead nodes for good; one that died yesterday is no news
SKEW_WARN_S = 2.0  # the times that hosts print are compared by people, and signatures by servers
SKEW_FAIL_S = 10.0
SLOW_CONNECT_S = 5.0  # a reverse look-up without an answer costs ten seconds
REACH = (
    "see that it is up and its network is connected, that no firewall stands between (nodes need all TCP ports), then"
    " `ray stop` and `ray start --address=HEAD:6379` on it; or take it out of the cluster"
)
HINTS = {
    "connect": "open all TCP ports between the two hosts: a firewall or a routing fault stands between them",
    "store": "open all TCP ports between the two hosts, and see that no proxy or VPN answers for them",
    "answer": "run `muster doctor` again; if it stays, look at the load and at /tmp/ray/session_latest/logs there",
    "gloo": (
        "see that each host's own name resolves to the address that the others reach (`getent hosts $(hostname)`), or "
        "set GLOO_SOCKET_IFNAME to the interface of that address where `ray start` runs"
    ),
    "nccl": (
        "set NCCL_SOCKET_IFNAME to the interface of the address above where `ray start` runs, see that the drivers are "
        "alike, and read what NCCL_DEBUG=INFO says"
    ),
}


def hosts(seen: Examination) -> Iterator[Finding]:
    """Hosts that are gone, cut off, or silent."""
    live = {node.address for node in seen.nodes if node.alive and node.answers}
    told: set[str] = set()
    for node in seen.nodes:
        if node.address in told or node.address in live or (not node.alive and node.expected):
            continue
        told.add(node.address)
        yield _gone(seen, node)
    for silent in seen.silent:
        if silent.address not in told:
            told.add(silent.address)
            yield failure(
                silent.host, f"did not answer while {silent.stage}: {silent.reason}", _unanswered(silent.reason)
            )
    cut = cut_off(seen)
    for rank in seen.ranks:
        if rank.address in cut and rank.address not in told:
            told.add(rank.address)
            yield failure(rank.host, "is cut off: it reaches no other host, and none reaches it", REACH)


def _gone(seen: Examination, node: NodeObservation) -> Finding:
    if node.alive:
        what = f"is not reachable: {node.reason}, though Ray still counts on it"
        return failure(node.host, what, REACH)
    ago = "" if node.dead_for_s is None else f" for {node.dead_for_s:.0f} s"
    what = f"is not reachable: Ray has counted it as dead{ago} ({node.reason or 'it does not say why'})"
    stale = node.dead_for_s is not None and node.dead_for_s > RECENT_S
    # A recipe whose workers are placed elsewhere trains without it.
    spared = seen.wanted is not None and seen.placement_error is None
    return warning(node.host, what, REACH) if stale or spared else failure(node.host, what, REACH)


def _unanswered(reason: str) -> str:
    if "ModuleNotFoundError" in reason or "No module named" in reason:
        return (
            "install the same muster on that host, at the same path as here, or submit with `ray job submit "
            "--working-dir .`, which brings it along"
        )
    if "no answer" in reason:
        return f"run this again if the host is under load, which makes it answer late; else {REACH}"
    return REACH


def cut_off(seen: Examination) -> set[str]:
    """Addresses of hosts all of whose pairs failed, while others reach each other or there are several that fail."""
    address = {rank.rank: rank.address for rank in seen.ranks}
    met = [pair for pair in seen.pairs if pair.times is not None]
    of = {rank: [pair for pair in met if rank in pair.ranks] for rank in address}
    fine = {rank for pair in met if not pair.failed for rank in pair.ranks}
    return {address[r] for r, mine in of.items() if mine and fine and all(p.failed for p in mine)}


def pairs(seen: Examination) -> Iterator[Finding]:
    """Pairs that do not connect, unless one of the two is cut off altogether, which is said once."""
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
                "look at DNS: a reverse look-up that nobody answers costs ten seconds; put the hosts into /etc/hosts",
            )
    gone = cut | {silent.address for silent in seen.silent}
    left_out = [p for p in seen.pairs if p.times is None and not {hosts_of[r].address for r in p.ranks} & gone]
    if left_out:
        names = ", ".join(f"{a}-{b}" for a, b in (pair.ranks for pair in left_out[:8]))
        more = f" and {len(left_out) - 8} more" if len(left_out) > 8 else ""
        what = f"{len(left_out)} of {len(seen.pairs)} pairs were left out, as time ran out: ranks {names}{more}"
        yield warning(
            "all-reduce", what, "nothing, if the pairs that were measured are fine; fewer hosts take less time"
        )


def alike(seen: Examination) -> Iterator[Finding]:
    """Versions, host names and Ray's authentication."""
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
                name, what, "give each a name of its own (`hostnamectl set-hostname`): logs tell them apart by it"
            )


def clocks(seen: Examination) -> Iterator[Finding]:
    for there in seen.by_address().values():
        clock = there[0].clock
        if clock is None:
            continue
        least = abs(clock.skew_s) - clock.uncertainty_s
        what = f"its clock is {abs(clock.skew_s):.1f} s {'ahead of' if clock.skew_s > 0 else 'behind'} this one's"
        do = (
            "switch time synchronisation on (chrony, `timedatectl set-ntp true`): leases and signatures go by the clock"
        )
        if least > SKEW_FAIL_S:
            yield failure(there[0].host, what, do)
        elif least > SKEW_WARN_S:
            yield warning(there[0].host, what, do)


def settings(seen: Examination) -> Iterator[Finding]:
    """What makes a cluster notice a lost host in seconds; of no use on one host."""
    modes: dict[str, list[str]] = {}
    for there in seen.by_address().values():
        modes.setdefault(there[0].auth_mode or "not set", []).append(there[0].host)
    modes.setdefault(seen.driver_auth_mode or "not set", []).append("this driver")
    if len(modes) > 1:
        what = "RAY_AUTH_MODE differs: " + "; ".join(f"{mode} on {', '.join(on)}" for mode, on in sorted(modes.items()))
        yield warning(
            "Ray", what, "set RAY_AUTH_MODE alike for every `ray start`, driver and CLI; else some are rejected"
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
            "Ray's head takes half a minute and more to notice a lost host: its environment lacks "
            f"{', '.join(missing)}",
            f"start the head with `env {wanted} ray start --head …`: then it takes a few seconds",
        )
