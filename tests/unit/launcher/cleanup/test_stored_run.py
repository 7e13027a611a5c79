"""`muster rm`: the order of deletion, whoever begins meanwhile, and storages that fail."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest

from launcher.cleanup.stored_run import delete_run, find_run
from tests.storage.doubles import Died, FaultyBackend, faulty, unreachable
from tests.support.s3 import S3
from tests.unit.trainer.run.test_lease import ELSEWHERE, put_lease
from trainer.errors import InputError, RunHeld, StorageError
from trainer.run import layout
from trainer.run.claims import claim_attempt, claim_driver, read_claims
from trainer.run.frozen import read_recipe
from trainer.run.lease import Holder, Lease, request_end
from trainer.run.submission import Submission
from trainer.storage import Storage, open_storage, to_json
from trainer.storage.backend import Transient

KEYS = (
    layout.RECIPE,
    layout.PROVENANCE,
    layout.DATA,
    layout.commit(1, 5),
    layout.commit(1, 10),
    "checkpoints/a1/adapter_config.json",
    "checkpoints/a1/adapter_model.safetensors",
    "adapter/adapter_config.json",
    "adapter/adapter_model.safetensors",
    "metrics/a000001-000000.jsonl",
    "logs/a000001-r00000-000000000000.log",
)


def written(storage: Storage, *, name: str = "my", state: str = "succeeded") -> Storage:
    """A run with two checkpoints that has ended."""
    run = storage.child(name)
    driver = put_lease(run, state=state).driver
    claim_attempt(run, driver, {})
    for key in KEYS:
        run.write(key, b"{}")
    return run


def in_memory() -> tuple[Storage, FaultyBackend]:
    storage, backend = faulty()
    written(storage)
    written(storage, name="other")
    return storage, backend


def left_of(backend: FaultyBackend, name: str = "my") -> list[str]:
    lead = f"faulty://run/{name}/"
    return sorted(path.removeprefix(lead) for path in backend.objects if path.startswith(lead))


@pytest.mark.parametrize("kind", ["folder", "s3"])
def test_a_run_is_gone_and_its_neighbours_stay(
    kind: str, tmp_path: Path, moto: S3, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = open_storage("s3://runs/all" if kind == "s3" else str(tmp_path / "runs"))
    run, other = written(storage), written(storage, name="other")
    found = find_run(storage, "my")
    assert (found.state, found.checkpoints, found.bytes > 0, found.others) == ("succeeded", 2, True, [])
    # The attempt's claim and the old driver's are deleted too; the lease and the own claim come after the count.
    assert delete_run(found) == len(KEYS) + 2
    assert run.list() == []
    assert storage.folders() == ["other"], "of a folder nothing is left, not even an empty one"
    assert {info.key for info in other.list()} >= set(KEYS)
    with pytest.raises(InputError, match="there is no run at"):
        find_run(storage, "my")


def test_what_is_not_the_runs_own_stays(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path))
    run = written(storage)
    run.write("notes.txt", b"mine")
    written(run, name="inner")
    found = find_run(storage, "my")
    assert "notes.txt" in found.others
    assert "inner/recipe.yaml" in found.others
    delete_run(found)
    assert {info.key.split("/")[0] for info in run.list()} == {"inner", "notes.txt"}


def test_the_files_of_a_tracker_and_its_links_are_the_runs_own(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path))
    run = written(storage)
    run.write("wandb/run-1/files/config.yaml", b"x")
    run.write("wandb/run-1/logs/debug.log", b"x")
    (tmp_path / "my" / "wandb" / "latest-run").symlink_to("run-1")
    (tmp_path / "my" / "wandb" / "debug.log").symlink_to("run-1/logs/debug.log")
    found = find_run(storage, "my")
    assert found.others == []
    delete_run(found)
    assert not (tmp_path / "my").exists()


def test_a_folder_of_runs_is_no_run(tmp_path: Path) -> None:
    written(open_storage(str(tmp_path / "runs")))
    with pytest.raises(InputError, match="there is no run at"):
        find_run(open_storage(str(tmp_path)), "runs")


def test_a_running_run_is_refused() -> None:
    storage, backend = in_memory()
    run = storage.child("my")
    lease = Lease.acquire(run)
    before = dict(backend.objects)
    with pytest.raises(RunHeld, match=r"my is running .*stop it first: muster cancel faulty://run/my"):
        find_run(storage, "my")
    lease.release("interrupted")
    assert before.keys() == backend.objects.keys()


def test_a_run_whose_job_has_not_started_is_refused_until_it_is_cancelled() -> None:
    storage, _ = in_memory()
    run = storage.child("my")
    run.write_json(layout.SUBMISSION, asdict(Submission("slurm", "4711", 6000.0, "s3://…")))
    with pytest.raises(RunHeld, match=r"slurm:4711 was submitted .* end it first: muster cancel"):
        find_run(storage, "my")
    request_end(run, None, ["slurm:4711"])
    assert delete_run(find_run(storage, "my")) == len(KEYS) + 4


def test_a_run_that_began_after_the_question_is_left_alone() -> None:
    storage, backend = in_memory()
    found = find_run(storage, "my")
    lease = Lease.acquire(storage.child("my"), renew_s=0.2)
    before = set(left_of(backend))
    with pytest.raises(RunHeld, match="and is alive"):
        delete_run(found)
    lease.release("interrupted")
    assert set(left_of(backend)) == before


def test_a_run_cannot_begin_while_it_is_deleted() -> None:
    storage, backend = in_memory()
    refused: list[str] = []

    def begin(verb: str, path: str) -> None:
        if verb == "delete" and not refused:
            backend.before = lambda verb, path: None
            with pytest.raises(RunHeld) as error:
                Lease.acquire(storage.child("my"))
            refused.append(str(error.value))

    backend.before = begin
    delete_run(find_run(storage, "my"))
    assert "is alive" in refused[0]
    assert left_of(backend) == []


def test_a_job_that_is_submitted_while_it_is_deleted_keeps_its_recipe() -> None:
    storage, backend = in_memory()
    run = storage.child("my")
    request_end(run, None, ["slurm:1"])
    run.write_json(layout.SUBMISSION, asdict(Submission("slurm", "1", 1.0, "old")))
    run.write(f"{layout.SUBMITTED}/old.yaml", b"{}")

    def submit(verb: str, path: str) -> None:
        if verb == "delete" and path.endswith(layout.DATA):
            backend.before = lambda verb, path: None
            run.write(f"{layout.SUBMITTED}/new.yaml", b"{}")
            run.write_json(layout.SUBMISSION, asdict(Submission("slurm", "2", 2.0, "new")))

    backend.before = submit
    delete_run(find_run(storage, "my"))
    assert left_of(backend) == ["submission", "submitted/new.yaml"]


def test_a_run_that_is_taken_over_while_it_is_deleted_keeps_what_is_left() -> None:
    storage, backend = in_memory()
    run = storage.child("my")

    def take(verb: str, path: str) -> None:
        if verb == "delete" and path.endswith(layout.RECIPE):
            backend.before = lambda verb, path: None
            claim_driver(run, asdict(ELSEWHERE))

    backend.before = take
    with pytest.raises(RunHeld, match=r"driver 3 has taken .* over while it was deleted"):
        delete_run(find_run(storage, "my"))
    assert set(KEYS) - {layout.RECIPE} <= set(left_of(backend))
    assert read_claims(run).driver == 3


def test_a_run_that_begins_at_the_last_moment_keeps_its_lease_and_claim() -> None:
    """Between the end of the deletion and the removal of the lease and the claim."""
    storage, backend = in_memory()
    run, new = storage.child("my"), list[Lease]()

    def begin(verb: str, path: str) -> None:
        if verb == "delete" and path.endswith(f"/{layout.LEASE}"):
            backend.before = lambda verb, path: None
            new.append(Lease.acquire(run, renew_s=0.1))

    backend.before = begin
    delete_run(find_run(storage, "my"))
    new[0].release("interrupted")
    assert new[0].driver == 3
    assert left_of(backend) == ["claims/d000003", "lease"]


def test_whenever_it_is_killed_nobody_reads_a_complete_run_and_the_command_continues(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    storage, backend = in_memory()
    deletes: list[str] = []

    def record(verb: str, path: str) -> None:
        if verb == "delete":
            deletes.append(path.removeprefix("faulty://run/my/"))

    backend.before = record
    delete_run(find_run(storage, "my"))
    assert deletes[0] == layout.RECIPE
    order = {key: number for number, key in enumerate(deletes)}
    for folder in ("adapter", "checkpoints/a1"):
        assert order[f"{folder}/adapter_config.json"] < order[f"{folder}/adapter_model.safetensors"]
        assert order[layout.commit(1, 10)] < order[f"{folder}/adapter_model.safetensors"]
    assert deletes[-2:] == [layout.LEASE, "claims/d000002"]

    for survived in range(1, len(deletes)):
        storage, backend = in_memory()
        done: list[str] = []

        def die(verb: str, path: str, done: list[str] = done, most: int = survived) -> None:
            if verb == "delete":
                if len(done) == most:
                    raise Died
                done.append(path)

        backend.before = die
        with pytest.raises(Died):
            delete_run(find_run(storage, "my"))
        backend.before = lambda verb, path: None
        with pytest.raises(InputError, match="there is no run at"):
            read_recipe(storage.child("my"))
        with monkeypatch.context() as patched:
            patched.setattr(Holder, "is_dead", lambda holder: True)  # this process stands for one that was killed
            delete_run(find_run(storage, "my"))
        assert left_of(backend) == []
        assert set(KEYS) <= set(left_of(backend, "other"))


@pytest.mark.parametrize("verb", ["list", "read"])
def test_a_storage_that_cannot_be_looked_at_loses_nothing(verb: str) -> None:
    storage, backend = in_memory()
    before = dict(backend.objects)
    backend.before = lambda operation, path: unreachable(operation, path) if operation == verb else None
    with pytest.raises(StorageError):
        find_run(storage, "my")
    assert backend.objects == before


def test_a_listing_that_fails_after_the_question_deletes_nothing() -> None:
    storage, backend = in_memory()
    found = find_run(storage, "my")

    def fail(verb: str, path: str) -> None:
        if verb == "list" and path.endswith("/my"):
            raise Transient("503 Slow Down")

    backend.before = fail
    with pytest.raises(StorageError, match="503 Slow Down"):
        delete_run(found)
    assert set(KEYS) <= set(left_of(backend))


def test_a_listing_that_lacks_what_was_just_written_deletes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    storage, backend = in_memory()
    found = find_run(storage, "my")
    stale = backend.list("faulty://run/my", lambda: None)
    listed = backend.list

    def old(path: str, moved: object) -> object:
        return stale if path == "faulty://run/my" else listed(path, lambda: None)

    monkeypatch.setattr(backend, "list", old)
    with pytest.raises(StorageError, match="does not show claims/d000002"):
        delete_run(found)
    assert set(KEYS) <= set(left_of(backend))


def test_a_lease_that_cannot_be_read_is_no_free_run() -> None:
    storage, backend = in_memory()
    storage.child("my").write(layout.LEASE, b"not a lease")
    with pytest.raises(Exception, match="lease is not JSON"):
        find_run(storage, "my")
    assert set(KEYS) <= set(left_of(backend))


def test_of_a_dead_driver_on_this_host_the_run_is_deleted_at_once() -> None:
    storage, backend = faulty()
    run = written(storage)
    here = Holder.of_this_process(None)
    gone = Holder(here.host, here.boot_id, 2**22 + 1, 1.0, None)
    run.write(layout.LEASE, to_json({"driver": 1, "state": "running", "time": 1.0, "beat": 1, **asdict(gone)}))
    found = find_run(storage, "my")
    assert found.state == "interrupted"
    delete_run(found)
    assert left_of(backend) == []
