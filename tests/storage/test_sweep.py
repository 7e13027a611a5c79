"""The commit protocol, retention, lease and restore over a storage that refuses to look, hangs or lies, at each of its
operations in turn: no acknowledged commit is lost, nothing is deleted by a false listing, and every call ends."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.storage.doubles import FaultyBackend
from trainer.checkpoint import (
    CommitRecord,
    Retention,
    check_fence,
    claim_attempt,
    claim_driver,
    commit,
    fetch_newest,
    list_commits,
    newest_complete,
    put_checkpoint,
    read_claims,
)
from trainer.errors import Fenced, MusterError, StorageError
from trainer.run.lease import Lease
from trainer.storage import ObjectInfo, Retry, Storage
from trainer.storage.backend import Entries, Listing, Moved, NoAnswer, Transient

KEEP_LAST = 2
STEPS = (5, 10, 15)
VERBS = ("read", "write", "create", "list", "entries", "info", "delete", "upload", "abort_uploads")
LASTING = (1, 2, 10**6)
"""For how many operations a fault lasts: one, a retry, and to the end of the attempt."""


class Lying(FaultyBackend):
    """From operation number ``at`` on, ``lasts`` operations of ``verb`` meet the fault ``kind``:

    refuses   the look fails, as after EIO or ESTALE
    hangs     no reply before the test's end
    hides     a listing lacks its last names; a read or a look says that nothing is there
    thins     a listing lacks every second name
    skips     a listing lacks its first name, that of an older attempt's newest commit, and has one's own
    cuts      a read gives half of the bytes
    forgets   a write, create or delete is answered as done, without effect
    """

    def __init__(self, verb: str, kind: str, at: int, lasts: int) -> None:
        super().__init__()
        self.verb, self.kind, self.at, self.lasts = verb, kind, at, lasts
        self.count, self.met, self.well = 0, 0, False
        self.released: threading.Event | None = None

    def _meets(self, verb: str) -> bool:
        """Whether this operation is a faulty one; one that is to hang or to be refused does not come back from here."""
        if self.well or verb != self.verb:
            return False
        self.count += 1
        if not self.at < self.count <= self.at + self.lasts:
            return False
        self.met += 1
        if self.kind == "refuses":
            raise Transient("[Errno 116] Stale file handle")
        if self.kind == "hangs":
            if self.released is None:
                raise NoAnswer("no answer in time")  # as the limit of a call gives it up
            self.released.wait()
            raise Transient("too late")
        return True

    def read(self, path: str) -> bytes:
        return self._lie(super().read(path), path) if self._meets("read") else super().read(path)

    def read_range(self, path: str, start: int, stop: int) -> bytes:
        data = super().read(path)[start:stop]
        return self._lie(data, path) if self._meets("read") else data

    def _lie(self, data: bytes, path: str) -> bytes:
        if self.kind == "cuts":
            return data[: len(data) // 2]
        raise FileNotFoundError(path)

    def info(self, path: str) -> ObjectInfo | None:
        return None if self._meets("info") else super().info(path)

    def list(self, path: str, moved: Moved) -> Listing:
        lies = self._meets("list")
        found = sorted(super().list(path, moved))
        if not lies:
            return found
        return {"thins": found[1::2], "skips": found[1:]}.get(self.kind, found[: len(found) // 2])

    def entries(self, path: str) -> Entries:
        if self._meets("entries"):
            return Entries([], [])
        lead = path + "/"
        names = [p[len(lead) :] for p in self.objects if p.startswith(lead)]
        return Entries([], sorted({name.split("/")[0] for name in names if "/" in name}))

    def write(self, path: str, data: bytes) -> None:
        if not self._meets("write"):
            super().write(path, data)

    def create(self, path: str, data: bytes) -> None:
        if not self._meets("create"):
            super().create(path, data)

    def delete(self, path: str) -> None:
        if not self._meets("delete"):
            super().delete(path)

    def upload(self, path: str, source: str, moved: Moved) -> None:
        if not self._meets("upload"):
            FaultyBackend.write(self, path, Path(source).read_bytes())

    def abort_uploads(self, path: str, stale: Callable[[str], bool]) -> int:
        self._meets("abort_uploads")
        return 0


@dataclass
class Acknowledged:
    """What an attempt has reported."""

    commits: list[CommitRecord] = field(default_factory=list)
    restored: list[int] = field(default_factory=list)


def attempt(storage: Storage, done: Acknowledged, folder: Path, check: Callable[[], None] = lambda: None) -> None:
    """What a driver and its worker ask of a run's storage, in their order; it ends with the first error. ``check`` is
    called after each acknowledged commit's retention."""
    lease = Lease.acquire(storage, takeover=True, renew_s=3600.0)
    try:
        number = claim_attempt(storage, lease.driver, {})
        found = fetch_newest(storage, folder / f"restored-{number}", on_skip=lambda *_: None)
        done.restored.append(found.step if found else 0)
        retention = Retention(storage, number, keep_last=KEEP_LAST)
        for step in STEPS:
            at = done.restored[-1] + step
            (folder / "new").mkdir(exist_ok=True)
            (folder / "new" / "weights").write_bytes(b"%d" % at)
            name, files = put_checkpoint(storage, folder / "new", attempt=number, step=at)
            record = CommitRecord(at, number, lease.driver, name, name, files, {}, "2026-01-01T00:00:00+00:00")
            commit(storage, record)
            done.commits.append(record)
            retention.apply(record)
            check()
    finally:
        lease.release("interrupted", deadline_s=0.05)


@contextmanager
def over(backend: Lying) -> Iterator[Storage]:
    """Time passes by waiting alone: however busy the machine is, the same is given up at the same moment."""
    slept = [0.0]
    at_once: Any = lambda attempt, silence_s: attempt(lambda: None)  # noqa: E731
    yield Storage("lying://run", backend, Retry(30.0, clock=lambda: sum(slept), sleep=slept.append, limited=at_once))


CASES = [
    (verb, kind)
    for verb, kind in itertools.product(VERBS, ("refuses", "hangs", "hides", "thins", "skips", "cuts", "forgets"))
    if (kind != "hides" or verb in ("read", "list", "entries", "info"))
    and (kind != "cuts" or verb == "read")
    and (kind not in ("thins", "skips") or verb == "list")
    and (kind != "forgets" or verb in ("write", "create", "delete", "upload"))
]


@pytest.mark.parametrize(("verb", "kind"), CASES)
@pytest.mark.parametrize("lasts", LASTING)
def test_nothing_acknowledged_is_lost_whatever_an_operation_answers(
    verb: str, kind: str, lasts: int, tmp_path: Path
) -> None:
    for at in itertools.count():
        folder = tmp_path / f"{at}"
        folder.mkdir()
        backend = Lying(verb, kind, at, lasts)
        with over(backend) as storage:
            done = Acknowledged()
            backend.well = True
            attempt(storage, done, folder)  # three commits, of which two stay
            backend.well = False
            with suppress(MusterError, FileNotFoundError):
                attempt(storage, done, folder, partial(_check, backend, storage, done))
            if (verb, kind) == ("read", "hides"):  # what is listed is there, whatever a read says
                assert done.restored[1:] in ([], [STEPS[-1]])
            met = backend.met
            _check(backend, storage, done)
            backend.well = True
            attempt(storage, done, folder)  # the storage is well again: the run goes on from there
            assert done.restored[-1] >= max(r.step for r in done.commits[: -len(STEPS)])
        if not met:
            assert at, f"no {verb} was asked for"
            return


def _check(backend: Lying, storage: Storage, done: Acknowledged) -> None:
    """The newest acknowledged commits are all there, and whole, as a look without a fault shows."""
    backend.well, before = True, backend.well
    found = newest_complete(storage, on_skip=lambda *_: None)
    assert found is not None
    assert found[0].step >= done.commits[-1].step
    listed = {(record.attempt, record.step) for record in list_commits(storage)}
    kept = sorted(done.commits, key=lambda r: (r.attempt, r.step))[-KEEP_LAST:]
    assert listed >= {(r.attempt, r.step) for r in kept}
    for record in kept:
        assert all(storage.info(record.file_key(name)) for name in record.files)
    backend.well = before


def test_a_listing_of_claims_without_ones_own_passes_nobody() -> None:
    """A fenced attempt must not take "could not see the claims" for "nobody has claimed"."""
    backend = Lying("list", "hides", 0, 10**6)
    with over(backend) as storage:
        backend.well = True
        driver = claim_driver(storage, {})
        number = claim_attempt(storage, driver, {})
        claim_driver(storage, {})
        backend.well = False
        with pytest.raises(StorageError, match=r"the listing does not show claims/"):
            check_fence(storage, driver, number)
        backend.well = True
        with pytest.raises(Fenced):
            check_fence(storage, driver, number)


def test_claims_of_a_store_that_never_lists_them_end() -> None:
    """As of ``s3://bucket//prefix``, where objects are written and never listed."""
    backend = Lying("list", "hides", 0, 10**6)
    with over(backend) as storage:
        assert claim_driver(storage, {}) == 1, "nobody has claimed before"
        with pytest.raises(StorageError, match=r"does not show claims/d000001"):
            claim_driver(storage, {})


def test_a_hung_renewal_is_abandoned_and_the_lease_stays_fresh() -> None:
    backend = Lying("write", "hangs", 1, 1)
    backend.released = threading.Event()
    storage = Storage("lying://run", backend, Retry(60.0, first_s=0.001, attempt_s=1.0))
    lease = Lease.acquire(storage, takeover=True, renew_s=0.001)
    beats = _beats(storage)
    assert next(beats) < next(beats) < next(beats), "renewals go on"
    assert backend.met == 1
    lease.release("succeeded")
    backend.released.set()
    assert read_claims(storage).driver == 1


def _beats(storage: Storage) -> Iterator[int]:
    """The lease's beats as they change; the test's own limit ends a wait for one that does not come."""
    before = 0
    while True:
        beat = int(storage.read_json("lease")["beat"])
        if beat != before:
            yield beat
        before = beat
