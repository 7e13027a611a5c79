"""Prints the output of the ranks from the run's storage, where `trainer.logs` stores it."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from typing import BinaryIO

from launcher.monitor.status import read_state
from trainer.errors import InputError, StorageError
from trainer.logs.parts import LogFeed, LogPart, stored_parts
from trainer.storage import Storage

LOOK_S = 2.0


def print_logs(run: Storage, rank: int | None, attempt: int | None, out: BinaryIO) -> None:
    """Writes the logs of one attempt, rank after rank. Raises InputError if there is nothing to print."""
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
    """Writes the logs while they grow, until the run has ended.

    With several ranks, each line starts with its rank. Without ``attempt``, new attempts are followed too. While the
    run is active, it waits for logs that do not exist yet, and for a storage that fails. Raises InputError if the run
    has ended without such logs.
    """
    follower = LogFollower(run, rank, attempt)
    running = follower.look(out)
    while running:
        sleep(LOOK_S)
        with suppress(StorageError):
            running = follower.look(out)


class LogFollower:
    """Prints new log lines at each look.

    They are of ``attempt``. If that is None: of the newest attempt at the first look, and of all later ones.
    """

    def __init__(self, run: Storage, rank: int | None, attempt: int | None) -> None:
        self._run, self._rank, self._attempt = run, rank, attempt
        self._first = attempt
        self._feeds: dict[tuple[int, int], LogFeed] = {}

    def look(self, out: BinaryIO) -> bool:
        """Prints new lines; returns True while the run is active."""
        running = read_state(self._run) == "running"
        found = stored_parts(self._run)
        if not running and not self._feeds:
            _chosen(found, self._run, self._rank, self._attempt)  # raises an error that lists the logs that exist
        if found:
            self._first = self._first or found[-1].attempt
        ranks: dict[int, set[int]] = defaultdict(set)
        parts: dict[tuple[int, int], list[LogPart]] = defaultdict(list)
        for part in filter(self._wanted, found):
            ranks[part.attempt].add(part.rank)
            parts[part.attempt, part.rank].append(part)
        for (number, rank), its in parts.items():
            text = self._feeds.setdefault((number, rank), LogFeed(self._run)).new(its)
            if len(ranks[number]) > 1:
                text = b"".join(b"rank %d: %s" % (rank, line) for line in text.splitlines(keepends=True))
            out.write(text)
        out.flush()
        return running

    def _wanted(self, part: LogPart) -> bool:
        later = self._attempt is None and self._first is not None and part.attempt > self._first
        return (later or part.attempt == self._first) and self._rank in (None, part.rank)


def _chosen(parts: list[LogPart], run: Storage, rank: int | None, attempt: int | None) -> list[LogPart]:
    """Returns the parts of ``attempt`` (None: the newest) and of ``rank`` (None: all); InputError if there are none."""
    if not parts:
        raise InputError(
            f"{run.url} has no logs: its ranks have not started yet, or it is not a run; see `muster status {run.url}`"
        )
    attempts = sorted({part.attempt for part in parts})
    wanted = attempts[-1] if attempt is None else attempt
    if wanted not in attempts:
        raise InputError(f"there is no log of attempt {wanted}: there are logs of {_listed(attempts)}")
    found = [part for part in parts if part.attempt == wanted]
    ranks = sorted({part.rank for part in found})
    if rank is not None and rank not in ranks:
        raise InputError(f"there is no log of rank {rank} of attempt {wanted}: there are logs of {_listed(ranks)}")
    return [part for part in found if rank is None or part.rank == rank]


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers)) if len(numbers) <= 8 else f"{numbers[0]} to {numbers[-1]}"
