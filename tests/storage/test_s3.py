"""The S3 backend against a real server (moto), and against that server's bad days."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.storage.doubles import FlakyServer
from tests.support.s3 import CREDENTIALS, S3, serve
from tests.support.waiting import free_port
from trainer.errors import CorruptObject, InputError, StorageError
from trainer.storage import Storage, expand, locate, open_storage


@pytest.fixture
def storage(moto: S3) -> Storage:
    return open_storage("s3://runs/a-run")


@pytest.fixture
def flaky(moto: S3, monkeypatch: pytest.MonkeyPatch) -> Iterator[FlakyServer]:
    server = FlakyServer(moto.endpoint)
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.endpoint)
    yield server
    server.close()


def test_objects_are_written_read_listed_and_deleted(storage: Storage) -> None:
    for key in ("b/2", "b/1/x", "a", "bb/1"):
        storage.write(key, key.encode())
    open_storage("s3://runs/a-run-too").write("c", b"")
    assert [(o.key, o.size) for o in storage.list()] == [("a", 1), ("b/1/x", 5), ("b/2", 3), ("bb/1", 4)]
    assert [o.key for o in storage.list("b")] == ["b/1/x", "b/2"]
    assert storage.list("nothing") == [] == storage.folders("nothing")
    assert storage.folders() == ["b", "bb"]
    assert open_storage("s3://runs").folders() == ["a-run", "a-run-too"]
    assert storage.read_range("b/1/x", 2, 4) == b"1/"
    assert storage.info("b") is None
    storage.delete(["a", "b/2", "never there"])
    assert [o.key for o in storage.list()] == ["b/1/x", "bb/1"]


def test_a_range_beyond_the_end_is_an_error(storage: Storage) -> None:
    storage.write("a", b"0123456789")
    for start, stop in ((5, 11), (20, 30)):
        with pytest.raises(CorruptObject, match="10 bytes"):
            storage.read_range("a", start, stop)
    with pytest.raises(FileNotFoundError, match="s3://runs/a-run/b"):
        storage.read_range("b", 0, 1)


def test_put_if_absent_lets_one_of_many_writers_win(storage: Storage) -> None:
    won: dict[int, bool] = {}
    threads = [
        threading.Thread(target=lambda i=i: won.update({i: storage.put_if_absent("claim", b"%d" % i)}))
        for i in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (winner,) = [i for i, ours in won.items() if ours]
    assert storage.read("claim") == b"%d" % winner


def test_files_go_up_and_come_down_whole(storage: Storage, tmp_path: Path) -> None:
    data = bytes(range(256)) * (68 * 4096)  # more than one part each way
    (tmp_path / "up").write_bytes(data)
    storage.upload("x", tmp_path / "up")
    assert storage.download("x", tmp_path / "down") == len(data)
    assert (tmp_path / "down").read_bytes() == data


def test_check_writable_sees_conditional_put(storage: Storage) -> None:
    assert storage.check_writable()
    assert storage.list() == []


def test_expand_and_locate(moto: S3) -> None:
    corpus = open_storage("s3://corpus/data")
    for key in ("b.jsonl", "a.jsonl", "sub/c.jsonl", "_SUCCESS"):
        corpus.write(key, b"12")
    assert [o.url for o in expand("s3://corpus/data/*.jsonl")] == [
        "s3://corpus/data/a.jsonl",
        "s3://corpus/data/b.jsonl",
    ]
    assert [o.url for o in expand("s3://corpus/data")][2] == "s3://corpus/data/sub/c.jsonl"
    (single,) = expand("s3://corpus/data/a.jsonl")
    there, key = locate(single.url)
    assert there.read(key) == b"12"
    assert there.info(key).etag == single.etag  # type: ignore[union-attr]
    assert expand("s3://corpus/data/z*") == [] == expand("s3://corpus/nothing/x.jsonl")


def test_a_bucket_that_does_not_exist_is_a_sentence(moto: S3) -> None:
    missing = open_storage("s3://no-such-bucket/run")
    for call in (
        missing.check_writable,
        missing.list,
        lambda: missing.read("x"),
        lambda: expand("s3://no-such-bucket/*.jsonl"),
        lambda: expand("s3://no-such-bucket/x.jsonl"),
    ):
        with pytest.raises(InputError, match="bucket s3://no-such-bucket does not exist; create it"):
            call()


def test_a_bad_bucket_name_is_a_sentence(moto: S3) -> None:
    with pytest.raises(InputError, match="Invalid bucket name"):
        open_storage("s3://Not_a bucket/run").check_writable()


def test_credentials_that_are_not_there_are_a_sentence(moto: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    with pytest.raises(InputError, match="set AWS_ACCESS_KEY_ID"):
        open_storage("s3://runs/x").check_writable()


def test_wrong_credentials_are_a_sentence_without_the_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INITIAL_NO_AUTH_ACTION_COUNT", "0")  # moto then checks keys, and knows none
    with serve() as server:
        for name, value in server.env.items():
            monkeypatch.setenv(name, value)
        storage = open_storage("s3://runs/x")
        for call in (storage.check_writable, storage.list, lambda: storage.info("a"), lambda: storage.read("a")):
            with pytest.raises(InputError, match="credentials") as caught:
                call()
            assert CREDENTIALS["AWS_SECRET_ACCESS_KEY"] not in str(caught.value)


def test_a_server_that_is_not_there_ends_with_the_deadline(moto: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    with pytest.raises(StorageError, match=r"could not read s3://runs/x/a: \d+ attempts"):
        open_storage("s3://runs/x", deadline_s=0.5).read("a")


@pytest.mark.parametrize("fault", ["503", "reset", "lost", "truncated"])
def test_a_bad_day_is_tried_again(flaky: FlakyServer, fault: str) -> None:
    storage = open_storage("s3://runs/x")
    data = b"0123456789" * 2000
    flaky.inject(fault, "PUT", 2)
    storage.write("a", data)
    flaky.inject(fault, "GET", 2)
    assert storage.read("a") == data
    assert flaky.met == 2
    flaky.inject(fault, "GET", 2)
    assert storage.read_range("a", 10, 10010) == data[10:10010]
    flaky.inject(fault, "GET", 2)
    assert [o.key for o in storage.list()] == ["a"]
    assert flaky.met == 2
    flaky.inject(fault, "DELETE", 1)
    storage.delete(["a"])
    assert storage.list() == []


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_conditional_put_whose_reply_is_lost_is_ours(flaky: FlakyServer, count: int) -> None:
    storage = open_storage("s3://runs/x")
    storage.write("warm", b"")  # the connection is then a kept-alive one, on which the HTTP client repeats by itself
    flaky.inject("lost", "PUT", count)
    assert storage.put_if_absent("commits/1", b"ours")
    assert flaky.met == count
    assert not storage.put_if_absent("commits/1", b"theirs")
    assert storage.read("commits/1") == b"ours"
