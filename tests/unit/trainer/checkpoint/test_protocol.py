"""The commit protocol: writers that die at every point, take-overs at every point, and damaged objects."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.storage.doubles import Died, FaultyBackend, faulty, times
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
from trainer.errors import CorruptObject, Fenced, InputError, StorageError
from trainer.run import layout
from trainer.storage import Storage
from trainer.storage.backend import Transient

FILES = {"adapter_model.safetensors": b"weights", "deep/optimizer.safetensors": b"moments"}


def begin(storage: Storage) -> tuple[int, int]:
    driver = claim_driver(storage, {"pid": 1})
    return driver, claim_attempt(storage, driver, {"host": "a"})


def record_of(storage: Storage, driver: int, attempt: int, step: int, files: dict[str, bytes]) -> CommitRecord:
    name, entries = put_checkpoint(storage, files, attempt=attempt, step=step)
    return CommitRecord(
        step, attempt, driver, f"nonce {name}", name, entries, {"cursor": step}, "2026-01-02T03:04:05+00:00"
    )


def save(storage: Storage, driver: int, attempt: int, step: int, keep_last: int = 3) -> CommitRecord:
    """What a worker does for one checkpoint; its return is the acknowledgement."""
    record = record_of(storage, driver, attempt, step, {n: d + b" %d" % step for n, d in FILES.items()})
    commit(storage, record)
    Retention(storage, attempt, keep_last=keep_last).apply(record)
    return record


def steps(storage: Storage) -> list[tuple[int, int]]:
    return [(r.attempt, r.step) for r in list_commits(storage)]


def test_claims_are_numbered_without_gaps_over_drivers() -> None:
    storage, _ = faulty()
    assert begin(storage) == (1, 1)
    assert claim_attempt(storage, 1, {}) == 2
    assert begin(storage) == (2, 3)
    assert read_claims(storage).attempt == 3
    assert storage.read_json("claims/000003")["driver"] == 2
    assert sorted(o.key for o in storage.list("claims")) == [
        "claims/000001", "claims/000002", "claims/000003", "claims/d000001", "claims/d000002",
    ]  # fmt: skip


def test_a_driver_that_was_overtaken_cannot_start_workers() -> None:
    storage, _ = faulty()
    begin(storage)
    claim_driver(storage, {})
    with pytest.raises(Fenced, match=r"driver 2 has taken over faulty://run.*muster status"):
        claim_attempt(storage, 1, {})
    assert read_claims(storage).attempt == 1


def test_a_lost_race_for_a_claim_takes_the_next_number() -> None:
    storage, backend = faulty()

    def other_first(verb: str, path: str) -> None:
        if verb == "put" and path.endswith("claims/d000001"):
            backend.objects.setdefault(path, b"{}")

    backend.before = other_first
    assert claim_driver(storage, {}) == 2


def test_a_claim_whose_reply_was_lost_is_not_made_twice() -> None:
    storage, backend = faulty()
    backend.after = times(1, Transient("reset"), "put")
    assert claim_driver(storage, {}) == 1
    assert read_claims(storage).driver == 1


def test_the_fence_stops_older_drivers_and_attempts() -> None:
    storage, _ = faulty()
    begin(storage)
    check_fence(storage, 1, 1)
    claim_attempt(storage, 1, {})
    with pytest.raises(Fenced, match="attempt 2 has taken over"):
        check_fence(storage, 1, 1)


def test_commits_are_listed_from_the_newest_generations_newest() -> None:
    storage, _ = faulty()
    driver, first = begin(storage)
    for step in (5, 10, 15):
        save(storage, driver, first, step)
    second = claim_attempt(storage, driver, {})
    save(storage, driver, second, 12, keep_last=9)
    assert steps(storage) == [(2, 12), (1, 15), (1, 10), (1, 5)]
    assert [o.key for o in storage.list(f"{layout.COMMITS}/000001")] == [layout.commit(1, s) for s in (15, 10, 5)]


def test_a_record_comes_back_as_it_was() -> None:
    storage, _ = faulty()
    record = save(storage, *begin(storage), step=7)
    assert list_commits(storage) == [record]
    found = newest_complete(storage)
    assert found is not None
    assert found[0] == record
    assert found[1]["adapter_model.safetensors"] == b"weights 7"


def test_a_commit_whose_reply_was_lost_is_acknowledged() -> None:
    storage, backend = faulty()
    record = record_of(storage, *begin(storage), step=3, files=FILES)
    backend.after = times(1, Transient("reset"), "put")
    commit(storage, record)
    assert steps(storage) == [(1, 3)]


def test_somebody_elses_commit_under_our_key_is_refused() -> None:
    storage, _ = faulty()
    driver, attempt = begin(storage)
    commit(storage, record_of(storage, driver, attempt, 3, FILES))
    with pytest.raises(Fenced, match="another process's commit of step 3"):
        commit(storage, record_of(storage, driver, attempt, 3, FILES))


def test_a_zombie_is_not_acknowledged() -> None:
    storage, _ = faulty()
    driver, attempt = begin(storage)
    begin(storage)
    with pytest.raises(Fenced, match="driver 2 has taken over"):
        save(storage, driver, attempt, 5)


def run_until(backend: FaultyBackend, operation: int, act: Callable[[], None], work: Callable[[], object]) -> bool:
    """Runs ``work`` and calls ``act`` once, just before its n-th storage operation; whether it got that far."""
    count = [0]

    def hook(verb: str, path: str) -> None:
        count[0] += 1
        if count[0] == operation:
            backend.before = lambda verb, path: None
            act()

    backend.before = hook
    try:
        work()
    except (Died, Fenced):
        pass
    finally:
        backend.before = lambda verb, path: None
    return count[0] >= operation


def die() -> None:
    raise Died


def test_a_writer_killed_at_any_point_leaves_whole_checkpoints_and_every_acknowledged_one() -> None:
    operation, reached = 0, True
    while reached:
        operation += 1
        storage, backend = faulty()
        acknowledged = [0]

        def train(storage: Storage = storage, acknowledged: list[int] = acknowledged) -> None:
            driver, attempt = begin(storage)
            for step in (5, 10, 15):
                acknowledged[0] = save(storage, driver, attempt, step, keep_last=1).step

        reached = run_until(backend, operation, die, train)
        driver, attempt = begin(storage)
        found = newest_complete(storage, on_skip=lambda *_: pytest.fail("a commit that is not whole"))
        step = found[0].step if found else 0
        assert step >= acknowledged[0]
        save(storage, driver, attempt, step + 1, keep_last=1)
        (kept,) = list_commits(storage)
        assert storage.folders(layout.CHECKPOINTS) == [kept.checkpoint], "orphans are swept"
    assert operation > 20


def test_a_take_over_at_any_point_sees_every_commit_that_is_acknowledged() -> None:
    operation, reached, outcomes = 0, True, set()
    while reached:
        operation += 1
        storage, backend = faulty()
        driver, attempt = begin(storage)
        save(storage, driver, attempt, 5)
        acknowledged, seen = [5], [0]

        def take_over(storage: Storage = storage, seen: list[int] = seen) -> None:
            begin(storage)
            found = newest_complete(storage)
            seen[0] = found[0].step if found else 0

        def zombie(storage: Storage = storage, acknowledged: list[int] = acknowledged) -> None:
            record = record_of(storage, 1, 1, 10, FILES)
            commit(storage, record)
            acknowledged[0] = 10

        reached = run_until(backend, operation, take_over, zombie)
        if reached:
            assert seen[0] >= acknowledged[0]
            outcomes.add((acknowledged[0], seen[0]))
    assert {(5, 5), (5, 10)} <= outcomes, "both before and after the commit point were tried"


def damage(backend: FaultyBackend, record: CommitRecord, how: str) -> None:
    path = f"faulty://run/{record.file_key('adapter_model.safetensors')}"
    if how == "missing":
        del backend.objects[path]
    elif how == "short":
        backend.objects[path] = backend.objects[path][:-1]
    else:
        data = bytearray(backend.objects[path])
        data[2] ^= 1
        backend.objects[path] = bytes(data)


@pytest.mark.parametrize(
    ("how", "reason"), [("missing", "does not exist"), ("short", "were written"), ("flipped", "sha256")]
)
def test_a_damaged_checkpoint_is_passed_over_with_its_reason(how: str, reason: str, tmp_path: Path) -> None:
    storage, backend = faulty()
    driver, attempt = begin(storage)
    save(storage, driver, attempt, 5)
    damaged = save(storage, driver, attempt, 10)
    damage(backend, damaged, how)
    skipped: list[tuple[int, str, str]] = []
    found = newest_complete(storage, on_skip=lambda *s: skipped.append(s))
    fetched = fetch_newest(storage, tmp_path / "here", on_skip=lambda *s: skipped.append(s))
    assert found is not None
    assert fetched is not None
    assert found[0].step == fetched.step == 5
    assert (tmp_path / "here" / "deep" / "optimizer.safetensors").read_bytes() == b"moments 5"
    assert [p.name for p in tmp_path.iterdir()] == ["here"], "nothing of the damaged one stays"
    assert [(s, u) for s, u, _ in skipped] == [(10, f"faulty://run/checkpoints/{damaged.checkpoint}")] * 2
    assert all(reason in r for _, _, r in skipped)


def test_a_commit_without_what_is_needed_is_passed_over(tmp_path: Path) -> None:
    storage, _ = faulty()
    driver, attempt = begin(storage)
    save(storage, driver, attempt, 5)
    commit(storage, record_of(storage, driver, attempt, 10, {"config.json": b"{}"}))
    skipped: list[tuple[int, str, str]] = []
    needed = ["adapter_model.safetensors"]
    found = fetch_newest(storage, tmp_path / "here", needed=needed, on_skip=lambda *s: skipped.append(s))
    assert found is not None
    assert found.step == 5
    assert [(step, "has no adapter_model.safetensors" in reason) for step, _, reason in skipped] == [(10, True)]


def test_a_folder_that_loses_its_files_is_not_committed(tmp_path: Path) -> None:
    storage, _ = faulty()
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CorruptObject, match="step 3 has no adapter_model"):
        put_checkpoint(storage, tmp_path, attempt=1, step=3, needed=["adapter_model.safetensors", "config.json"])
    with pytest.raises(CorruptObject, match=r"config\.json"):
        put_checkpoint(storage, tmp_path / "gone", attempt=1, step=3, needed=["config.json"])
    assert not list(storage.list("checkpoints"))


def test_nothing_whole_is_none(tmp_path: Path) -> None:
    storage, backend = faulty()
    damage(backend, save(storage, *begin(storage), step=5), "missing")
    assert newest_complete(storage) is None
    assert fetch_newest(storage, tmp_path / "here") is None
    assert not (tmp_path / "here").exists()


def test_a_storage_that_is_down_is_no_damage() -> None:
    storage, backend = faulty()
    save(storage, *begin(storage), step=5)
    backend.before = times(10**9, Transient("refused"), "read")
    with pytest.raises(StorageError):
        newest_complete(storage, on_skip=lambda *_: pytest.fail("taken for damaged"))


@pytest.mark.parametrize("change", [{"step": 6}, {"nonce": "x"}, {"files": {}}])
def test_a_changed_record_is_passed_over(change: dict[str, object]) -> None:
    storage, _ = faulty()
    driver, attempt = begin(storage)
    save(storage, driver, attempt, 4)
    record = save(storage, driver, attempt, 5)
    storage.write_json(record.key, {**json.loads(record.to_json()), **change})
    skipped: list[int] = []
    assert [r.step for r in list_commits(storage, lambda step, *_: skipped.append(step))] == [4]
    assert skipped == [5]


@pytest.mark.parametrize("name", ["../../other/run", "/etc/passwd", "a/../../b"])
def test_a_record_cannot_point_outside_its_folder(name: str) -> None:
    storage, _ = faulty()
    record = record_of(storage, *begin(storage), step=5, files=FILES)
    for bad in (
        CommitRecord(5, 1, 1, "n", record.checkpoint, {name: {"bytes": 1, "sha256": "0"}}, {}, ""),
        CommitRecord(5, 1, 1, "n", name, {}, {}, ""),
    ):
        with pytest.raises(CorruptObject, match="outside the checkpoint's folder"):
            CommitRecord.from_json(bad.to_json(), "here")


def test_a_record_of_a_newer_muster_is_not_damage() -> None:
    record = CommitRecord(5, 1, 1, "n", "c", {}, {}, "", format=2)
    with pytest.raises(InputError, match="has format 2, this muster reads up to 1; update muster"):
        CommitRecord.from_json(record.to_json(), "here")


def test_retention_keeps_the_newest_over_generations_and_sweeps_old_orphans() -> None:
    storage, _ = faulty()
    driver, first = begin(storage)
    for step in (5, 10):
        save(storage, driver, first, step)
    orphan, _ = put_checkpoint(storage, FILES, attempt=first, step=11)
    second = claim_attempt(storage, driver, {})
    uploading, _ = put_checkpoint(storage, FILES, attempt=second, step=9)
    storage.write("checkpoints/by-hand/x", b"not ours")
    save(storage, driver, second, 8, keep_last=2)
    assert steps(storage) == [(2, 8), (1, 10)]
    folders = storage.folders(layout.CHECKPOINTS)
    assert orphan not in folders
    assert {uploading, "by-hand"} < set(folders)
    assert len(folders) == 4


def test_retention_does_not_count_records_that_cannot_be_read() -> None:
    storage, _ = faulty()
    driver, attempt = begin(storage)
    save(storage, driver, attempt, 5)
    storage.write(layout.commit(attempt, 10), b"rubbish")
    save(storage, driver, attempt, 15, keep_last=2)
    assert [r.step for r in list_commits(storage, lambda *_: None)] == [15, 5]


def test_retention_deletes_records_before_files() -> None:
    storage, backend = faulty()
    driver, attempt = begin(storage)
    for step in (5, 10):
        record = save(storage, driver, attempt, step)
    deleted: list[str] = []
    backend.before = lambda verb, path: deleted.append(path.split("/")[3]) if verb == "delete" else None
    assert Retention(storage, attempt, keep_last=1).apply(record) == [5]
    assert deleted == ["commits", "checkpoints", "checkpoints"]


def test_a_folder_is_uploaded_as_it_is(tmp_path: Path) -> None:
    storage, _ = faulty()
    (tmp_path / "deep").mkdir()
    (tmp_path / "adapter_config.json").write_bytes(b"{}")
    (tmp_path / "deep" / "x").write_bytes(b"1")
    name, files = put_checkpoint(storage, tmp_path, attempt=2, step=30)
    assert name.startswith("a000002-s000000030-")
    assert {n: e["bytes"] for n, e in files.items()} == {"adapter_config.json": 2, "deep/x": 1}
    assert [o.key for o in storage.list(f"checkpoints/{name}")] == [f"checkpoints/{name}/{n}" for n in files]
