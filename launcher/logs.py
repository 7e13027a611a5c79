"""What the ranks have printed, read from the run's storage; `trainer.logs` keeps it there."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import BinaryIO

from launcher.status import read_state
from trainer.errors import InputError
from trainer.logs.parts import LogFeed, Stored, stored_parts
from trainer.storage import Storage

LOOK_S = 2.0


def print_logs(run: Storage, rank: int | None, attempt: int | None, out: BinaryIO) -> None:
    """One rank after the other. Raises InputError when there is nothing to print."""
    parts = _chosen(stored_parts(run), run, rank, attempt)
    ranks = sorted({part.rank for part in parts})
    for each in ranks:
        text = LogFeed(run).new([part for part in parts if part.rank == each])
        if len(ranks) > 1:
            out.write(f"==> rank {each} of attempt {parts[0].attempt} <==\n".encode())
        out.write(text)
    out.flush()


def follow_logs(
    run: Storage,
    rank: int | None,
    attempt: int | None,
    out: BinaryIO,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """As they grow, each line with its rank where there are several, until the run has ended; without ``attempt`` it
    goes on with every new one."""
    feeds: dict[tuple[int, int], LogFeed] = {}
    while True:
        running = read_state(run) == "running"
        found = stored_parts(run)
        if found or not running:
            parts = _chosen(found, run, rank, attempt)
            ranks = sorted({part.rank for part in parts})
            for each in ranks:
                feed = feeds.setdefault((parts[0].attempt, each), LogFeed(run))
                text = feed.new([part for part in parts if part.rank == each])
                out.write(_marked(text, each) if len(ranks) > 1 else text)
            out.flush()
        if not running:
            return
        sleep(LOOK_S)


def _chosen(parts: list[Stored], run: Storage, rank: int | None, attempt: int | None) -> list[Stored]:
    """Those of one attempt, the newest if none is named, and of one rank if one is."""
    if not parts:
        raise InputError(
            f"{run.url} holds no logs: its ranks have not begun yet, or it is no run; see `muster status {run.url}`"
        )
    attempts = sorted({part.attempt for part in parts})
    wanted = attempts[-1] if attempt is None else attempt
    if wanted not in attempts:
        raise InputError(f"there is no log of attempt {wanted}: there are those of {_listed(attempts)}")
    found = [part for part in parts if part.attempt == wanted]
    ranks = sorted({part.rank for part in found})
    if rank is not None and rank not in ranks:
        raise InputError(f"there is no log of rank {rank} of attempt {wanted}: there are those of {_listed(ranks)}")
    return [part for part in found if rank is None or part.rank == rank]


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers)) if len(numbers) <= 8 else f"{numbers[0]} to {numbers[-1]}"


def _marked(text: bytes, rank: int) -> bytes:
    return b"".join(b"rank %d: %s" % (rank, line) for line in text.splitlines(keepends=True))
