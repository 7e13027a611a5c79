"""What every backend promises, and how addresses become storages and lists of objects."""

from __future__ import annotations

import errno
import os
import pickle
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.storage.doubles import faulty, unreadable
from trainer.errors import CorruptObject, InputError, StorageError
from trainer.storage import Storage, expand, is_safe_key, locate, open_storage
from trainer.storage.backend import NoAnswer, Transient
from trainer.storage.limit import limited


@pytest.fixture(params=["local", "memory"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    return open_storage(str(tmp_path / "store") if request.param == "local" else f"memory://{uuid.uuid4().hex}")


def test_objects_are_written_read_listed_and_deleted(storage: Storage) -> None:
    for key in ("b/2", "b/1/x", "a", "bb/1"):
        storage.write(key, key.encode())
    assert [o.key for o in storage.list()] == ["a", "b/1/x", "b/2", "bb/1"]
    assert [(o.key, o.size) for o in storage.list("b")] == [("b/1/x", 5), ("b/2", 3)]
    assert storage.list("nothing") == [] == storage.folders("nothing")
    assert storage.folders() == ["b", "bb"]
    assert storage.child("b").read("1/x") == b"b/1/x"
    storage.write("a", b"new")
    assert storage.read("a") == b"new"
    storage.delete(["a", "b/2", "never there"])
    assert [o.key for o in storage.list()] == ["b/1/x", "bb/1"]


def test_a_missing_object_is_named(storage: Storage) -> None:
    with pytest.raises(FileNotFoundError, match=f"{storage.url}/a/b"):
        storage.read("a/b")
    storage.write("a/b", b"")
    assert storage.info("a/b") is not None
    assert storage.info("a") is None
    assert storage.info("c") is None


def test_the_tag_changes_with_the_content(storage: Storage) -> None:
    storage.write("a", b"1")
    before = storage.info("a")
    storage.write("a", b"22")
    after = storage.info("a")
    assert before is not None
    assert after is not None
    assert before.etag != after.etag


def test_ranges_are_exact_or_an_error(storage: Storage) -> None:
    storage.write("a", b"0123456789")
    assert storage.read_range("a", 3, 7) == b"3456"
    assert storage.read_range("a", 10, 10) == b""
    for start, stop in ((5, 11), (20, 30)):
        with pytest.raises(CorruptObject, match=f"10 bytes where at least {stop}"):
            storage.read_range("a", start, stop)
    with pytest.raises(FileNotFoundError):
        storage.read_range("b", 0, 1)


def test_put_if_absent_lets_one_of_many_writers_win(storage: Storage) -> None:
    results: dict[int, bool] = {}
    gate = threading.Barrier(8)

    def race(i: int) -> None:
        gate.wait(10)
        results[i] = storage.put_if_absent("claims/1", b"%d" % i)

    threads = [threading.Thread(target=race, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (winner,) = [i for i, won in results.items() if won]
    assert storage.read("claims/1") == b"%d" % winner
    assert storage.put_if_absent("claims/1", b"%d" % winner), "the same bytes are there: nothing is wrong"


def test_files_go_up_and_come_down_whole(storage: Storage, tmp_path: Path) -> None:
    data = os.urandom(17 * 2**20)  # two parts
    (tmp_path / "up").write_bytes(data)
    storage.upload("deep/er", tmp_path / "up")
    assert storage.download("deep/er", tmp_path / "new" / "down") == len(data)
    assert (tmp_path / "new" / "down").read_bytes() == data
    with pytest.raises(FileNotFoundError):
        storage.download("nothing", tmp_path / "new" / "x")
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["down"]


def test_json_comes_back_and_rubbish_is_named(storage: Storage) -> None:
    storage.write_json("a.json", {"é": [1, None]})
    assert storage.read_json("a.json") == {"é": [1, None]}
    storage.write("a.json", b'{"cut": ')
    with pytest.raises(CorruptObject, match=r"a\.json is not JSON"):
        storage.read_json("a.json")
    with pytest.raises(ValueError, match="JSON"):
        storage.write_json("b.json", float("nan"))


def test_check_writable_leaves_nothing_behind(storage: Storage) -> None:
    assert storage.check_writable()
    assert storage.list() == []


def test_a_storage_pickles_as_its_address(storage: Storage) -> None:
    storage.write("a/b", b"1")
    assert pickle.loads(pickle.dumps(storage.child("a"))).read("b") == b"1"


@pytest.mark.parametrize("key", ["", "/etc/passwd", "../x", "a/../../x", "a//b", "a/./b", "a\\b", "a\0"])
def test_keys_cannot_leave_the_folder(storage: Storage, key: str) -> None:
    assert not is_safe_key(key)
    with pytest.raises(ValueError, match="storage key"):
        storage.read(key)


def test_local_addresses_are_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert open_storage("runs/").url == f"{tmp_path}/runs"
    assert open_storage("~/runs").url == f"{tmp_path}/home/runs"
    assert open_storage(f"file://{tmp_path}/with%20space").url == f"{tmp_path}/with space"


def test_local_readers_never_see_temporary_files(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path))
    (tmp_path / "a.0123.muster-tmp").write_bytes(b"left by a killed writer")
    storage.write("b", b"1")
    assert [o.key for o in storage.list()] == ["b"]


def test_deleting_the_last_object_of_a_local_folder_removes_it(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path))
    storage.write("checkpoints/one/x", b"1")
    storage.write("checkpoints/two/x", b"1")
    storage.delete(["checkpoints/one/x"])
    assert storage.folders("checkpoints") == ["two"]


def test_a_folder_without_permission_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str, **options: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", path)

    monkeypatch.setattr(os, "makedirs", refuse)  # root, as CI often is, may write everywhere
    with pytest.raises(InputError, match=r"no permission for .*runs \(Permission denied\)"):
        open_storage(str(tmp_path / "runs")).check_writable()


def test_a_file_in_the_place_of_a_folder_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "runs").write_bytes(b"")
    with pytest.raises(InputError, match="a file and a folder"):
        open_storage(str(tmp_path / "runs")).check_writable()


def test_an_address_with_credentials_is_refused_without_repeating_them() -> None:
    with pytest.raises(InputError) as caught:
        open_storage("s3://me:hunter2@bucket/x")
    assert "hunter2" not in str(caught.value)
    assert "AWS_SECRET_ACCESS_KEY" in str(caught.value)


@pytest.mark.parametrize("url", ["nosuch://bucket/x", "s3://", ""])
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(InputError):
        open_storage(url)


@pytest.fixture(params=["local", "memory"])
def corpus(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    url = str(tmp_path / "corpus") if request.param == "local" else f"memory://{uuid.uuid4().hex}"
    storage = open_storage(url)
    for key in ("b.jsonl", "a.jsonl", "sub/c.jsonl", "note.txt", "_SUCCESS", ".hidden/x.jsonl"):
        storage.write(key, key.encode())
    return url


@pytest.mark.parametrize(
    ("what", "names"),
    [
        ("/*.jsonl", ["a.jsonl", "b.jsonl"]),
        ("/**/*.jsonl", ["a.jsonl", "b.jsonl", "sub/c.jsonl"]),
        ("", ["a.jsonl", "b.jsonl", "note.txt", "sub/c.jsonl"]),
        ("/sub", ["sub/c.jsonl"]),
        ("/a.jsonl", ["a.jsonl"]),
        ("/z*.jsonl", []),
        ("/missing.jsonl", []),
    ],
)
def test_expand_lists_files_folders_and_globs(corpus: str, what: str, names: list[str]) -> None:
    found = [o for o in expand(corpus + what) if ".hidden" not in o.url]
    assert [o.url.partition(corpus.rpartition("/")[2] + "/")[2] for o in found] == names
    for o in found:
        storage, key = locate(o.url)
        assert len(storage.read(key)) == o.size
        assert o.etag


def test_locate_refuses_what_names_no_object() -> None:
    for url in ("s3://bucket", "s3://bucket/"):
        with pytest.raises(InputError, match="not an object"):
            locate(url)


@pytest.mark.parametrize(
    ("number", "error", "said"),
    [
        (errno.EACCES, InputError, "no permission for .*/claims"),
        (errno.EIO, StorageError, "Input/output error"),
        (errno.ESTALE, StorageError, "Stale file handle"),
    ],
)
def test_a_folder_that_cannot_be_looked_into_is_not_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, error: type[Exception], said: str
) -> None:
    storage = open_storage(str(tmp_path), deadline_s=0.05)
    storage.write("claims/000001", b"1")
    storage.write("other", b"1")
    unreadable(monkeypatch, tmp_path / "claims", number)
    looks: list[Callable[[], object]] = [
        storage.list,
        lambda: storage.list("claims"),
        lambda: storage.folders("claims"),
        lambda: storage.abort_uploads("claims", lambda key: True),
    ]
    if error is InputError:  # the other kinds are tried again for two minutes
        looks += [lambda: expand(str(tmp_path / "claims")), lambda: expand(str(tmp_path / "claims" / "*"))]
    for look in looks:
        with pytest.raises(error, match=said):
            look()


def test_a_bad_look_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = open_storage(str(tmp_path))
    storage.write("claims/000001", b"1")
    unreadable(monkeypatch, tmp_path / "claims", errno.EIO, times=2)
    assert [o.key for o in storage.list()] == ["claims/000001"]


def test_a_folder_that_goes_while_it_is_listed_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = open_storage(str(tmp_path))
    storage.write("a/b/c", b"1")
    storage.write("d", b"1")
    unreadable(monkeypatch, tmp_path / "a" / "b", errno.ENOENT)
    assert [o.key for o in storage.list()] == ["d"]


def test_links_are_followed(tmp_path: Path) -> None:
    """A storage, a run or a source may be a link, or hold links to other disks."""
    (tmp_path / "disk" / "checkpoints").mkdir(parents=True)
    (tmp_path / "runs").symlink_to(tmp_path / "disk")
    storage = open_storage(str(tmp_path / "runs"))
    storage.write("checkpoints/a/x", b"1")
    (tmp_path / "disk" / "linked").symlink_to(tmp_path / "disk" / "checkpoints")
    assert [o.key for o in storage.list()] == ["checkpoints/a/x", "linked/a/x"]
    assert storage.folders() == ["checkpoints", "linked"]
    assert len(expand(str(tmp_path / "runs"))) == 2
    storage.delete(["checkpoints/a/x"])
    assert storage.list() == []


def test_links_that_lead_nowhere_or_in_circles_are_named(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path))
    storage.write("a/b", b"1")
    (tmp_path / "a" / "again").symlink_to(tmp_path / "a")
    with pytest.raises(InputError, match=r"again is a link to a folder that contains it"):
        storage.list()
    (tmp_path / "a" / "again").unlink()
    (tmp_path / "a" / "gone.jsonl").symlink_to(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"gone\.jsonl is a link to .*nowhere, which is not there"):
        expand(str(tmp_path / "a"))
    (tmp_path / "itself").symlink_to(tmp_path / "itself")
    with pytest.raises(InputError, match="itself"):
        storage.read("itself")


def test_a_name_that_cannot_be_addressed_is_an_error_for_who_lists(tmp_path: Path) -> None:
    (tmp_path / "a\\b.jsonl").write_bytes(b"{}")
    with pytest.raises(InputError, match="cannot be addressed: rename it"):
        expand(str(tmp_path))


def test_a_listing_has_to_show_what_is_known_to_be_there(storage: Storage) -> None:
    storage.write("a/b", b"1")
    assert [o.key for o in storage.list("a", containing=["a/b"])] == ["a/b"]
    with pytest.raises(StorageError, match="the listing does not show a/c, which is there"):
        storage.within(0.05).list("a", containing=["a/b", "a/c"])


def test_a_call_that_hangs_ends_and_one_that_is_slow_does_not() -> None:
    released, moved_on = threading.Event(), threading.Event()
    with pytest.raises(NoAnswer, match="no answer within 0 s"):
        limited(lambda moved: released.wait(), 0.01)
    released.set()

    def slow(moved: Callable[[], None]) -> str:
        for _ in range(20):
            moved_on.wait(0.02)
            moved()
        return "done"

    assert limited(slow, 0.2) == "done", "twice as long as it may be silent"
    with pytest.raises(ZeroDivisionError):
        limited(lambda moved: 1 // 0, 1.0)


def test_a_process_ends_while_a_call_hangs() -> None:
    code = (
        "import threading, trainer.storage.limit as l\n"
        "try: l.limited(lambda moved: threading.Event().wait(), 0.05)\n"
        "except l.NoAnswer: print('abandoned')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "abandoned\n", "")


def test_a_dead_storage_takes_one_deadline_however_much_is_asked_for() -> None:
    storage, backend = faulty(deadline_s=0.0)
    asked: list[str] = []

    def away(verb: str, path: str) -> None:
        asked.append(path)
        raise Transient("away")

    backend.before = away
    with pytest.raises(StorageError):
        storage.delete(f"{i}" for i in range(1000))
    assert len(asked) <= 8
