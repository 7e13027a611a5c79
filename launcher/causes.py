"""Which of many failures was the cause.

When one rank fails, the others fail with it: their collectives break. So a worker that died comes first, then the
earliest exception that is no broken collective, then the earliest at all.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.errors import (
    Fenced,
    InputError,
    MusterError,
    NonFiniteLoss,
    RewardFailed,
    UsageError,
    WorkerFailed,
    where_of,
)

FATAL = (UsageError, NonFiniteLoss, RewardFailed, Fenced)
COLLECTIVE = re.compile(r"gloo|nccl|connection (closed|reset)|process ?group|all_?reduce|broadcast", re.IGNORECASE)
TELLING = re.compile(r"killed|out of memory|exit|died|lost|unexpectedly", re.IGNORECASE)
SHOWN_LINES = 12
OWN_FRAMES = 3
ROOT = Path(__file__).resolve().parents[1]
OWN = tuple(f"{ROOT / part}/" for part in ("launcher", "trainer", "cluster"))


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
        if isinstance(error, MusterError):  # its text says where, and needs no trace
            return cls(when, rank, host, str(error), "", isinstance(error, FATAL), isinstance(error, UsageError))
        where = where_of(error)
        said = f"{f'{where}: ' if where else ''}{type(error).__name__}: {error}"
        return cls(when, rank, host, said, trace, False, False)


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

    def as_error(self, advice: str = "") -> MusterError:
        text = "\n".join(part for part in (self.message, _tail(self.trace), advice) if part)
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


def useful_stack(error: BaseException) -> str:
    """Of where the error first came up: the last of this program's own lines, and the very last."""
    while error.__cause__ is not None:
        error = error.__cause__
    *before, last = traceback.extract_tb(error.__traceback__) or [None]
    own = [frame for frame in before if frame is not None and frame.filename.startswith(OWN)][-OWN_FRAMES:]
    return "".join(traceback.format_list([*own, last] if last else []))


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
