"""One finding: what is wrong, where, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Level = Literal["failure", "warning"]
Verdict = Literal["ready", "warnings", "not ready"]


@dataclass(frozen=True)
class Finding:
    """A problem and its fix. ``where``: hosts, ranks, or another subject; ``do``: the next step for the user."""

    level: Level
    what: str
    where: str
    do: str


def failure(where: str, what: str, do: str) -> Finding:
    return Finding("failure", what, where, do)


def warning(where: str, what: str, do: str) -> Finding:
    return Finding("warning", what, where, do)


def verdict(findings: Iterable[Finding]) -> Verdict:
    """Returns the overall result. A failure would prevent a run or end it; with warnings only, the run trains."""
    levels = {finding.level for finding in findings}
    if "failure" in levels:
        return "not ready"
    return "warnings" if levels else "ready"
