"""Blocks on their way: memory within a limit, the host's disk shared by its ranks, and what goes wrong there."""

from __future__ import annotations

import errno
import logging
import multiprocessing
import shutil
import threading
from collections import Counter, namedtuple
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.trainer.data.data_support import made, memory, stream
from trainer.data.loading import disk_cache
from trainer.data.loading.disk_cache import DiskCache, open_cache
from trainer.data.loading.next_use import NextUse, Use
from trainer.data.types import SampleRef
from trainer.errors import CorruptObject, StorageError
from trainer.storage import in_parallel, open_storage

LENGTH = 16
ORDER = [[2, 0, 1], [1, 2, 0]]


def upcoming(epoch=0, window=0, pack=0, packs=None):
    made = NextUse(lambda e: ORDER[e % 2])
    made.move(Use(epoch, window, pack), (lambda: packs) if packs else None)
    return made


def many(count=60, windows=4):
    return made([[(0, LENGTH)] * count for _ in range(windows)], LENGTH)


def count_fetches(prepared):
    fetched, original = Counter(), prepared.block_bytes

    def counting(window, block):
        fetched[window, block] += 1
        return original(window, block)

    prepared.block_bytes = counting
    return fetched


def train(s, steps, cursor=None, rank=0, world_size=1):
    cursor = cursor or s.start()
    for _ in range(steps):
        plan = s.step(cursor)
        yield s.read_step(plan, rank, world_size)
        cursor = plan.next


def same(a, b):
    return len(a) == len(b) and all(
        x.plan == y.plan
        and all(
            p.sample_ids == q.sample_ids and np.array_equal(p.input_ids, q.input_ids)
            for p, q in zip(x.batches, y.batches, strict=True)
        )
        for x, y in zip(a, b, strict=True)
    )


# when a block is used next


def test_a_windows_turn_is_later_in_this_epoch_or_in_the_next():
    future = upcoming(window=1)
    assert future.next_use(1, 0) == (0, 2, 0)
    assert future.next_use(2, 0) == (1, 1, 0)
    assert future.next_use(0, 0) == (0, 1, 0)
    assert [future.soon(w) for w in range(3)] == [True, True, False]


def test_the_last_window_is_followed_by_the_next_epochs_first():
    future = upcoming(window=2)
    assert (future.current(), future.following()) == (1, 1)
    assert upcoming(epoch=1, window=2).following() == 2


def test_in_the_current_window_a_block_is_used_by_the_next_pack_that_draws_on_it():
    packs = {0: np.array([0, 4]), 1: np.array([2])}
    future = upcoming(pack=1, packs=packs)
    assert future.next_use(2, 0) == (0, 0, 4)
    assert future.next_use(2, 1) == (0, 0, 2)
    future.move(Use(0, 0, 3), lambda: pytest.fail("the packs of a window are looked up once"))
    assert future.next_use(2, 1) == (1, 1, 0)


# memory


@given(readers=st.integers(1, 8), memory_bytes=st.sampled_from([0, 500, 2000, 1 << 20]), global_batch=st.integers(1, 6))
@settings(max_examples=25)
def test_threads_and_memory_change_nothing(readers, memory_bytes, global_batch):
    prepared = many(count=30, windows=3)
    sizes = {"global_batch": global_batch, "micro_batch": 2}
    plain = list(train(stream(prepared, memory(), readers=1, **sizes), 12))
    other = stream(prepared, memory(), readers=readers, memory_bytes=memory_bytes, **sizes)
    with other.prefetch(other.start(), 0, 1, steps=12) as steps:
        assert same(list(steps), plain)
    assert other.reader.held_bytes <= memory_bytes


def test_memory_holds_two_windows_however_many_there_are():
    held = {}
    for windows in (2, 12):
        s = stream(many(windows=windows), memory())
        held[windows] = max(s.reader.held_bytes for _ in train(s, 15 * windows))
    assert held[12] <= held[2]


def test_the_next_window_is_there_before_its_turn():
    prepared = many(windows=3)
    fetched = count_fetches(prepared)
    s = stream(prepared, memory())
    first = s.step(s.start())
    s.read_step(first, 0, 1)
    s.ahead(first)
    s._warming.join(10)
    following = s.upcoming.following()
    assert {b for w, b in fetched if w == following} == set(range(len(prepared.index(following).meta.blocks)))
    s.ahead(first)
    assert set(fetched.values()) == {1}


def test_what_cannot_be_read_ahead_is_raised_only_at_its_turn():
    prepared = many(windows=2)
    s = stream(prepared, memory())
    first = s.step(s.start())
    s.read_step(first, 0, 1)
    prepared.block_bytes = lambda *_: (_ for _ in ()).throw(StorageError("away"))
    s.ahead(first)
    s._warming.join(10)
    with pytest.raises(StorageError, match="away"):
        s.reader.samples([SampleRef(s.upcoming.following(), 0)])


def test_blocks_are_fetched_side_by_side_and_the_first_error_is_raised():
    together, seen = threading.Barrier(3, timeout=10), []
    in_parallel(lambda i: seen.append((i, together.wait())), range(3), 3)
    assert sorted(i for i, _ in seen) == [0, 1, 2]

    def failing(i):
        raise StorageError(f"no {i}")

    with pytest.raises(StorageError, match="no 0"):
        in_parallel(failing, range(5), 1)
    with pytest.raises(StorageError, match="no"):
        in_parallel(failing, range(5), 3)


# the host's disk


def cached(tmp_path, limit=1 << 20):
    return DiskCache(tmp_path, limit)


def get(cache, number, body, fetched=None, future=None):
    import hashlib

    def fetch():
        if fetched is not None:
            fetched.append(number)
        return body

    future = future or (lambda w, b: Use(0, w, b))
    return cache.get(number, 0, hashlib.sha256(body).hexdigest(), fetch, future)


def names(folder):
    return sorted(int(p.name.split("-")[0]) for p in folder.iterdir() if p.name[0].isdigit())


def test_an_epoch_later_nothing_travels_again(tmp_path):
    prepared = many()
    fetched = count_fetches(prepared)
    s = stream(prepared, memory(), cache=cached(tmp_path))
    list(train(s, 60))
    assert set(fetched.values()) == {1}
    again = stream(prepared, memory(), cache=cached(tmp_path))
    expected = list(train(stream(prepared, memory()), 5))
    fetched.clear()
    assert same(list(train(again, 5)), expected)
    assert not fetched


def test_what_is_used_latest_makes_room(tmp_path):
    cache, fetched = cached(tmp_path, limit=250), []
    for number in (1, 5, 3):
        get(cache, number, b"x" * 100, fetched)
    assert names(tmp_path) == [1, 3]
    get(cache, 9, b"x" * 100, fetched)
    assert names(tmp_path) == [1, 3], "a block used later than all that are there is not kept"
    get(cache, 0, b"x" * 100, fetched)
    assert names(tmp_path) == [0, 1]
    get(cache, 2, b"x" * 251, fetched)
    assert names(tmp_path) == [0, 1], "what is larger than the cache drives nothing out"
    assert fetched == [1, 5, 3, 9, 0, 2]


def test_furthest_next_use_keeps_part_of_data_that_do_not_fit(tmp_path):
    prepared = many(windows=4)
    total = sum(b.length for w in range(4) for b in prepared.index(w).meta.blocks)
    fetched = count_fetches(prepared)
    s = stream(prepared, memory(), cache=cached(tmp_path, limit=total // 2), memory_bytes=0)
    list(train(s, 60 * 5))
    whole = 5 * len(set(fetched))
    assert sum(fetched.values()) > len(fetched), "it does not fit"
    assert sum(p.stat().st_size for p in tmp_path.iterdir()) <= total // 2
    plain = many(windows=4)
    without = count_fetches(plain)
    list(train(stream(plain, memory(), memory_bytes=0), 60 * 5))
    assert sum(fetched.values()) < 0.75 * whole < sum(without.values())


def test_a_damaged_file_is_fetched_again(tmp_path, caplog):
    cache, fetched = cached(tmp_path), []
    get(cache, 1, b"whole", fetched)
    (file,) = (p for p in tmp_path.iterdir() if p.name.startswith("1-"))
    file.write_bytes(b"who")
    assert get(cache, 1, b"whole", fetched) == b"whole" == file.read_bytes()
    assert fetched == [1, 1]
    assert "is damaged" in caplog.text


def test_half_files_of_the_killed_are_swept(tmp_path):
    (tmp_path / ".0123abc").write_bytes(b"half")
    get(cached(tmp_path), 1, b"x")
    assert not (tmp_path / ".0123abc").exists()


@pytest.mark.parametrize("fault", ["full", "gone"])
def test_a_disk_that_fails_is_a_warning_and_training_goes_on(tmp_path, monkeypatch, caplog, fault):
    prepared = many()
    expected = list(train(stream(prepared, memory()), 20))
    cache = cached(tmp_path / "cache")
    s = stream(prepared, memory(), cache=cache)
    steps = train(s, 20)
    got = [next(steps) for _ in range(3)]
    if fault == "full":
        full = OSError(errno.ENOSPC, "No space left on device")
        monkeypatch.setattr(Path, "write_bytes", lambda *_: (_ for _ in ()).throw(full))
    else:
        shutil.rmtree(tmp_path / "cache")
    with caplog.at_level(logging.WARNING):
        got += list(steps)
    assert same(got, expected)
    assert cache.blocks.given_up
    assert caplog.text.count("given up") == 1


def test_some_of_the_disk_is_left_free(tmp_path, monkeypatch, caplog):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(disk_cache.shutil, "disk_usage", lambda _: usage(1000, 950, 52))
    cache = cached(tmp_path)
    assert get(cache, 1, b"xx") == b"xx"
    assert not cache.blocks.given_up
    assert get(cache, 2, b"xxx") == b"xxx"
    assert cache.blocks.given_up
    assert "would be left free" in caplog.text


def test_an_error_of_the_storage_is_no_fault_of_the_cache(tmp_path):
    cache = cached(tmp_path)
    with pytest.raises(CorruptObject):
        cache.get(0, 0, "0" * 64, lambda: (_ for _ in ()).throw(CorruptObject("torn")), lambda w, b: Use(0, 0, 0))
    assert not cache.blocks.given_up
    assert get(cache, 0, b"x") == b"x"


def _rank(folder, gate, log):
    cache = DiskCache(Path(folder), 1 << 20)
    fetched = []
    gate.wait(30)
    for number in range(12):
        assert get(cache, number, bytes([number]) * 1000, fetched) == bytes([number]) * 1000
    log.put(fetched)


def test_ranks_of_a_host_fetch_each_block_once(tmp_path):
    context = multiprocessing.get_context("fork")
    gate, log = context.Barrier(3), context.Queue()
    ranks = [context.Process(target=_rank, args=(str(tmp_path), gate, log)) for _ in range(3)]
    for rank in ranks:
        rank.start()
    fetched = [log.get(timeout=60) for _ in ranks]
    for rank in ranks:
        rank.join(30)
    assert sorted(n for one in fetched for n in one) == list(range(12))


def test_a_cache_is_for_storage_elsewhere_and_only_with_a_limit(tmp_path):
    remote = open_storage("s3://runs/_data")
    assert open_cache(remote, "a", 0, tmp_path) is None
    assert open_cache(open_storage(str(tmp_path)), "a", 100, tmp_path) is None
    assert open_cache(memory(), "a", 100, tmp_path) is None
    assert open_cache(remote, "a", 100, tmp_path).blocks.folder == tmp_path / "a"


def test_caches_that_nobody_uses_are_removed_when_another_is_opened(tmp_path):
    remote, root = open_storage("s3://runs/_data"), tmp_path / "blocks"
    a = open_cache(remote, "a", 100, root)
    b = open_cache(remote, "b", 100, root)
    get(a, 1, b"x")
    open_cache(remote, "c", 100, root).close()
    assert {p.name for p in root.iterdir()} == {"a", "b", "c"}
    a.close()
    b.close()
    kept = open_cache(remote, "a", 100, root)
    assert {p.name for p in root.iterdir()} == {"a"}
    fetched = []
    get(kept, 1, b"x", fetched)
    assert not fetched


def test_a_cache_that_cannot_be_opened_is_a_warning(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    assert open_cache(open_storage("s3://runs/_data"), "a", 100, tmp_path / "file") is None
    assert "no local copies" in caplog.text
