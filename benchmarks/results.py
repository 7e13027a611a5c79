"""What a benchmark found, as JSON that says where: figures of runs that took turns, with versions and machine.

A *figure* has a name and one value per round. Rounds of different figures with the same index stood side by side in
time, so that what a busy machine does to one it does to its neighbour: ratios are taken round by round.
"""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

LIBRARIES = ("torch", "transformers", "peft", "accelerate", "numpy")
FLOOR = 0.03
"""Of a figure: what moves by less is noise, however near its rounds happen to lie."""


@dataclass(frozen=True)
class Spread:
    """The median of some values, and the least and the greatest of them."""

    median: float
    least: float
    greatest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        if not values:
            raise ValueError("a spread needs at least one value")
        return cls(statistics.median(values), min(values), max(values))

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.least:.2f} to {self.greatest:.2f})"


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> Spread:
    """``ours`` over ``theirs``, round by round. Raises ValueError when they had not the same rounds."""
    return Spread.of([a / b for a, b in zip(ours, theirs, strict=True)])


@dataclass(frozen=True)
class Move:
    """A figure in two results. ``change``: the later median over the earlier one; ``beyond``: whether their ranges are
    apart, by more than ``FLOOR``."""

    name: str
    before: Spread
    after: Spread

    @property
    def change(self) -> float:
        return self.after.median / self.before.median

    @property
    def beyond(self) -> bool:
        apart = self.after.least > self.before.greatest or self.after.greatest < self.before.least
        return apart and abs(self.change - 1) > FLOOR


def moves(before: Mapping[str, Sequence[float]], after: Mapping[str, Sequence[float]]) -> list[Move]:
    """Of the figures that both have, in the order of the first."""
    return [Move(name, Spread.of(before[name]), Spread.of(after[name])) for name in before if name in after]


def write(path: Path, benchmark: str, figures: Mapping[str, Sequence[float]], **more: Any) -> None:
    """``figures``: values of each round by name; ``more``: whatever else is worth keeping."""
    found = {
        "benchmark": benchmark,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions(),
        "figures": {name: list(values) for name, values in figures.items()},
        **more,
    }
    path.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")


def read(path: Path) -> dict[str, Any]:
    """Raises ValueError for a file that `write` has not written."""
    found: dict[str, Any] = json.loads(path.read_text())
    if not isinstance(found, dict) or not {"benchmark", "machine", "versions", "figures"} <= found.keys():
        raise ValueError(f"{path} is no result of a benchmark: it lacks figures, machine or versions")
    return found


def machine() -> dict[str, Any]:
    """What figures depend on, without the machine's name."""
    return {
        "processor": _from_proc("cpuinfo", r"model name\s*:\s*(.+)") or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(int(_from_proc("meminfo", r"MemTotal:\s*(\d+)") or 0) / 2**20, 1),
        "system": f"{platform.system()} {platform.release()}",
        "load": round(os.getloadavg()[0], 2),
    }


def versions(libraries: Sequence[str] = LIBRARIES) -> dict[str, str]:
    found = {"python": platform.python_version()}
    for library in libraries:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            continue
    return found


def _from_proc(name: str, pattern: str) -> str | None:
    path = Path("/proc", name)
    found = re.search(pattern, path.read_text()) if path.exists() else None
    return found[1] if found else None
