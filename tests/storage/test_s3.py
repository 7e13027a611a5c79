"""The S3 backend against a real server (moto), and against that server's bad days."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.storage.doubles import FlakyServer
from tests.support.s3 import CREDENTIALS, S3, serve
from tests.support.waiting import free_port
from trainer.errors import CorruptObject, InputError, StorageError
from trainer.storage import Retry, Storage, expand, locate, open_storage
from trainer.storage.remote import RemoteBackend, filesystem


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


@pytest.mark.parametrize("method", ["PUT", "GET", "DELETE", "HEAD"])
def test_a_request_that_is_never_answered_is_abandoned_and_made_again(flaky: FlakyServer, method: str) -> None:
    """botocore has PUTs wait for "100 Continue", and its read time-out has not begun by then."""
    storage = Storage("s3://runs/x", RemoteBackend("s3"), Retry(60.0, first_s=0.01, attempt_s=1.0))
    storage.write("a", b"0123456789")
    flaky.inject("hang", method, 2)
    calls: dict[str, Callable[[], object]] = {
        "PUT": lambda: storage.write("a", b"new"),
        "GET": lambda: storage.read("a"),
        "DELETE": lambda: storage.delete(["a"]),
        "HEAD": lambda: storage.info("a"),
    }
    calls[method]()
    assert flaky.met == 2
    assert storage.put_if_absent("b", b"later calls have connections of their own")


def test_a_storage_that_hangs_for_good_ends_with_the_deadline(flaky: FlakyServer) -> None:
    storage = Storage("s3://runs/x", RemoteBackend("s3"), Retry(1.0, first_s=0.01, attempt_s=0.2, least_s=0.1))
    flaky.inject("hang", "PUT", 10**6)
    with pytest.raises(StorageError, match=r"could not write s3://runs/x/a: \d+ attempts .* no answer within"):
        storage.write("a", b"1")


@pytest.mark.parametrize("url", ["s3://runs//a/b", "s3://runs///a//b/", "s3a://runs/a/b", "s3://runs/a/b/"])
def test_an_address_has_one_spelling(moto: S3, url: str) -> None:
    """A key with an empty part is written, and never listed below its folder."""
    storage = open_storage(url)
    assert storage.url == "s3://runs/a/b"
    assert storage.check_writable()
    storage.write("c", b"1")
    assert [o.key for o in open_storage("s3://runs/a").list()] == ["b/c"]
    assert locate(f"{url.rstrip('/')}//c")[0].url == "s3://runs/a/b"


@pytest.mark.parametrize("url", ["s3://runs/a?versionId=17", "s3://runs/a?x=1/b"])
def test_a_query_string_is_refused(url: str) -> None:
    for call in (open_storage, locate, expand):
        with pytest.raises(InputError, match="'s3://runs/a' is followed by a query string"):
            call(url)


@pytest.mark.parametrize("key", ["data//x.jsonl", "data/x.jsonl?versionId=17"])
def test_an_object_that_cannot_be_read_back_is_named(moto: S3, key: str) -> None:
    moto.filesystem().call_s3("put_object", Bucket="corpus", Key=key, Body=b"12")
    for url in ("s3://corpus/data", "s3://corpus/data/**"):
        with pytest.raises(InputError, match=r"rename it"):
            expand(url)


def test_brackets_are_literal_where_such_an_object_exists(moto: S3) -> None:
    corpus = open_storage("s3://corpus/data")
    for key in ("a[1].jsonl", "a1.jsonl", "run [2]/b.jsonl", "sub/.hidden.jsonl", "sub/deep/c.jsonl"):
        corpus.write(key, b"12")
    assert [o.url for o in expand("s3://corpus/data/a[1].jsonl")] == ["s3://corpus/data/a[1].jsonl"]
    assert [o.url for o in expand("s3://corpus/data/run [2]")] == ["s3://corpus/data/run [2]/b.jsonl"]
    assert [o.url for o in expand("s3://corpus/data/a[12].jsonl")] == ["s3://corpus/data/a1.jsonl"]
    assert [o.url for o in expand("s3://corpus/data/*/*/c.jsonl")] == ["s3://corpus/data/sub/deep/c.jsonl"]
    assert [o.url for o in expand("s3://corpus/data/sub/**")] == ["s3://corpus/data/sub/deep/c.jsonl"]
    assert len(expand("s3://corpus/data/**/*.jsonl")) == 4


def test_a_listing_that_never_ends_is_an_error(moto: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = open_storage("s3://runs/x", deadline_s=0.5)
    page = {"IsTruncated": True, "NextContinuationToken": "again", "Contents": []}
    monkeypatch.setattr(type(filesystem("s3://runs")), "call_s3", lambda fs, method, **request: page)
    with pytest.raises(StorageError, match="the next page of the listing is the same page"):
        storage.list()


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_conditional_put_whose_reply_is_lost_is_ours(flaky: FlakyServer, count: int) -> None:
    storage = open_storage("s3://runs/x")
    storage.write("warm", b"")  # the connection is then a kept-alive one, on which the HTTP client repeats by itself
    flaky.inject("lost", "PUT", count)
    assert storage.put_if_absent("commits/1", b"ours")
    assert flaky.met == count
    assert not storage.put_if_absent("commits/1", b"theirs")
    assert storage.read("commits/1") == b"ours"
