"""Preparing and reading while processes are killed, replies are lost, and somebody else does the same."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from tests.storage.doubles import Died, faulty, times
from tests.support.waiting import wait_for
from tests.unit.trainer.data.data_support import memory, pairs, source, stream, tokenizer, write_rows
from trainer.data import describe, eval_batches, freeze, open_prepared, prepare_dataset
from trainer.errors import CorruptObject, StorageError
from trainer.storage import open_storage
from trainer.storage.backend import Transient

ROOT = Path(__file__).resolve().parents[4]

prepare = functools.partial(prepare_dataset, window_bytes=1000)


@pytest.fixture
def spec(tmp_path):
    """Ten small files, two or three to a window."""
    for i in range(10):
        write_rows(tmp_path / "in" / f"{i}.jsonl", pairs(4, start=4 * i))
    return describe(freeze([source(tmp_path / "in" / "*.jsonl")]), tokenizer(), sequence_length=64)


@pytest.fixture
def store(monkeypatch):
    """A storage that may fail, which the window tasks open by its URL."""
    storage, backend = faulty()

    def opened(url):
        below = url.removeprefix(f"{storage.url}/")
        return open_storage(url) if below == url else storage.child(below)

    monkeypatch.setattr("trainer.data.prepare.window.open_storage", opened)
    return storage, backend


def undisturbed(spec):
    return prepare(spec, tokenizer(), memory())


def keys(backend, suffix):
    return sorted(path for path in backend.objects if path.endswith(suffix))


@pytest.mark.parametrize("moment", ["before", "after"])
def test_killed_at_any_put_it_goes_on_from_there(spec, store, moment):
    storage, backend = store
    expected = undisturbed(spec)
    puts = 2 * len(expected.windows) + 2  # data and index of each window, what comes first, and the manifest
    for last in range(1, puts + 1):
        backend.objects.clear()
        setattr(backend, moment, nth_put(last, Died))
        with pytest.raises(Died):
            prepare(spec, tokenizer(), storage)
        whole = moment == "after" and last == puts
        assert (open_prepared(storage, spec.fingerprint) is not None) == whole
        indexed, made = len(keys(backend, ".index")), []
        setattr(backend, moment, lambda verb, path: None)
        prepared = prepare(spec, tokenizer(), storage, map_windows=noting(made))
        assert made == list(range(indexed, 0 if whole else len(expected.windows)))
        assert prepared.windows == expected.windows
        assert len(keys(backend, ".data")) == len(expected.windows)


def noting(made):
    def run(task, jobs):
        made.extend(job.window for job in jobs)
        return map(task, jobs)

    return run


def nth_put(number, error):
    puts = []

    def hook(verb, path):
        if verb == "put":
            puts.append(path)
            if len(puts) == number:
                raise error

    return hook


def test_lost_replies_and_errors_of_the_storage_change_nothing(spec, store):
    storage, backend = store
    for count in (1, 3, 5):
        backend.after = times(count, Transient("the reply was lost"), "put")
        backend.before = times(count, Transient("503"))
        assert prepare(spec, tokenizer(), storage).windows == undisturbed(spec).windows
        backend.objects.clear()


def test_a_storage_that_stays_away_is_named(spec, store):
    storage, backend = store
    backend.before = times(10**6, Transient("503"), "put")
    with pytest.raises(StorageError, match=r"faulty://run/.*503"):
        prepare(spec, tokenizer(), storage)


def test_two_that_prepare_side_by_side_make_one(spec, store):
    storage, backend = store
    meet = threading.Barrier(2, timeout=30)

    def together(verb, path):
        if verb == "put" and not path.endswith(".json"):
            meet.wait()

    backend.before = together
    results = []
    two = [threading.Thread(target=lambda: results.append(prepare(spec, tokenizer(), storage))) for _ in range(2)]
    for thread in two:
        thread.start()
    for thread in two:
        thread.join(60)
    assert [r.windows for r in results] == [undisturbed(spec).windows] * 2
    assert len(keys(backend, ".data")) == len(keys(backend, ".index")) == len(results[0].windows)


def test_an_overtaken_writer_of_other_bytes_takes_what_is_there(spec, store):
    """A library of another version may write other bytes for the same samples: the index says whose data count."""
    storage, backend = store
    expected = undisturbed(spec)

    def overtaken(task, jobs):
        theirs = list(map(replace(task, block_bytes=200), jobs[:2]))
        yield from map(task, jobs)
        assert [entry.sha256 for entry in theirs] != [entry.sha256 for entry in expected.windows[:2]]

    prepared = prepare(spec, tokenizer(), storage, map_windows=overtaken)
    same = [a.sha256 == b.sha256 for a, b in zip(prepared.windows, expected.windows, strict=True)]
    assert same == [False, False] + [True] * (len(same) - 2)
    assert len(keys(backend, ".data")) == len(same) + 2
    tokens = [[b.input_ids.tolist() for b in eval_batches(p, 2, 0, 1)] for p in (prepared, expected)]
    assert tokens[0] == tokens[1]


KILLED = """
import sys, time
from tests.unit.trainer.data.data_support import *
from trainer.data import *
folder, out = sys.argv[1:]

def two_windows(task, jobs):
    yield task(jobs[0])
    yield task(jobs[1])
    print("two", flush=True)
    time.sleep(600)

spec = describe(freeze([source(folder + "/*.jsonl")]), tokenizer(), sequence_length=64)
prepare_dataset(spec, tokenizer(), open_storage(out), map_windows=two_windows, window_bytes=1000)
"""


def test_a_process_that_is_killed_leaves_what_the_next_one_goes_on_with(spec, tmp_path):
    command = [sys.executable, "-c", KILLED, str(tmp_path / "in"), str(tmp_path / "out")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, start_new_session=True) as process:
        assert process.stdout.readline() == b"two\n"
        os.killpg(process.pid, signal.SIGKILL)
    shared, made = open_storage(str(tmp_path / "out")), []
    wait_for(lambda: process.poll() is not None, "the end of the killed process", timeout_s=10)
    prepared = prepare(spec, tokenizer(), shared, map_windows=noting(made))
    assert made == list(range(2, len(prepared.windows)))
    assert prepared.windows == undisturbed(spec).windows


def test_a_block_damaged_on_its_way_is_read_again_and_one_damaged_for_good_is_named(spec):
    prepared = undisturbed(spec)
    original, reads = prepared.storage.read_range, []

    def torn(key, start, stop):
        reads.append(key)
        body = original(key, start, stop)
        return body if len(reads) % 2 == 0 else b"\0" + body[1:]

    prepared.storage.read_range = torn
    s = stream(prepared, memory())
    plan = s.step(s.start())
    assert s.read_step(plan, 0, 1).batches[0].tokens == plan.micro_batches[0].tokens
    assert len(reads) % 2 == 0

    prepared.storage.read_range = lambda key, start, stop: b"\0" * (stop - start)
    s = stream(prepared, memory())
    with (
        s.prefetch(s.start(), 0, 1) as steps,
        pytest.raises(CorruptObject, match=rf"{prepared.fingerprint}/w\d+-\w+\.data: read twice"),
    ):
        next(steps)
