"""How often each rank writes into the run's storage, so that many ranks together do not flood it."""

from __future__ import annotations

WRITES_S = 10.0
"""Writes per second of all ranks together, of each kind (logs, ledger)."""


def write_interval_s(rank: int, ranks: int, least_s: float) -> float:
    """Returns the seconds between two writes of one kind: ``least_s``, or longer where many ranks write. Rank 0, whose
    output people follow, always has ``least_s``."""
    return least_s if rank == 0 else max(least_s, ranks / WRITES_S)
