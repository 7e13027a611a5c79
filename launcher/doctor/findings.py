"""One finding: what is wrong, where, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Level = Literal["failure", "warning"]
Verdict = Literal["ready", "warnings", "not ready"]


@dataclass(frozen=True)
class Finding:
    """``where``: hosts or ranks, or what the finding is about; ``do``: the next step of whoever reads it."""

    level: Level
    what: str
    where: str
    do: str


def failure(where: str, what: str, do: str) -> Finding:
    return Finding("failure", what, where, do)


def warning(where: str, what: str, do: str) -> Finding:
    return Finding("warning", what, where, do)


def verdict(findings: Iterable[Finding]) -> Verdict:
    """A failure is what would end a run, or keep it from starting; with warnings alone it trains."""
    levels = {finding.level for finding in findings}
    if "failure" in levels:
        return "not ready"
    return "warnings" if levels else "ready"
