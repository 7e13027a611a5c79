"""When to stop starting the workers again: what fails in the same way at the same step will fail there for ever."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

SAME_FAULTS = 3
_TEMPORARY = re.compile(r"(?<=/)(tmp|[\w-]+-)[a-z0-9_]{8}(?=/)")  # as tempfile names folders
_VARYING = re.compile(r"0x[0-9a-f]+|\b[0-9a-f]{12,}\b|\d+", re.IGNORECASE)
_WHERE = re.compile(r"^rank \d+( on \S+?)?( died)?( \([^)]*\))?: ")


@dataclass(frozen=True)
class CrashSignature:
    """One failure of the worker group. ``step``: the last step in the run's metrics by then, None if the storage did
    not answer; ``error``: the first cause, as the user sees it."""

    step: int | None
    error: str

    @property
    def kind(self) -> str:
        """The error without what differs between two of the same kind: rank, host, numbers, addresses, ids, and the
        names of temporary folders."""
        return _VARYING.sub("#", _TEMPORARY.sub(r"\1#", _WHERE.sub("", self.error)))


def in_a_row(faults: Sequence[CrashSignature]) -> int:
    """How many of the newest faults are the same one: same step, same kind. At least 1; 0 for none at all."""
    if not faults:
        return 0
    newest = faults[-1]
    if newest.step is None:
        return 1
    count = 0
    for fault in reversed(faults):
        if (fault.step, fault.kind) != (newest.step, newest.kind):
            break
        count += 1
    return count


def is_hopeless(faults: Sequence[CrashSignature]) -> bool:
    """Returns True if the same step has failed with the same error `SAME_FAULTS` times in a row, whatever
    ``resources.max_failures`` still allows."""
    return in_a_row(faults) >= SAME_FAULTS
