"""Two processes that meet as doctor's probes do: no default process group, a port that the first has opened."""

from __future__ import annotations

import multiprocessing as mp
import time
from pathlib import Path
from typing import Any

from launcher.doctor.probes import PairTimes, meet, open_store
from tests.support.waiting import free_port

ADDRESS = "127.0.0.1"


def _meet(rank: int, queue: Any, results: Any) -> None:
    """Twice with the other, as one rank meets several; then with nobody."""
    store: Any = open_store(ADDRESS, 20) if rank == 0 else None
    if rank == 0:
        queue.put(store.port)
    at = store or (ADDRESS, queue.get())
    together = [meet(f"0-{i}", at, gpu=False, timeout_s=20) for i in range(2)]
    begin = time.monotonic()
    alone = meet("nobody", at if rank == 0 else (ADDRESS, free_port()), gpu=False, timeout_s=1)
    results.put((rank, together, alone, time.monotonic() - begin))
    if rank == 0:
        queue.get()  # the store lives until the other is through
    else:
        queue.put(None)


def test_a_pair_meets_again_and_again_and_is_not_kept_waiting(tmp_path: Path) -> None:
    context = mp.get_context("spawn")
    queue, results = context.Queue(), context.Queue()
    processes = [context.Process(target=_meet, args=(rank, queue, results)) for rank in (0, 1)]
    for process in processes:
        process.start()
    found: dict[int, tuple[list[PairTimes], PairTimes, float]] = {}
    for _ in processes:
        rank, *rest = results.get(timeout=60)
        found[rank] = tuple(rest)  # type: ignore[assignment]
    for process in processes:
        process.join(20)
        assert process.exitcode == 0
    for together, alone, took_s in found.values():
        for times in together:
            (timing,) = times.timings
            assert times.error is None
            assert timing.backend == "gloo"
            assert 0 < timing.latency_us < 1e6
            assert timing.bus_gb_s > 0
        assert alone.error is not None
        assert took_s < 10
    assert (found[0][1].stage, found[1][1].stage) == ("gloo", "connect")
