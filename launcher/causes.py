"""Which of many failures was the cause.

When one rank fails, the others fail with it: their collectives break. So a worker that died comes first, then the
earliest exception that is no broken collective, then the earliest at all.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trainer.errors import Fenced, InputError, MusterError, NonFiniteLoss, RewardFailed, UsageError, WorkerFailed

FATAL = (UsageError, NonFiniteLoss, RewardFailed, Fenced)
COLLECTIVE = re.compile(r"gloo|nccl|connection (closed|reset)|process ?group|all_?reduce|broadcast", re.IGNORECASE)
TELLING = re.compile(r"killed|out of memory|exit|died|lost|unexpectedly", re.IGNORECASE)
SHOWN_LINES = 12


class Failure(Exception):
    """An exception of one rank, as it crosses from the worker to the driver. Times are Unix seconds."""

    def __init__(self, when: float, rank: int, host: str, error: str, trace: str, fatal: bool, usage: bool) -> None:
        super().__init__(when, rank, host, error, trace, fatal, usage)
        self.when, self.rank, self.host, self.error, self.trace = when, rank, host, error, trace
        self.fatal, self.usage = fatal, usage

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host}: {self.error}"

    @classmethod
    def of(cls, error: BaseException, when: float, rank: int, host: str, trace: str) -> Failure:
        said = str(error) if isinstance(error, MusterError) else f"{type(error).__name__}: {error}"
        shown = "" if isinstance(error, MusterError) else trace
        return cls(when, rank, host, said, shown, isinstance(error, FATAL), isinstance(error, UsageError))


@dataclass(frozen=True)
class Cause:
    """The first failure of an attempt. ``fatal``: trying again would end the same."""

    message: str
    rank: int | None = None
    host: str | None = None
    fatal: bool = False
    usage: bool = False
    trace: str = ""
    died: bool = False

    @property
    def by_another(self) -> bool:
        """Whether the rank may have failed of what another one did to it: it was killed, or its collectives broke."""
        return self.died or COLLECTIVE.search(self.message) is not None

    def as_error(self) -> MusterError:
        text = self.message if not self.trace else f"{self.message}\n{_tail(self.trace)}"
        return InputError(text) if self.usage else WorkerFailed(text)


def first_cause(failures: Mapping[int, BaseException]) -> Cause:
    """From Ray Train's map of rank to exception, which holds at least one."""
    inner = {rank: unwrapped(error) for rank, error in failures.items()}
    dead = {rank: error for rank, error in inner.items() if not isinstance(error, Failure)}
    raised = sorted((e for e in inner.values() if isinstance(e, Failure)), key=_suspicion)
    if raised and (raised[0].fatal or not dead):
        first = raised[0]
        return Cause(str(first), first.rank, first.host, first.fatal, first.usage, first.trace)
    rank, error = min(dead.items())
    return Cause(f"rank {rank} died: {_first_line(error)}", rank, died=True)


def _suspicion(failure: Failure) -> tuple[bool, bool, float]:
    return not failure.fatal, bool(COLLECTIVE.search(failure.error)), failure.when


def unwrapped(error: Any) -> BaseException:
    """Ray wraps what a training function raised, and what a health check found."""
    inner = getattr(error, "_base_exc", None) or getattr(error, "health_check_failure", None)
    return inner if isinstance(inner, BaseException) else error


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if TELLING.search(line)]
    return f"{type(error).__name__}: {(told or lines or ['no message'])[0]}"


def _tail(trace: str) -> str:
    return "\n".join(trace.strip().splitlines()[-SHOWN_LINES:])
