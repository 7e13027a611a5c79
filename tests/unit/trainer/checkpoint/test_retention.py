"""Which checkpoints stay, by number and by age, and that nothing is left behind of what does not."""

from __future__ import annotations

import errno
from datetime import UTC, datetime
from pathlib import Path

import pytest

from tests.storage.doubles import FaultyBackend, faulty, unreadable
from tests.support.s3 import S3
from trainer.checkpoint import CommitRecord, Retention, commit, list_commits, put_checkpoint
from trainer.checkpoint.retention import kept
from trainer.errors import InputError, StorageError
from trainer.run import layout
from trainer.storage import Storage, open_storage

HOUR = 3600.0
NOW = datetime(2026, 5, 1, tzinfo=UTC).timestamp()


def record(step: int, *, attempt: int = 1, hours_ago: float = 0.0, name: str = "c") -> CommitRecord:
    at = datetime.fromtimestamp(NOW - hours_ago * HOUR, UTC).isoformat()
    return CommitRecord(step, attempt, 1, f"nonce {attempt} {step}", name, {}, {}, at)


def save(storage: Storage, step: int, *, attempt: int = 1, hours_ago: float = 0.0) -> CommitRecord:
    storage.write_json(layout.driver_claim(1), {})
    storage.write_json(layout.attempt_claim(attempt), {})
    name, files = put_checkpoint(storage, {"x": b"%d" % step}, attempt=attempt, step=step)
    made = record(step, attempt=attempt, hours_ago=hours_ago, name=name)
    made = CommitRecord(**{**made.__dict__, "files": files})
    commit(storage, made)
    return made


RECORDS = [record(step, hours_ago=10 - step) for step in range(1, 11)]


@pytest.mark.parametrize(
    ("keep_last", "keep_for_hours", "expected"),
    [(1, None, [10]), (3, None, [8, 9, 10]), (99, None, range(1, 11)), (1, 4.5, range(6, 11)), (6, 1.5, range(5, 11))],
)
def test_a_checkpoint_stays_for_its_rank_or_its_age(
    keep_last: int, keep_for_hours: float | None, expected: range | list[int]
) -> None:
    keep_for_s = None if keep_for_hours is None else keep_for_hours * HOUR
    assert sorted(step for _, step in kept(RECORDS, keep_last, keep_for_s, NOW)) == list(expected)


def test_the_newest_generation_counts_first_and_the_newest_stays_whatever_its_age() -> None:
    mixed = [record(50, attempt=1, hours_ago=2), record(20, attempt=2, hours_ago=1), record(30, attempt=1, hours_ago=3)]
    assert kept(mixed, 2, None, NOW) == {(2, 20), (1, 50)}
    assert kept([record(5, hours_ago=1000)], 1, HOUR, NOW) == {(1, 5)}
    assert kept([], 1, HOUR, NOW) == set()


def naming(storage: Storage, step: int, best: tuple[int, int], *, attempt: int = 1) -> CommitRecord:
    """Commits a record that names the best one by its attempt and step."""
    storage.write_json(layout.driver_claim(1), {})
    storage.write_json(layout.attempt_claim(attempt), {})
    name, files = put_checkpoint(storage, {"x": b"%d" % step}, attempt=attempt, step=step)
    state = {"best": {"metric": "eval_loss", "value": 1.0, "attempt": best[0], "step": best[1]}}
    plain = record(step, attempt=attempt, name=name)
    made = CommitRecord(**{**plain.__dict__, "files": files, "state": state})
    commit(storage, made)
    return made


def stored(storage: Storage) -> list[tuple[int, int]]:
    """Returns (attempt, step) of the records whose files are all there, and fails for files of no record."""
    records = list_commits(storage)
    assert len(storage.folders(layout.CHECKPOINTS)) == len(records)
    assert all(storage.info(one.file_key(name)) for one in records for name in one.files)
    return sorted((one.attempt, one.step) for one in records)


def test_the_best_one_stays_as_long_as_a_record_names_it() -> None:
    storage, _ = faulty()
    retention = Retention(storage, 1, keep_last=2)
    found = []
    for step, best in ((2, 2), (4, 2), (6, 2), (8, 8), (10, 8), (12, 8)):
        retention.apply(naming(storage, step, (1, best)))
        found.append([step for _, step in stored(storage)])
    assert found == [[2], [2, 4], [2, 4, 6], [2, 6, 8], [8, 10], [8, 10, 12]]


def test_the_best_one_of_an_earlier_attempt_stays() -> None:
    storage, _ = faulty()
    first = Retention(storage, 1, keep_last=1)
    for step in (2, 4):
        first.apply(naming(storage, step, (1, 2)))
    second = Retention(storage, 2, keep_last=1)
    for step in (5, 6):
        second.apply(naming(storage, step, (1, 2), attempt=2))
    assert stored(storage) == [(1, 2), (2, 6)]


def test_a_best_one_that_cannot_be_read_now_is_not_deleted() -> None:
    storage, _ = faulty()
    retention = Retention(storage, 1, keep_last=1)
    retention.apply(naming(storage, 2, (1, 2)))
    whole = storage.read(layout.commit(1, 2))
    storage.write(layout.commit(1, 2), b"not now")
    later = Retention(storage, 2, keep_last=1)
    for step in (4, 6):
        later.apply(naming(storage, step, (1, 2), attempt=2))
    storage.write(layout.commit(1, 2), whole)
    assert [(one.attempt, one.step) for one in list_commits(storage)] == [(2, 6), (1, 2)]
    assert storage.info(list_commits(storage)[1].file_key("x")) is not None


def test_records_are_read_once_whatever_their_number() -> None:
    storage, backend = faulty()
    for step in range(1, 31):
        save(storage, step)
    retention = Retention(storage, 2, keep_last=2, keep_for_s=100 * HOUR, clock=lambda: NOW)
    reads: list[str] = []
    backend.before = lambda verb, path: reads.append(path) if verb == "read" else None
    for step in range(31, 41):
        assert retention.apply(save(storage, step, attempt=2)) == []
    assert len(reads) == len(set(reads)) == 30, "and its own not at all"


def test_age_lets_go_record_and_files() -> None:
    storage, _ = faulty()
    for step in (1, 2, 3, 4):
        newest = save(storage, step, hours_ago=5 - step)
    assert Retention(storage, 1, keep_last=1, keep_for_s=2.5 * HOUR, clock=lambda: NOW).apply(newest) == [1, 2]
    assert [r.step for r in list_commits(storage)] == [4, 3]
    assert storage.folders(layout.CHECKPOINTS) == sorted(r.checkpoint for r in list_commits(storage))


def test_a_store_that_forbids_to_list_uploads_stops_nothing(caplog: pytest.LogCaptureFixture) -> None:
    class Forbidding(FaultyBackend):
        def abort_uploads(self, path: str, stale: object) -> int:
            raise InputError("s3:ListBucketMultipartUploads is not granted")

    storage, _ = faulty()
    storage._backend = Forbidding()
    assert Retention(storage, 1, keep_last=1).apply(save(storage, 1)) == []
    assert "s3:ListBucketMultipartUploads is not granted" in caplog.text


def test_uploads_of_dead_attempts_are_aborted_in_s3(moto: S3) -> None:
    fs = moto.filesystem()
    older, ours = "a000001-s000000005-0123456789ab", "a000002-s000000006-0123456789ab"
    keys = [f"a-run/checkpoints/{older}/{i:04d}" for i in range(3)]
    keep = [f"a-run/checkpoints/{ours}/x", "a-run/checkpoints/by-hand/x", f"other/checkpoints/{older}/x"]
    for key in keys + keep:
        fs.call_s3("create_multipart_upload", Bucket="runs", Key=key)
    storage = open_storage("s3://runs/a-run")
    Retention(storage, 2, keep_last=1).apply(save(storage, 7, attempt=2))
    assert sorted(upload["Key"] for upload in fs.list_multipart_uploads("runs")) == sorted(keep)


def test_temporary_files_of_dead_attempts_are_deleted_from_a_folder(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path))
    older = tmp_path / "checkpoints" / "a000001-s000000005-0123456789ab" / "deep" / "x.0.muster-tmp"
    ours = tmp_path / "checkpoints" / "a000002-s000000005-0123456789ab" / "x.0.muster-tmp"
    for file in (older, ours):
        file.parent.mkdir(parents=True)
        file.write_bytes(b"half")
    Retention(storage, 2, keep_last=1).apply(save(storage, 7, attempt=2))
    assert not older.exists()
    assert ours.exists()


@pytest.mark.parametrize(("number", "error"), [(errno.ESTALE, StorageError), (errno.EACCES, InputError)])
def test_a_listing_that_fails_deletes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, error: type[Exception]
) -> None:
    storage = open_storage(str(tmp_path), deadline_s=0.05)
    for step in (1, 2, 3):
        save(storage, step)
    newest = save(storage, 4, attempt=2)
    with monkeypatch.context() as patched:
        unreadable(patched, tmp_path / "commits" / "000001", number)
        with pytest.raises(error):
            Retention(storage, 2, keep_last=3).apply(newest)
    assert [r.step for r in list_commits(storage)] == [4, 3, 2, 1]
    assert len(storage.folders(layout.CHECKPOINTS)) == 4
    assert Retention(storage, 2, keep_last=3).apply(newest) == [1]


def test_a_listing_without_ones_own_commit_deletes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    storage, backend = faulty()
    for step in (1, 2, 3):
        newest = save(storage, step)
    record = backend.objects.pop(storage.uri(newest.key))
    assert Retention(storage, 1, keep_last=1).apply(newest) == []
    assert f"nothing is deleted: the listing of {storage.url} lacks {newest.key}" in caplog.text
    backend.objects[storage.uri(newest.key)] = record
    assert Retention(storage, 1, keep_last=1).apply(newest) == [1, 2]


def test_a_commit_that_somebody_has_deleted_by_hand_stops_nothing() -> None:
    storage, _ = faulty()
    retention = Retention(storage, 1, keep_last=2)
    made = [save(storage, step) for step in (1, 2)]
    assert [retention.apply(record) for record in made] == [[], []]
    storage.delete([made[0].key])
    assert retention.apply(save(storage, 3)) == []
    assert retention.apply(save(storage, 4)) == [2]
