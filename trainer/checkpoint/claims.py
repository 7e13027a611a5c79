"""Who may write to a run: numbered claims, made once and never changed or deleted.

A *driver* claim ``claims/d000002`` is made by whoever takes the run over (the lease); an *attempt* claim
``claims/000003`` is made by a driver each time it starts workers, and names its driver. The highest numbers own the
run. Attempts are numbered 1, 2, 3, … without gaps, whichever driver made them.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from trainer import layout
from trainer.errors import Fenced
from trainer.storage import Storage, to_json


@dataclass(frozen=True)
class Claims:
    """The highest number of each kind, 0 where there is none."""

    driver: int
    attempt: int


def read_claims(storage: Storage) -> Claims:
    """One listing."""
    drivers, attempts = [0], [0]
    for info in storage.list(layout.CLAIMS):
        match = re.fullmatch(rf"{layout.CLAIMS}/(d?)(\d+)", info.key)
        if match:
            (drivers if match[1] else attempts).append(int(match[2]))
    return Claims(max(drivers), max(attempts))


def claim_driver(storage: Storage, holder: Mapping[str, Any]) -> int:
    """Takes the run: every older driver and its attempts are fenced from here on. Returns the driver's number."""
    return _claim(storage, lambda: read_claims(storage).driver, layout.driver_claim, holder)


def claim_attempt(storage: Storage, driver: int, holder: Mapping[str, Any]) -> int:
    """The next attempt of ``driver``, claimed before commits are listed; Fenced when a newer driver has the run."""

    def newest() -> int:
        claims = read_claims(storage)
        if claims.driver > driver:
            raise Fenced(_fenced(storage, f"driver {driver}", f"driver {claims.driver}"))
        return claims.attempt

    attempt = _claim(storage, newest, layout.attempt_claim, {**holder, "driver": driver})
    check_fence(storage, driver, attempt)
    return attempt


def check_fence(storage: Storage, driver: int, attempt: int) -> None:
    """Fenced when a newer driver or attempt has claimed the run; then nothing that was done counts any more."""
    claims = read_claims(storage)
    if claims.driver > driver:
        raise Fenced(_fenced(storage, f"driver {driver} (attempt {attempt})", f"driver {claims.driver}"))
    if claims.attempt > attempt:
        raise Fenced(_fenced(storage, f"attempt {attempt}", f"attempt {claims.attempt}"))


def _claim(storage: Storage, newest: Callable[[], int], key: Callable[[int], str], record: Mapping[str, Any]) -> int:
    """Each lost race means that somebody else's claim was made, so this ends as soon as the others stop claiming."""
    data = to_json({**record, "nonce": uuid.uuid4().hex})
    while True:
        number = newest() + 1
        if storage.put_if_absent(key(number), data):
            return number


def _fenced(storage: Storage, ours: str, theirs: str) -> str:
    return (
        f"{theirs} has taken over {storage.url}, so {ours} must not write any more. Nothing is lost: the run goes on "
        f"there; look at it with `muster status {storage.url}`"
    )
