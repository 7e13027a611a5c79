"""`muster gc`: what runs name stays, and so does what a run that begins meanwhile announces."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher.cleanup.unused import Unused, delete_unused, find_unused
from tests.storage.doubles import faulty, unreadable
from tests.support.s3 import S3
from tests.support.training import prepare, small_recipe, write_pairs
from tests.unit.launcher.cli.test_app import Muster
from trainer.data import open_prepared
from trainer.data.run_data import read_data
from trainer.errors import InputError, MusterError, StorageError
from trainer.recipe import Recipe, dump
from trainer.run import layout
from trainer.run.shared import CONDEMNED, USED, announce_use, delete_unless_used
from trainer.storage import Storage, open_storage

DAY_S = 86400.0


@pytest.fixture
def muster(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Muster:
    monkeypatch.setenv("TERM", "dumb")
    return Muster(capsys, monkeypatch)


def prepared(name: str, model: Path, folder: Path, **changes: Any) -> tuple[Recipe, Storage, str]:
    """A run's recipe, its storage and the key of its prepared data."""
    if not (folder / "data" / "pairs.jsonl").exists():
        write_pairs(folder / "data" / "pairs.jsonl", 12)
    recipe = small_recipe(name, model, folder, **changes)
    storage = open_storage(recipe.storage)
    prepare(recipe, storage)
    storage.child(name).write(layout.RECIPE, dump(recipe).encode())
    return recipe, storage, f"{layout.PREPARED}/{read_data(storage.child(name))['train'].fingerprint}"


def aged(storage: Storage, key: str, days: float = 2.0) -> None:
    """Makes every object of a folder older."""
    for path in Path(storage.uri(key)).rglob("*"):
        at = path.stat().st_mtime - days * DAY_S
        os.utime(path, (at, at))


def keys(found: Unused) -> list[str]:
    return [folder.key for folder in found.folders]


def test_what_no_run_names_is_found_and_deleted(tiny_model: Path, tmp_path: Path) -> None:
    _, storage, used = prepared("a", tiny_model, tmp_path)
    _, _, unused = prepared("b", tiny_model, tmp_path, **{"data.sequence_length": 48})
    assert used != unused
    for key in (used, unused):
        aged(storage, key)
    assert keys(find_unused(storage)) == []
    storage.child("b").delete([layout.DATA])
    found = find_unused(storage)
    assert (keys(found), found.named, found.young) == ([unused], 1, 0)
    assert found.folders[0].bytes > 1000
    assert 1.9 * DAY_S < found.folders[0].age_s < 2.1 * DAY_S
    assert delete_unused(storage, found.folders[0])
    assert storage.folders(layout.PREPARED) == [used.split("/")[1]]
    assert not Path(storage.uri(unused)).exists()


def test_what_is_younger_than_a_day_is_kept(tiny_model: Path, tmp_path: Path) -> None:
    _, storage, _ = prepared("a", tiny_model, tmp_path)
    storage.child("a").delete([layout.DATA])
    assert (keys(find_unused(storage)), find_unused(storage).young) == ([], 1)


@pytest.fixture
def forgotten(tiny_model: Path, tmp_path: Path) -> tuple[Recipe, Storage, str]:
    """Prepared data that are old, and whose run is gone."""
    recipe, storage, key = prepared("a", tiny_model, tmp_path)
    aged(storage, key)
    storage.child("a").delete([layout.DATA, layout.RECIPE])
    return recipe, storage, key


def test_a_run_that_begins_after_the_question_keeps_its_data(forgotten: tuple[Recipe, Storage, str]) -> None:
    recipe, storage, key = forgotten
    (folder,) = find_unused(storage).folders
    run = storage.child("a")
    data = prepare(recipe, storage)
    run.delete([layout.DATA])  # its record is the last thing that a beginning run writes
    assert not delete_unused(storage, folder)
    assert data.train.index(0).meta.blocks, "and it reads them"
    assert storage.info(f"{key}/{CONDEMNED}") is None


def at_listing(monkeypatch: pytest.MonkeyPatch, ending: str, call: Callable[[], None], *, after: bool) -> None:
    """Calls once, before or after the first listing of a folder whose URL ends so."""
    listed, left = Storage.list, [call]

    def look(self: Storage, prefix: str = "", **options: Any) -> Any:
        hit = self.url.endswith(ending) and not prefix and left
        now = left.pop() if hit else None
        if now and not after:
            now()
        found = listed(self, prefix, **options)
        if now and after:
            now()
        return found

    monkeypatch.setattr(Storage, "list", look)


@pytest.mark.parametrize("after", [False, True])
def test_whoever_writes_first_the_data_are_kept_or_the_run_is_refused(
    forgotten: tuple[Recipe, Storage, str], monkeypatch: pytest.MonkeyPatch, after: bool
) -> None:
    """A run begins between gc's mark and its look, or between its look and the deletion."""
    _, storage, key = forgotten
    (folder,) = find_unused(storage).folders
    told: list[bool] = []
    at_listing(monkeypatch, key, lambda: told.append(announce_use(storage.child(key))), after=after)
    gone = delete_unused(storage, folder)
    assert told == [False], "the run has seen the mark in both cases, and does not use the folder"
    assert gone is after
    assert (open_prepared(storage.child(layout.PREPARED), key.split("/")[1]) is None) is after


def test_a_run_that_announces_before_the_mark_keeps_its_data(forgotten: tuple[Recipe, Storage, str]) -> None:
    _, storage, key = forgotten
    assert announce_use(storage.child(key))
    assert not delete_unless_used(storage.child(key), lambda: False)
    assert open_prepared(storage.child(layout.PREPARED), key.split("/")[1])


def test_a_run_that_names_the_data_between_looks_keeps_them(forgotten: tuple[Recipe, Storage, str]) -> None:
    _, storage, key = forgotten
    assert not delete_unless_used(storage.child(key), lambda: True)
    assert storage.info(f"{key}/{CONDEMNED}") is None
    assert storage.info(f"{key}/manifest.json")


def test_a_run_is_refused_while_its_data_are_deleted(forgotten: tuple[Recipe, Storage, str]) -> None:
    recipe, storage, key = forgotten
    storage.child(key).write_json(CONDEMNED, {})
    with pytest.raises(InputError, match=r"`muster gc` is deleting .*start again when it has ended"):
        prepare(recipe, storage)


def test_whatever_is_deleted_when_it_dies_the_rest_is_no_wrong_data(
    forgotten: tuple[Recipe, Storage, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, storage, key = forgotten
    (folder,) = find_unused(storage).folders
    delete, deleted = Storage.delete, list[str]()

    def die(self: Storage, names: Any) -> None:
        for name in names:
            deleted.append(name)
            if len(deleted) == 3:  # the manifest and an index are gone
                raise StorageError("gone away")
            delete(self, [name])

    with monkeypatch.context() as patched:
        patched.setattr(Storage, "delete", die)
        with pytest.raises(StorageError):
            delete_unused(storage, folder)
    assert deleted[0] == "manifest.json"
    assert deleted[1].endswith(".index")
    assert (keys(find_unused(storage)), find_unused(storage).young) == ([], 1), "another gc may be at work"
    aged(storage, f"{key}/{CONDEMNED}"[: -len(CONDEMNED) - 1], days=1.0)
    (again,) = find_unused(storage).folders
    assert again.condemned_s is not None
    announce_use(storage.child(key))  # a run that was refused meanwhile: its data are young now
    assert not delete_unused(storage, again)
    data = prepare(recipe, storage)
    assert data.train.index(0).meta.blocks


def test_a_run_that_cannot_be_read_keeps_everything(
    forgotten: tuple[Recipe, Storage, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, storage, key = forgotten
    storage.child("b").write(layout.DATA, b"{}")
    with pytest.raises(InputError, match=r"it is not known which data .*/b uses"):
        find_unused(storage)
    storage.child("b").delete([layout.DATA])
    (folder,) = find_unused(storage).folders
    storage.child("b").write(layout.DATA, b"nonsense")
    with pytest.raises(InputError, match="nothing is deleted"):
        delete_unused(storage, folder)
    assert storage.info(f"{key}/manifest.json")
    assert storage.info(f"{key}/{CONDEMNED}") is None


def test_a_listing_that_fails_deletes_nothing(
    forgotten: tuple[Recipe, Storage, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, storage, key = forgotten
    storage = storage.within(1.0)
    (folder,) = find_unused(storage).folders
    with monkeypatch.context() as patched:
        unreadable(patched, Path(storage.url), 116)
        with pytest.raises(MusterError, match="Stale file handle"):
            find_unused(storage)
        with pytest.raises(MusterError, match="Stale file handle"):
            delete_unused(storage, folder)
    assert storage.info(f"{key}/manifest.json")


def test_a_listing_without_the_runs_is_not_believed(
    forgotten: tuple[Recipe, Storage, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, storage, _ = forgotten
    folders = Storage.folders
    monkeypatch.setattr(Storage, "folders", lambda self, prefix="": folders(self, prefix) if prefix else [])
    with pytest.raises(StorageError, match="lacks _data, so it may lack runs"):
        find_unused(storage)


def test_models_of_runs_are_kept(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from trainer.model.prequantised import copy_name

    recipe, storage, _ = prepared("a", tiny_model, tmp_path, **{"model.quantization": "nf4"})
    used, unused = f"_models/{copy_name(recipe.model)}", "_models/0123456789abcdef"
    for key in (used, unused):
        storage.write(f"{key}/config.json", b"{}")
        storage.write(f"{key}/model.safetensors", b"0" * 4096)
        aged(storage, key)
    assert keys(find_unused(storage)) == [unused]
    monkeypatch.setattr(
        "trainer.model.prequantised._identity", lambda section: (_ for _ in ()).throw(InputError("no folder"))
    )
    found = find_unused(storage)
    assert keys(found) == [], "the base model is not on this machine"
    assert "models are kept" in found.notes[0]


def test_a_model_that_a_run_begins_to_load_is_kept(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path))
    storage.write("_models/a/config.json", b"{}")
    aged(storage, "_models/a")
    (folder,) = find_unused(storage).folders
    assert announce_use(storage.child("_models/a"))
    assert not delete_unused(storage, folder)
    assert {info.key for info in storage.list("_models/a")} == {"_models/a/config.json", f"_models/a/{USED}"}


def test_a_folder_that_may_only_be_read_is_used() -> None:
    storage, backend = faulty()
    storage.write("manifest.json", b"{}")

    def refuse(verb: str, path: str) -> None:
        if verb == "put":
            raise InputError("no permission")

    backend.before = refuse
    assert announce_use(storage)
    backend.before = lambda verb, path: None
    storage.write_json(CONDEMNED, {})
    backend.before = refuse
    assert not announce_use(storage)


def test_in_s3_too(moto: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = open_storage("s3://runs/all")
    for key in ("_data/old/manifest.json", "_data/old/w000000.index", "my/recipe.yaml"):
        storage.write(key, b"{}")
    assert (keys(find_unused(storage)), find_unused(storage).young) == ([], 1)
    for module in ("launcher.cleanup.unused", "trainer.run.shared"):
        monkeypatch.setattr(f"{module}.YOUNG_S", 0.0)
    (folder,) = find_unused(storage).folders
    assert (folder.key, folder.bytes) == ("_data/old", 4)
    assert delete_unused(storage, folder)
    assert [info.key for info in storage.list()] == ["my/recipe.yaml"]


def test_the_command_asks_first(
    muster: Muster, forgotten: tuple[Recipe, Storage, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, storage, key = forgotten
    assert muster("gc", storage.url) == 2
    assert storage.uri(key) in muster.err
    assert muster.last_line() == "muster: error: nothing is deleted: there is no terminal to ask on; give --yes"
    assert storage.info(f"{key}/manifest.json")
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    for answer, there in ((False, True), (True, False)):
        monkeypatch.setattr("typer.confirm", lambda question, err, answer=answer: answer)
        assert muster("gc", storage.url) == 0
        assert (storage.info(f"{key}/manifest.json") is not None) is there
    assert f"deleted {storage.uri(key)}" in muster.err
    assert muster("gc", storage.url, "--yes") == 0
    assert muster.last_line() == f"nothing in {storage.url} is unused"
    assert muster.out == ""


def test_rm_asks_first_and_leaves_the_data(muster: Muster, tiny_model: Path, tmp_path: Path) -> None:
    _, storage, key = prepared("a", tiny_model, tmp_path)
    run = storage.uri("a")
    assert muster("rm", run, storage.uri("none")) == 2
    assert f"there is no run at {storage.uri('none')}" in muster.last_line()
    assert muster("rm", run) == 2
    assert "give --yes" in muster.last_line()
    assert storage.info(f"a/{layout.RECIPE}")
    assert muster("rm", run, f"{run}/", "--yes") == 0
    assert (storage.folders(), muster.out) == (["_data"], "")
    assert muster.err.splitlines()[0].startswith(f"{run}: interrupted, 0 checkpoints, 2 objects, ")
    assert muster.last_line() == f"deleted {run}: 2 objects"
    assert storage.info(f"{key}/manifest.json")
