"""The final adapter: copied, verified, mended, and what "finished" means."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.storage.doubles import Died, faulty
from tests.support.training import small_recipe
from trainer.checkpoint import CommitRecord, claim_attempt, claim_driver, commit, put_checkpoint
from trainer.checkpoint.publish import EPOCHS, finished, is_last, is_published, publish, published_files
from trainer.errors import CorruptObject, InputError
from trainer.recipe import Recipe, TrainingSection
from trainer.run import layout
from trainer.run.frozen import freeze_recipe
from trainer.storage import Storage

FILES = {
    "adapter_config.json": b"{}",
    "adapter_model.safetensors": b"weights" * 100,
    "tokenizer.json": b"[]",
    "README.md": b"# card",
    "optimizer.safetensors": b"moments",
    "master.safetensors": b"master",
}
PUBLISHED = ["README.md", "adapter_config.json", "adapter_model.safetensors", "tokenizer.json"]


def committed(run: Storage, step: int, total: int = 10, files: dict[str, bytes] = FILES) -> CommitRecord:
    driver = claim_driver(run, {})
    attempt = claim_attempt(run, driver, {})
    unique, entries = put_checkpoint(run, files, attempt=attempt, step=step)
    state = {"total_steps": total}
    record = CommitRecord(step, attempt, driver, "n", unique, entries, state, "2026-01-02T03:04:05+00:00")
    commit(run, record)
    return record


def adapter(run: Storage) -> dict[str, bytes]:
    return {o.key.removeprefix("adapter/"): run.read(o.key) for o in run.list(layout.ADAPTER)}


def test_what_only_training_needs_stays_behind() -> None:
    run, _ = faulty()
    record = committed(run, 10)
    assert sorted(published_files(record)) == PUBLISHED
    assert not is_published(run, record)
    assert publish(run, record) == run.uri("adapter")
    assert adapter(run) == {name: FILES[name] for name in PUBLISHED}
    assert is_published(run, record)


def test_publishing_again_writes_nothing() -> None:
    run, backend = faulty()
    record = committed(run, 10)
    publish(run, record)
    written: list[str] = []
    backend.before = lambda verb, path: written.append(path) if verb in ("put", "delete") else None
    publish(run, record)
    assert written == []


@pytest.mark.parametrize("damage", [b"weights" * 99 + b"weighty", b"short"])
def test_a_damaged_copy_is_mended_and_only_it(damage: bytes) -> None:
    run, backend = faulty()
    record = committed(run, 10)
    publish(run, record)
    run.write("adapter/adapter_model.safetensors", damage)
    assert not is_published(run, record)
    written: list[str] = []
    backend.before = lambda verb, path: written.append(path) if verb == "put" else None
    assert finished(run) == record
    assert [path.rsplit("/", 1)[1] for path in written] == ["adapter_model.safetensors"]
    assert adapter(run)["adapter_model.safetensors"] == FILES["adapter_model.safetensors"]


def test_what_does_not_belong_there_is_taken_away() -> None:
    run, _ = faulty()
    record = committed(run, 10)
    run.write("adapter/adapter_model.bin", b"an older run's")
    run.write("adapter/deep/file", b"x")
    publish(run, record)
    assert sorted(adapter(run)) == PUBLISHED


def test_a_run_is_finished_by_its_last_commit_alone() -> None:
    run, _ = faulty()
    assert finished(run) is None
    committed(run, 5)
    assert finished(run) is None
    assert adapter(run) == {}, "nothing is published before"
    last = committed(run, 10)
    assert finished(run) == last
    assert sorted(adapter(run)) == PUBLISHED


def test_a_longer_length_is_not_finished_by_a_shorter_ones_last_commit() -> None:
    run, _ = faulty()
    record = committed(run, 10)
    assert finished(run, TrainingSection(steps=10, global_batch=1, micro_batch=1)) == record
    assert finished(run, TrainingSection(steps=11, global_batch=1, micro_batch=1)) is None
    state = {**record.state, EPOCHS: 2}
    assert is_last(replace(record, state=state), TrainingSection(epochs=2, global_batch=1, micro_batch=1))
    assert not is_last(replace(record, state=state), TrainingSection(epochs=3, global_batch=1, micro_batch=1))


def test_more_epochs_of_a_run_that_did_not_record_them_are_refused(tmp_path: Path) -> None:
    def recipe(epochs: int) -> Recipe:
        length = {"training.steps": None, "training.epochs": epochs}
        return small_recipe("old", tmp_path / "model", tmp_path, **length)

    run, _ = faulty()
    freeze_recipe(run, recipe(2))
    record = committed(run, 10)
    assert finished(run, recipe(2).training) == record
    with pytest.raises(InputError, match="did not record its epochs"):
        finished(run, recipe(3).training)


def test_a_publication_that_died_at_any_point_is_completed() -> None:
    operation, reached = 0, True
    while reached:
        operation += 1
        run, backend = faulty()
        record = committed(run, 10)
        run.write("adapter/stale", b"x")
        count = [0]

        def dies(verb: str, path: str, count: list[int] = count, operation: int = operation) -> None:
            count[0] += 1
            if count[0] == operation:
                raise Died

        backend.before = dies
        try:
            publish(run, record)
            reached = False
        except Died:
            pass
        backend.before = lambda verb, path: None
        assert finished(run) == record
        assert adapter(run) == {name: FILES[name] for name in PUBLISHED}
    assert operation > len(PUBLISHED)


def test_a_damaged_last_checkpoint_is_not_the_end_of_a_run() -> None:
    run, _ = faulty()
    committed(run, 5)
    last = committed(run, 10)
    run.write(last.file_key("adapter_model.safetensors"), b"W" * 700)
    assert finished(run) is None, "training goes on from step 5"
    run.delete([last.file_key("adapter_model.safetensors")])
    assert finished(run) is None
    again = committed(run, 10)
    assert finished(run) == again


def test_a_checkpoint_that_was_damaged_after_publication_does_no_harm() -> None:
    run, _ = faulty()
    last = committed(run, 10)
    publish(run, last)
    run.write(last.file_key("adapter_model.safetensors"), b"W" * 700)
    assert finished(run) == last


def test_a_copy_that_cannot_be_made_whole_is_said() -> None:
    run, backend = faulty()
    committed(run, 10)

    def spoil(verb: str, path: str) -> None:
        if verb == "put" and path.endswith("adapter/adapter_model.safetensors"):
            backend.objects[path] = b"torn"

    backend.after = spoil
    with pytest.raises(CorruptObject, match="does not read back as it was committed"):
        finished(run)
