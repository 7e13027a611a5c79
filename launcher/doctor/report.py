"""Output of an examination: one JSON object for scripts, tables in a terminal for people."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from launcher.doctor.checks_cluster import AXES, ranks_text
from launcher.doctor.checks_host import gib
from launcher.doctor.collectives import network_option, rate
from launcher.doctor.findings import Finding, verdict
from launcher.doctor.observations import Examination, GroupBandwidth, Pair, RankObservation
from launcher.doctor.probes import RoundTrip

SHOWN = ("python", "torch", "ray", "muster")


def to_json(seen: Examination, findings: Sequence[Finding]) -> dict[str, Any]:
    """Returns the JSON object of ``--json``.

    ``bus_gb_s`` is in 10⁹ bytes per second, ``latency_us`` in microseconds, other times in seconds, sizes in bytes.
    ``network`` is for ``muster plan --network``.
    """
    return {
        "verdict": verdict(findings),
        "findings": [asdict(finding) for finding in findings],
        "ray": seen.ray or "local",
        "recipe": seen.wanted.name if seen.wanted else None,
        "hosts": [_host(seen, address) for address in _addresses(seen)],
        "ranks": [
            {
                "rank": rank.rank,
                "host": rank.facts.hostname,
                "address": rank.address,
                "node_id": rank.node_id,
                "pid": rank.facts.pid,
                "gpus": list(rank.gpu_ids),
            }
            for rank in seen.ranks
        ],
        "pairs": [_pair(seen, pair) for pair in seen.pairs],
        "mesh": seen.mesh.to_json() if seen.mesh else None,
        "groups": [_group(seen, group) for group in seen.groups],
        "network": network_option(seen.groups),
        "inputs": asdict(seen.inputs) if seen.inputs else None,
        "plan": asdict(seen.room) if seen.room else None,
        "seconds": round(seen.seconds, 1),
    }


def _addresses(seen: Examination) -> list[str]:
    """Returns all hosts' addresses, except those whose nodes were all removed on purpose."""
    return list(dict.fromkeys(node.address for node in seen.nodes if node.alive or not node.expected))


def state(seen: Examination, address: str) -> str:
    """Returns ``ok``, ``silent``, ``unreachable`` (alive according to Ray) or ``dead`` (according to Ray)."""
    if any(silent.address == address for silent in seen.silent):
        return "silent"
    here = [node for node in seen.nodes if node.address == address]
    if any(node.alive and node.answers for node in here):
        return "ok"
    return "unreachable" if any(node.alive for node in here) else "dead"


def _host(seen: Examination, address: str) -> dict[str, Any]:
    node = [node for node in seen.nodes if node.address == address][-1]
    there = seen.by_address().get(address)
    found: dict[str, Any] = {"host": node.hostname, "address": address, "state": state(seen, address)}
    if not there:
        return found
    facts = asdict(there[0].facts)
    for private in ("hostname", "pid", "time_s", "gpus"):
        del facts[private]
    gpus = {gpu.uuid: asdict(gpu) for rank in there for gpu in rank.facts.gpus}
    for computed in (c for rank in there for c in rank.computed):
        gpus[computed.uuid] |= {"matmul_ms": computed.ms, "matmul_error": computed.error}
    clock, storage = there[0].clock, there[0].storage
    return {
        **found,
        **facts,
        "gpus": list(gpus.values()),
        "clock": asdict(clock) if clock else None,
        "storage": asdict(storage) if storage else None,
        "model_readable": None if there[0].model_error is None else there[0].model_error == "",
    }


def _pair(seen: Examination, pair: Pair) -> dict[str, Any]:
    names = {rank.rank: rank.facts.hostname for rank in seen.ranks}
    state = "left out" if pair.times is None else "failed" if pair.failed else "ok"
    found: dict[str, Any] = {"ranks": list(pair.ranks), "hosts": [names.get(r) for r in pair.ranks], "state": state}
    if pair.times is not None:
        found |= {"error": pair.times.error, "stage": pair.times.stage}
        found["timings"] = [asdict(timing) for timing in pair.times.timings]
    return found


def _group(seen: Examination, group: GroupBandwidth) -> dict[str, Any]:
    names = {rank.rank: rank.facts.hostname for rank in seen.ranks}
    return {
        "axis": group.axis,
        "ranks": list(group.ranks),
        "hosts": [names.get(rank) for rank in group.ranks],
        "state": _group_state(group),
        "error": group.error,
        "silent": list(group.silent),
        **(asdict(group.bandwidth) if group.bandwidth else {}),
    }


def _group_state(group: GroupBandwidth) -> str:
    return "ok" if group.bandwidth else "failed" if group.error else "left out"


def tables(seen: Examination, findings: Sequence[Finding]) -> Iterator[RenderableType]:
    yield _hosts(seen)
    yield _ranks(seen)
    if seen.pairs:
        yield _pairs(seen)
    if seen.groups:
        yield _groups(seen)
    if (network := network_option(seen.groups)) is not None:
        yield Text(f"  for the time of the network: muster plan RECIPE --network {network}\n")
    if any(rank.storage for rank in seen.ranks):
        yield _storage(seen)
    if seen.room is not None:
        yield _plan(seen)
    if findings:
        yield _findings(findings)
    yield _verdict(seen, findings)


def _table(title: str, *columns: str) -> Table:
    return Table(*columns, box=box.SIMPLE, title=title, title_justify="left", title_style="bold")


def _row(table: Table, *cells: str) -> None:
    table.add_row(*(Text(cell) for cell in cells))  # as Text, brackets are not read as markup


def _hosts(seen: Examination) -> Table:
    table = _table("hosts", "host", "address", "state", "GPUs", "memory free", "tmp free", "/dev/shm", "clock", *SHOWN)
    for address in _addresses(seen):
        there = seen.by_address().get(address)
        name = [node.hostname for node in seen.nodes if node.address == address][-1]
        if not there:
            _row(table, name, address, state(seen, address))
            continue
        facts, clock = there[0].facts, there[0].clock
        gpus = {gpu.uuid: gpu.name for rank in there for gpu in rank.facts.gpus}
        kinds = ", ".join(f"{list(gpus.values()).count(kind)} {kind}" for kind in dict.fromkeys(gpus.values()))
        _row(
            table,
            facts.hostname,
            address,
            state(seen, address),
            kinds or "none",
            f"{gib(facts.memory.available_bytes)} of {gib(facts.memory.total_bytes)}",
            gib(facts.disks["temporary"].free_bytes),
            gib(facts.shared_memory.free_bytes) if facts.shared_memory else "none",
            f"{clock.skew_s * 1000:+.1f} ms" if clock else "?",
            *(facts.versions.get(name) or "none" for name in SHOWN),
        )
    return table


def _ranks(seen: Examination) -> Table:
    table = _table("ranks" if seen.wanted else "probes", "rank", "host", "address", "pid", "GPUs")
    for rank in seen.ranks:
        gpus = ", ".join(rank.gpu_ids) or "none"
        _row(table, str(rank.rank), rank.facts.hostname, rank.address, str(rank.facts.pid), gpus)
    return table


def _pairs(seen: Examination) -> Table:
    table = _table("all-reduce of two", "ranks", "hosts", "through", "latency", "bus bandwidth", "connected in")
    names = {rank.rank: rank.facts.hostname for rank in seen.ranks}
    for pair in seen.pairs:
        who = "-".join(map(str, pair.ranks)), " - ".join(names.get(r, "?") for r in pair.ranks)
        if pair.times is None:
            _row(table, *who, "left out")
            continue
        for t in pair.times.timings:
            _row(table, *who, t.backend, f"{t.latency_us:.0f} µs", f"{t.bus_gb_s:.2f} GB/s", f"{t.connect_s:.2f} s")
        if pair.failed:
            _row(table, *who, f"failed: {pair.times.stage}")
    return table


def _groups(seen: Examination) -> Table:
    """Shows the slowest group of each axis, by either collective, and every group that was not measured."""
    title = "bandwidth: what each rank sends"
    table = _table(title, "", "slowest group", "hosts", "through", "size", "all-reduce", "all-gather")
    names = {rank.rank: rank.facts.hostname for rank in seen.ranks}

    def least(group: GroupBandwidth) -> float:
        assert group.bandwidth is not None
        return min(group.bandwidth.all_reduce_bytes_per_s, group.bandwidth.all_gather_bytes_per_s)

    for axis in dict.fromkeys(group.axis for group in seen.groups):
        here = [group for group in seen.groups if group.axis == axis]
        measured = [group for group in here if group.bandwidth]
        for group in [*sorted(measured, key=least)[:1], *(group for group in here if not group.bandwidth)]:
            hosts = ", ".join(dict.fromkeys(names.get(rank, "?") for rank in group.ranks))
            who = AXES[axis], ranks_text(group) + (f" (1 of {len(here)})" if len(here) > 1 else ""), hosts
            if (found := group.bandwidth) is None:
                _row(table, *who, _group_state(group))
                continue
            rates = (rate(found.all_reduce_bytes_per_s), rate(found.all_gather_bytes_per_s))
            _row(table, *who, found.backend, gib(found.size_bytes), *rates)
    return table


def _storage(seen: Examination) -> Table:
    trips: list[tuple[RankObservation, RoundTrip]] = [(rank, rank.storage) for rank in seen.ranks if rank.storage]
    steps = list(dict.fromkeys(step for _, trip in trips for step in trip.seconds))
    table = _table(f"storage {trips[0][1].url} (1 MiB, ms)", "host", *steps, "")
    for rank, trip in trips:
        cells = (f"{trip.seconds[step] * 1000:.0f}" if step in trip.seconds else "" for step in steps)
        _row(table, rank.facts.hostname, *cells, "failed" if trip.error else "ok")
    return table


def _plan(seen: Examination) -> Table:
    assert seen.room is not None
    table = _table("room for the plan", "rank", "GPU needs", "GPU free", "host needs", "host free (all its ranks)")
    for rank, device, host in zip(seen.ranks, seen.room.device_bytes, seen.room.host_bytes, strict=False):
        gpu = rank.facts.gpus[0] if rank.facts.gpus and not seen.room.on_host else None
        needs = gib(device) if gpu else "-"
        free = gib(gpu.free_bytes) if gpu else "-"
        _row(table, str(rank.rank), needs, free, gib(host), gib(rank.facts.memory.available_bytes))
    return table


def _findings(findings: Sequence[Finding]) -> Table:
    table = Table(box=box.SIMPLE, title="findings", title_justify="left", title_style="bold", show_lines=True)
    for column, ratio in (("", None), ("where", 2), ("what", 4), ("what to do", 4)):
        table.add_column(column, ratio=ratio, overflow="fold", no_wrap=ratio is None)
    for finding in findings:
        _row(table, finding.level, finding.where, finding.what, finding.do)
    return table


def _verdict(seen: Examination, findings: Sequence[Finding]) -> Text:
    found = verdict(findings)
    style = {"ready": "bold green", "warnings": "bold yellow", "not ready": "bold red"}[found]
    count = {level: sum(f.level == level for f in findings) for level in ("failure", "warning")}
    counts = ", ".join(f"{n} {level}{'s' if n > 1 else ''}" for level, n in count.items() if n)
    return Text.assemble((found, style), f": {counts or 'no problem was found'} ({seen.seconds:.0f} s)")
