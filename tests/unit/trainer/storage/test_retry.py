from __future__ import annotations

import pytest

from tests.storage.doubles import faulty, times, unreachable
from trainer.errors import InputError, StorageError
from trainer.storage import Retry
from trainer.storage.backend import Transient


class Time:
    def __init__(self) -> None:
        self.now = 0.0
        self.waits: list[float] = []

    def sleep(self, seconds: float) -> None:
        self.waits.append(seconds)
        self.now += seconds


def make(time: Time, deadline_s: float = 60.0, chance: float = 1.0) -> Retry:
    return Retry(deadline_s, first_s=0.5, cap_s=8.0, clock=lambda: time.now, sleep=time.sleep, chance=lambda: chance)


def failing(count: int, error: Exception) -> tuple[list[int], object]:
    calls: list[int] = []

    def attempt(moved: object) -> str:
        calls.append(1)
        if len(calls) <= count:
            raise error
        return "done"

    return calls, attempt


def test_waits_grow_to_the_cap_and_the_value_comes_back() -> None:
    time = Time()
    _, attempt = failing(6, Transient("busy"))
    assert make(time).call("read x", attempt) == "done"  # type: ignore[arg-type]
    assert time.waits == [1.0, 2.0, 4.0, 8.0, 8.0, 8.0]


def test_jitter_spreads_each_wait() -> None:
    time = Time()
    _, attempt = failing(2, Transient("busy"))
    make(time, chance=0.25).call("read x", attempt)  # type: ignore[arg-type]
    assert time.waits == [0.25, 0.5]


def test_the_deadline_ends_it_with_target_attempts_and_cause() -> None:
    time = Time()
    calls, attempt = failing(10**6, Transient("SlowDown: reduce your request rate"))
    with pytest.raises(StorageError, match=r"read s3://b/k: \d+ attempts within \d+ s.*SlowDown") as caught:
        make(time).call("read s3://b/k", attempt)  # type: ignore[arg-type]
    assert 60 - 8 <= time.now <= 60
    assert f"{len(calls)} attempts" in str(caught.value)


@pytest.mark.parametrize("error", [FileNotFoundError("k"), InputError("wrong key"), KeyError("a bug")])
def test_what_another_attempt_cannot_change_is_raised_at_once(error: Exception) -> None:
    time = Time()
    calls, attempt = failing(1, error)
    with pytest.raises(type(error)):
        make(time).call("read x", attempt)  # type: ignore[arg-type]
    assert (len(calls), time.waits) == (1, [])


def test_every_call_of_a_storage_is_retried() -> None:
    storage, backend = faulty()
    storage.write("a", b"12")
    for call in (
        lambda: storage.read("a"),
        lambda: storage.read_range("a", 0, 1),
        lambda: storage.write("a", b"12"),
        lambda: storage.list(),
        lambda: storage.folders(),
        lambda: storage.info("a"),
        lambda: storage.put_if_absent("b", b"1"),
        lambda: storage.delete(["b"]),
    ):
        backend.before = times(3, Transient("busy"))
        call()
    backend.before = unreachable
    with pytest.raises(StorageError, match="faulty://run/a"):
        storage.read("a")


def test_a_create_whose_reply_was_lost_is_ours() -> None:
    storage, backend = faulty()
    backend.after = times(1, Transient("reset"), "put")
    assert storage.put_if_absent("commits/1", b"mine")
    assert backend.objects == {"faulty://run/commits/1": b"mine"}


def test_a_create_whose_request_was_lost_while_another_came_first_is_not_ours() -> None:
    storage, backend = faulty()

    def other_comes_first(verb: str, path: str) -> None:
        if path not in backend.objects:
            backend.objects[path] = b"theirs"
            raise Transient("reset")

    backend.before = other_comes_first
    assert not storage.put_if_absent("commits/1", b"mine")
    assert backend.objects["faulty://run/commits/1"] == b"theirs"


def test_a_cut_reply_is_read_again() -> None:
    storage, backend = faulty()
    storage.write("a", b"0123456789")
    whole, cut = backend.read_range, [True]

    def read_range(path: str, start: int, stop: int) -> bytes:
        data = whole(path, start, stop)
        return data[:2] if cut.pop() else data

    cut[:] = [False, True, True]
    backend.read_range = read_range  # type: ignore[method-assign]
    assert storage.read_range("a", 3, 8) == b"34567"


def test_a_storage_may_be_given_less_time_and_no_more() -> None:
    storage, backend = faulty(deadline_s=60.0)
    storage.write("a", b"12")
    assert storage.within(5.0).read("a") == b"12"
    backend.before = unreachable
    for deadline_s, most in ((5.0, "[0-5]"), (600.0, r"\d\d")):
        with pytest.raises(StorageError, match=rf"within {most} s"):
            storage.within(deadline_s).read("a")
