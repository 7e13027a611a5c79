"""Claims: numbered records that decide who may write to a run. They are made once and never changed or deleted.

A *driver* claim ``claims/d000002`` is made by each driver that takes the run (the lease); an *attempt* claim
``claims/000003`` is made by a driver each time it starts workers, and names its driver. The highest numbers own the
run. Attempts are numbered 1, 2, 3, … without gaps over all drivers.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from trainer.errors import Fenced, StorageError
from trainer.run import layout
from trainer.storage import Storage, to_json

_MOST_RACES = 100


@dataclass(frozen=True)
class Claims:
    """The highest number of each kind, 0 where there is none."""

    driver: int
    attempt: int


def read_claims(storage: Storage, *, known: Collection[str] = ()) -> Claims:
    """Reads the claims by one listing. Raises StorageError when it lacks one of the ``known`` claims, which are never
    deleted."""
    drivers, attempts = [0], [0]
    for info in storage.list(layout.CLAIMS, containing=known):
        match = re.fullmatch(rf"{layout.CLAIMS}/(d?)(\d+)", info.key)
        if match:
            (drivers if match[1] else attempts).append(int(match[2]))
    return Claims(max(drivers), max(attempts))


def claim_driver(storage: Storage, holder: Mapping[str, Any]) -> int:
    """Takes the run: every older driver and its attempts are fenced from here on. Returns the driver's number."""
    return _claim(storage, lambda known: read_claims(storage, known=known).driver, layout.driver_claim, holder)


def claim_driver_after(storage: Storage, older: int, holder: Mapping[str, Any]) -> bool:
    """Claims the number after ``older``, the newest driver that the caller has seen. Returns False, and fences no
    driver, when another driver has claimed it first."""
    return storage.put_if_absent(layout.driver_claim(older + 1), _claim_of(holder))


def claim_attempt(storage: Storage, driver: int, holder: Mapping[str, Any]) -> int:
    """Claims the next attempt of ``driver``, and returns its number. The caller lists commits only after this. Raises
    Fenced when a newer driver has the run."""

    def newest(known: Collection[str]) -> int:
        claims = read_claims(storage, known=[layout.driver_claim(driver), *known])
        if claims.driver > driver:
            raise Fenced(_fenced(storage, f"driver {driver}", f"driver {claims.driver}"))
        return claims.attempt

    attempt = _claim(storage, newest, layout.attempt_claim, {**holder, "driver": driver})
    check_fence(storage, driver, attempt)
    return attempt


def check_fence(storage: Storage, driver: int, attempt: int) -> None:
    """Raises Fenced when a newer driver or attempt has claimed the run: then this attempt's work is no longer valid.

    Raises StorageError when the listing lacks this attempt's own claims: it may then lack a newer one as well."""
    claims = read_claims(storage, known=[layout.driver_claim(driver), layout.attempt_claim(attempt)])
    if claims.driver > driver:
        raise Fenced(_fenced(storage, f"driver {driver} (attempt {attempt})", f"driver {claims.driver}"))
    if claims.attempt > attempt:
        raise Fenced(_fenced(storage, f"attempt {attempt}", f"attempt {claims.attempt}"))


def _claim(
    storage: Storage, newest: Callable[[Collection[str]], int], key: Callable[[int], str], record: Mapping[str, Any]
) -> int:
    """Claims the number after the newest one, and returns it."""
    data = _claim_of(record)
    lost: list[str] = []
    for _ in range(_MOST_RACES):
        number = newest(lost) + 1
        if storage.put_if_absent(key(number), data):
            return number
        # Another process has made this claim, so the next listing has to show it. Without that requirement the loop
        # would not end in a store that refuses a key and does not list it.
        lost = [key(number)]
    raise StorageError(
        f"{_MOST_RACES} claims of {storage.url} were lost to other processes in a row; stop the others, and start again"
    )


def _claim_of(record: Mapping[str, Any]) -> bytes:
    return to_json({**record, "nonce": uuid.uuid4().hex})


def _fenced(storage: Storage, ours: str, theirs: str) -> str:
    return (
        f"{theirs} has taken over {storage.url}, so {ours} must not write any more. Nothing is lost: the run "
        f"continues there; look at it with `muster status {storage.url}`"
    )
