"""The commit protocol over all interleavings, and that each of its steps is needed (protocol_model.py explores)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest

from tests.unit.trainer.checkpoint.protocol_model import (
    Log,
    Model,
    Played,
    Process,
    Store,
    Violation,
    Worker,
    answer,
    one_thread,
    read_from_outside,
    storage_over,
)
from trainer.checkpoint import Retention, claim_driver
from trainer.storage import Storage

ONE = Worker(commits=1)
TWO = Worker(commits=2)
RESTARTED = Worker(driver=1, commits=1)


class Alone(Played):
    """A process that nobody disturbs, and the store that it leaves behind."""

    def __init__(self) -> None:
        self.store: Store = {}

    def _ask(self, verb: str, path: str, data: bytes = b"") -> Any:
        self.store, (said,) = answer(self.store, (verb, path, data))
        if isinstance(said, type):
            raise said(path)
        return said


def left_by(process: Process) -> Store:
    backend = Alone()
    with one_thread():
        process(storage_over(backend), Log())
    return backend.store


NIGHT = pytest.mark.night
"""Every interleaving is tried: tens of thousands."""


@pytest.mark.parametrize(
    ("processes", "lost_replies"),
    [
        pytest.param([ONE, TWO], 0, id="two drivers, retention of one's own and of the other's commits", marks=NIGHT),
        pytest.param([ONE, ONE], 1, id="two drivers and a lost reply anywhere"),
        pytest.param([TWO, Worker(commits=1, ranks=2)], 0, id="the second driver has two ranks", marks=NIGHT),
        pytest.param([Worker(commits=2, keep_last=2), ONE], 0, id="the first keeps two checkpoints", marks=NIGHT),
    ],
)
def test_two_drivers(processes: list[Process], lost_replies: int) -> None:
    assert Model(processes, lost_replies=lost_replies).explore() > 5000


def test_workers_that_are_restarted_while_the_old_ones_live() -> None:
    """The driver starts attempts of its own number; the one before is cut off, not dead."""
    assert Model([RESTARTED, replace(RESTARTED, commits=2)], store=held()).explore() > 5000
    assert Model([RESTARTED, RESTARTED], store=left_by(TWO)).explore() > 1000


def held() -> Store:
    return left_by(lambda storage, log: claim_driver(storage, {}) and None)


@pytest.mark.night
def test_three_attempts_after_a_run_that_was_killed() -> None:
    """One is about to commit and one in the middle of its sweep when the third starts."""
    processes = [Worker(driver=1, commits=1), Worker(driver=1, commits=1), Worker(commits=1)]
    store = _killed_while_uploading()
    assert Model(processes, store=store, held_at=["create commits", "list checkpoints"]).explore() > 5000


def _killed_while_uploading() -> Store:
    store = dict(left_by(ONE))
    blob = next(path for path in store if "/checkpoints/" in path)
    return {**store, blob.replace("s000000001-", "s000000002-"): b"2"}


def test_who_only_reads_always_finds_a_checkpoint() -> None:
    assert Model([Worker(driver=1, commits=2), read_from_outside], store=left_by(ONE)).explore() > 200


class BlobsFirst(Storage):
    """Retention's deletions in the other order: the record goes when its files are gone."""

    def __init__(self, *parts: Any) -> None:
        super().__init__(*parts)
        self.records: list[str] = []

    def delete(self, keys: Iterable[str]) -> None:
        keys = list(keys)
        if keys and all(key.startswith("commits/") for key in keys):
            self.records = keys
            return
        super().delete(keys)
        super().delete(self.records)


def all_unnamed(retention: Retention, named: Iterable[str], listed: object) -> set[str]:
    return set(retention._storage.folders("checkpoints")) - set(named)


MUTANTS: dict[str, Callable[[], Model]] = {
    "commits are listed before the claim": lambda: Model(
        [RESTARTED, replace(RESTARTED, claim_first=False)], store=held()
    ),
    "a store without put-if-absent": lambda: Model([ONE, ONE], exclusive=False),
    "files are deleted before their record": lambda: Model([Worker(commits=2), ONE], kind=BlobsFirst),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_step_that_is_left_out_is_found_out(mutant: str) -> None:
    with pytest.raises(Violation, match="the way to it"):
        MUTANTS[mutant]().explore()


@pytest.mark.parametrize(
    ("target", "replacement"),
    [
        pytest.param("protocol.check_fence", lambda *_: None, id="no look for a newer claim after the commit (step 4)"),
        pytest.param("Retention._orphans", all_unnamed, id="the sweep takes files of newer attempts"),
    ],
)
def test_a_changed_step_is_found_out(target: str, replacement: Callable[..., None]) -> None:
    with mock.patch(f"trainer.checkpoint.{target}", replacement), pytest.raises(Violation, match="the way to it"):
        Model([ONE, TWO]).explore()


def test_a_reader_who_lists_once_is_found_out() -> None:
    def once(storage: Storage, log: Log) -> None:
        with mock.patch("trainer.checkpoint.restore.commit_keys", _once(storage)):
            read_from_outside(storage, log)

    with pytest.raises(Violation, match="found nothing"):
        Model([Worker(driver=1, commits=2), once], store=left_by(ONE)).explore()


def _once(storage: Storage) -> Callable[[Storage], Any]:
    from trainer.checkpoint.protocol import commit_keys

    listings = iter([commit_keys])
    return lambda s: next(listings, lambda _: [])(s)
