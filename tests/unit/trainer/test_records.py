"""Stored records of any shape: each is read as what it is, or named as what it is not."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.storage.doubles import faulty
from tests.support.hostile import BYTES, JSON_BOMBS, as_json, changed
from tests.unit.trainer.data.data_support import made
from trainer.checkpoint import CommitRecord, list_commits, newest_complete
from trainer.checkpoint.blobs import entry_of
from trainer.checkpoint.record import _digest
from trainer.data.prepare.partial import BEGUN, open_begun
from trainer.data.prepare.prepared import MANIFEST, open_prepared
from trainer.data.run_data import read_data
from trainer.data.types import Cursor
from trainer.errors import CorruptObject, InputError
from trainer.parsing import Malformed
from trainer.records import Count, UnixTime, read_record
from trainer.run import layout
from trainer.run.frozen import Provenance, read_provenance
from trainer.run.lease import Holder, LeaseRecord, read_lease, to_row
from trainer.run.submission import Submission, read_submission
from trainer.storage import Storage, to_json

HOLDER = Holder("host", "boot", 7, 1.0, None)
LEASE = dict(to_row(LeaseRecord(3, "running", HOLDER, 1.7e9, 5)))
SUBMISSION = {"kind": "slurm", "id": "12", "time": 1.7e9, "recipe": "runs/a/submitted/1.yaml"}
PROVENANCE = {"muster": "0.1.0", "packages": {"torch": "2.13.0", "ray": None}, "python": "3.11", "host": "a"}
CURSOR = {"fingerprint": "f", "seed": 1, "epoch": 0, "window": 2, "pack": 3, "chain": "c", "samples": 9}
STATE = {"cursor": CURSOR, "world_size": 2, "total_steps": 9, "facts": {"loss": 2.5, "eval_loss": None}, "scaler": {}}
RECORD = CommitRecord(5, 1, 1, "n", "a000001-s000000005-0", {"w": entry_of(b"w")}, STATE, "2026-01-01T00:00:00+00:00")


def signed(body: dict[str, Any]) -> bytes:
    """As a writer of such a body would have written it."""
    return to_json({**body, "sha256": _digest(body)})


def run_of(**objects: bytes) -> Storage:
    run, _ = faulty()
    for key, body in objects.items():
        run.write(key, body)
    return run


@pytest.mark.parametrize("body", [*JSON_BOMBS.values(), *BYTES.values()], ids=[*JSON_BOMBS, *BYTES])
def test_an_object_that_muster_never_wrote_is_named(body: str | bytes) -> None:
    run = run_of(lease=body.encode(errors="replace") if isinstance(body, str) else body)
    with pytest.raises(CorruptObject, match="lease"):
        read_lease(run)


@given(changed(LEASE))
@settings(max_examples=300)
def test_any_lease_is_one_or_named(body: Any) -> None:
    try:
        lease = read_lease(run_of(lease=as_json(body)))
    except CorruptObject:
        return
    assert lease is not None
    assert all(type(n) is int and n >= 0 for n in (lease.driver, lease.beat, lease.gathers, lease.holder.pid))
    assert isinstance(lease.may_be_alive() and lease.is_fresh(1.7e9), bool)
    assert isinstance(str(lease.holder), str)


@given(changed(SUBMISSION))
@settings(max_examples=200)
def test_any_submission_is_one_or_none(body: Any) -> None:
    found = read_submission(run_of(submission=as_json(body)))
    assert found is None or (found.job == f"{found.kind}:{found.id}" and found.time >= 0)


@given(changed(PROVENANCE))
@settings(max_examples=200)
def test_any_provenance_is_one_or_empty(body: Any) -> None:
    found = read_provenance(run_of(**{layout.PROVENANCE: as_json(body)}))
    assert isinstance(found.get("packages", {}), dict)


@given(changed(CURSOR))
@settings(max_examples=200)
def test_any_cursor_is_one_or_named(body: Any) -> None:
    try:
        cursor = Cursor.from_json(body)
    except CorruptObject:
        return
    assert cursor.to_json() == body


RECORD_BODY = dataclasses.asdict(RECORD)


@given(changed(RECORD_BODY))
@settings(max_examples=400)
def test_any_commit_record_is_sound_or_passed_over(body: Any) -> None:
    """Its own hash is right: whoever can write to the storage can write that."""
    run, _ = faulty()
    run.write(f"checkpoints/{RECORD.checkpoint}/w", b"w")
    run.write(RECORD.key, signed(body) if isinstance(body, dict) else as_json(body))
    skipped: list[str] = []
    try:
        found = list_commits(run, lambda step, uri, reason: skipped.append(reason))
        newest_complete(run, on_skip=lambda step, uri, reason: skipped.append(reason))
    except InputError:
        assert type(body["format"]) is int
        assert body["format"] > 1
        return
    assert found or skipped
    for record in found:
        assert all(type(n) is int and n >= 0 for n in (record.step, record.attempt, record.driver))
        assert all(type(f["bytes"]) is int and f["bytes"] >= 0 for f in record.files.values())


@pytest.mark.parametrize("body", [*JSON_BOMBS.values(), *BYTES.values()], ids=[*JSON_BOMBS, *BYTES])
def test_a_commit_that_is_none_does_not_hide_the_one_before(body: str | bytes) -> None:
    run, _ = faulty()
    run.write(f"checkpoints/{RECORD.checkpoint}/w", b"w")
    run.write(RECORD.key, RECORD.to_json())
    run.write(layout.commit(1, 6), body if isinstance(body, bytes) else body.encode())
    skipped: list[int] = []
    found = newest_complete(run, on_skip=lambda step, uri, reason: skipped.append(step))
    assert found is not None
    assert (found[0], skipped) == (RECORD, [6])


def test_what_a_newer_muster_adds_to_a_record_is_passed_over() -> None:
    """Sound by its own hash, which covers what is not known here."""
    body = {**dataclasses.asdict(RECORD), "sealed_by": "muster 9", "state": {**STATE, "mood": [1]}}
    record = CommitRecord.from_json(signed(body), "commits/x")
    assert record == dataclasses.replace(RECORD, state=body["state"])
    assert read_record(Submission, {**SUBMISSION, "queue": "long"}).job == "slurm:12"
    run = run_of(lease=as_json({**LEASE, "mood": "calm"}))
    assert read_lease(run) == LeaseRecord(3, "running", HOLDER, 1.7e9, 5)


def test_a_name_that_is_none_leaves_the_sentence_on_one_line() -> None:
    with pytest.raises(Malformed, match=r"^packages\.'\\x1b\\n' is 3, and a text is needed$"):
        read_record(Provenance, {**PROVENANCE, "packages": {"\x1b\n": 3}})


def data_record() -> dict[str, Any]:
    return {part: made([[(0, 5)]], 8).spec.to_json() for part in ("train", "eval")}


@given(st.data())
@settings(max_examples=300)
def test_any_record_of_the_data_is_one_or_named(data: st.DataObject) -> None:
    body = data.draw(changed(data_record()))
    try:
        parts = read_data(run_of(**{layout.DATA: as_json(body)}))
    except CorruptObject:
        return
    assert set(parts) == {part for part in ("train", "eval") if part in body}
    assert all(len(spec.fingerprint) == len(spec.order_key) == 32 for spec in parts.values())


def test_a_setting_of_newer_data_is_named_and_not_left_out() -> None:
    """Without it, other tokens would be prepared."""
    body = data_record()
    with pytest.raises(CorruptObject, match=r"packing_rule is not known to this version of muster; update it"):
        read_data(run_of(**{layout.DATA: as_json({"train": {**body["train"], "packing_rule": "best"}})}))


@pytest.mark.parametrize(("key", "read"), [(MANIFEST, open_prepared), (BEGUN, open_begun)])
@given(data=st.data())
@settings(max_examples=150)
def test_any_manifest_is_one_or_named(key: str, read: Callable[[Storage, str], Any], data: st.DataObject) -> None:
    prepared = made([[(0, 5)], [(0, 6)]], 8)
    whole = prepared.storage.read_json(MANIFEST)
    body = whole if key == MANIFEST else {"spec": whole["spec"], "windows": 2}
    shared, _ = faulty()
    shared.child(prepared.fingerprint).write(key, as_json(data.draw(changed(body))))
    try:
        found = read(shared, prepared.fingerprint)
    except CorruptObject:
        return
    assert found.fingerprint == prepared.fingerprint


def test_an_index_that_is_none_is_named() -> None:
    prepared = made([[(0, 5)]], 8)
    (index,) = [o.key for o in prepared.storage.list() if o.key.endswith(".index")]
    for body in (b"", b"no arrow", prepared.storage.read(index)[:40]):
        prepared.storage.write(index, body)
        fresh = open_begun(_without_manifest(prepared.storage, prepared.spec), prepared.fingerprint)
        assert fresh is not None
        with pytest.raises(CorruptObject, match=index):
            fresh.index(0)


def _without_manifest(folder: Storage, spec: Any) -> Storage:
    from trainer.storage import open_storage

    folder.delete([MANIFEST])
    folder.write_json(BEGUN, {"spec": spec.to_json(), "windows": 1})
    return open_storage(folder.url.rsplit("/", 1)[0])


@dataclasses.dataclass(frozen=True)
class Sample:
    number: Count
    when: UnixTime
    names: tuple[str, ...] = ()
    note: str | None = None


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"number": True, "when": 0}, "number is True, and a whole number is needed"),
        ({"number": -1, "when": 0}, "number is -1, and one from 0 to"),
        ({"number": 1.0, "when": 0}, "number is 1.0"),
        ({"number": 1, "when": 1e99}, "when is 1e[+]99"),
        ({"number": 1, "when": "now"}, "when is 'now', and a number is needed"),
        ({"number": 1, "when": 0, "names": ["a", 2]}, r"names\.1 is 2, and a text is needed"),
        ({"number": 1, "when": 0, "names": "ab"}, "names is 'ab', and a list is needed"),
        ({"when": 0}, "number is missing"),
        ([1, 0], "it is .*, and an object is needed"),
        ({"number": "x" * 10_000, "when": 0}, "number is '.{1,40}'"),
    ],
)
def test_a_field_of_another_type_is_named(body: Any, says: str) -> None:
    with pytest.raises(Malformed, match=says):
        read_record(Sample, body)
    assert read_record(Sample, {"number": 1, "when": 0, "more": 1}) == Sample(1, 0)
    with pytest.raises(Malformed, match="more is not known"):
        read_record(Sample, {"number": 1, "when": 0, "more": 1}, exact=True)


def test_the_types_of_provenance_are_those_that_are_written() -> None:
    from trainer.run.frozen import provenance

    assert read_record(Provenance, provenance()) == provenance()
