"""Finds the cause among many failures.

When one rank fails, the others fail too, because their collectives break. So a worker that died comes first, then the
earliest exception that is not a broken collective, then the earliest of all.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from launcher.attempt import death
from trainer.run.failure import Failure, WorkerError

ERROR = re.compile(r"^[\w.]+(?:Error|Exception): (.+)$", re.MULTILINE)
TELLING = re.compile(r"killed|out of memory|exit|died|lost|unexpectedly", re.IGNORECASE)


def first_cause(failures: Mapping[int, BaseException]) -> Failure:
    """Returns the most likely cause in Ray Train's map of rank to exception, which holds at least one."""
    inner = {rank: unwrapped(error) for rank, error in failures.items()}
    dead = {rank: error for rank, error in inner.items() if not isinstance(error, WorkerError)}
    ours = [error for error in inner.values() if isinstance(error, WorkerError)]
    raised = sorted(ours, key=lambda e: (not e.fatal, e.cause.by_another, e.when))
    if raised and (raised[0].fatal or not dead):
        return raised[0].cause
    rank, error = min(dead.items())
    return death(rank, first_line(error))


def unwrapped(error: Any) -> BaseException:
    """Ray wraps what a training function raised, and what a health check found."""
    inner = getattr(error, "_base_exc", None) or getattr(error, "health_check_failure", None)
    return inner if isinstance(inner, BaseException) else error


def first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if TELLING.search(line)]
    return f"{type(error).__name__}: {(told or lines or ['no message'])[0]}"


def last_error(trace: str) -> str:
    """Returns the message of the last exception in a traceback's text, or the text's first line."""
    found = ERROR.findall(trace)
    return found[-1] if found else trace.partition("\n")[0]
