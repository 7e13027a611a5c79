"""Training that begins before all windows are prepared: on the same samples, with bounded waits, and honest ends."""

from __future__ import annotations

import functools
import re
import threading

import numpy as np
import pytest

from launcher.driver.background_prepare import EarlyStart
from tests.support.training import small_recipe
from tests.support.waiting import wait_for
from tests.unit.trainer.data.data_support import memory, pairs, source, stream, tokenizer, write_rows
from trainer.data import PartialDataset, describe, epoch_order, freeze, open_begun, open_prepared, prepare_dataset
from trainer.data.prepare.partial import BEGUN, PATIENCE_S
from trainer.data.prepare.prepared import MANIFEST
from trainer.data.prepare.window import index_key
from trainer.data.run_data import open_data, prepare_data, try_open_data
from trainer.errors import CorruptObject, InputError, StorageError

SEED = 17
WINDOW_BYTES = 1000

prepare = functools.partial(prepare_dataset, window_bytes=WINDOW_BYTES)


@pytest.fixture
def spec(tmp_path):
    """Twelve small files in windows of about 1000 bytes."""
    for i in range(12):
        write_rows(tmp_path / "in" / f"{i:02d}.jsonl", pairs(4, start=4 * i))
    return describe(freeze([source(tmp_path / "in" / "*.jsonl")]), tokenizer(), sequence_length=64)


class Copies:
    """Windows that appear in a second folder one at a time, as if somebody were preparing them."""

    def __init__(self, spec, order):
        self.whole, self.shared = prepare(spec, tokenizer(), memory()), memory()
        self.folder, self.left = self.shared.child(spec.fingerprint), list(order)
        self.copy(BEGUN)
        self.begun = PartialDataset(self.folder, spec, self.whole.count, clock=self.clock, sleep=self.sleep)
        self.now, self.pause_s, self.lock = 0.0, 100.0, threading.Lock()  # reading ahead waits in a thread of its own

    def copy(self, key):
        self.folder.put_if_absent(key, self.whole.storage.read(key))

    def add(self):
        window = self.left.pop(0)
        self.copy(self.whole.index(window).meta.data)
        self.copy(index_key(window))

    def clock(self):
        return self.now

    def sleep(self, seconds):
        with self.lock:
            self.now += self.pause_s
            if self.left:
                self.add()


def order_of(spec, count):
    return epoch_order(spec.order_key, SEED, 0, count)


def steps_of(prepared, count):
    s = stream(prepared, memory(), seed=SEED)
    with s.prefetch(s.start(), 0, 1, steps=count) as steps:
        return [(step.plan, [b.input_ids for b in step.batches]) for step in steps]


def same(a, b):
    return all(
        p == q and all(np.array_equal(x, y) for x, y in zip(xs, ys, strict=True))
        for (p, xs), (q, ys) in zip(a, b, strict=True)
    )


def test_windows_that_come_late_are_the_same_windows(spec):
    count = prepare(spec, tokenizer(), memory()).count
    assert count == 4
    copies = Copies(spec, order_of(spec, count))
    got = steps_of(copies.begun, 40)
    assert not copies.left
    assert {plan.epoch for plan, _ in got} >= {0, 1}
    assert same(got, steps_of(copies.whole, 40))
    assert (copies.begun.count, copies.begun.windows, copies.begun.totals.samples) == (count, [], 0)


def test_the_wait_lasts_as_long_as_windows_go_on_appearing(spec, caplog):
    copies = Copies(spec, range(4))
    last = copies.left[-1]
    copies.pause_s = 0.9 * PATIENCE_S
    assert len(copies.begun.index(last)) == len(copies.whole.index(last))
    assert copies.now > 2 * PATIENCE_S
    assert re.search(rf"waiting for data: [1-4] of {copies.whole.count} windows", caplog.text)


def test_without_a_new_window_it_is_given_up(spec):
    copies = Copies(spec, range(4))
    last, copies.left = copies.left[-1], copies.left[:2]
    with pytest.raises(InputError, match=rf"2 of {copies.whole.count} windows .* none was added for 15 minutes"):
        copies.begun.index(last)
    assert copies.now < 2 * PATIENCE_S


def test_begun_data_are_opened_as_what_they_are(spec):
    shared = memory()
    assert open_begun(shared, spec.fingerprint) is None
    copies = Copies(spec, [])
    assert isinstance(open_begun(copies.shared, spec.fingerprint), PartialDataset)
    assert open_prepared(copies.shared, spec.fingerprint) is None
    copies.copy(MANIFEST)
    assert open_begun(copies.shared, spec.fingerprint).windows == copies.whole.windows
    torn = memory()
    torn.child(spec.fingerprint).write_json(BEGUN, {"spec": 1})
    with pytest.raises(CorruptObject, match="cannot be understood"):
        open_begun(torn, spec.fingerprint)


def test_windows_cut_otherwise_are_not_mixed(spec):
    shared = memory()

    def none(task, jobs):
        raise StorageError("away")

    with pytest.raises(StorageError):
        prepare(spec, tokenizer(), shared, map_windows=none)
    with pytest.raises(CorruptObject, match="cuts the inputs into other windows"):
        prepare_dataset(spec, tokenizer(), shared, window_bytes=2000)


class Gate:
    """A ``map`` that makes ``free`` windows and then waits to be opened, or to be stopped; then it may fail."""

    def __init__(self, free, error=None):
        self.free, self.error, self.open, self.made = free, error, threading.Event(), []

    def __call__(self, stopped):
        def run(task, jobs):
            for number, job in enumerate(jobs):
                if number >= self.free:
                    wait_for(lambda: self.open.is_set() or stopped(), "the gate", timeout_s=30, every_s=0.01)
                    if self.error:
                        raise self.error
                self.made.append(job.window)
                yield task(job)

        return run


def test_training_begins_with_the_first_window(spec):
    shared, gate = memory(), Gate(free=1)
    whole = prepare(spec, tokenizer(), memory())
    with EarlyStart(SEED, gate, None, window_bytes=WINDOW_BYTES) as early:
        begun = early.prepare(spec, tokenizer(), shared)
        assert early.going_on
        assert isinstance(begun, PartialDataset)
        first = stream(begun, memory(), seed=SEED)
        assert first.read_step(first.step(first.start()), 0, 1).plan.samples
        gate.open.set()
        assert same(steps_of(begun, 30), steps_of(whole, 30))
        wait_for(lambda: not early.going_on, "the last window", timeout_s=30)
        early.check()
    assert gate.made == order_of(spec, whole.count)
    assert open_prepared(shared, spec.fingerprint).windows == whole.windows


def test_an_error_before_the_first_window_is_raised_at_once(spec):
    gate = Gate(0, InputError("row 1"))
    gate.open.set()
    with EarlyStart(SEED, gate, None, window_bytes=WINDOW_BYTES) as early, pytest.raises(InputError, match="row 1"):
        early.prepare(spec, tokenizer(), memory())


def test_a_later_error_is_raised_when_the_driver_asks(spec):
    gate = Gate(1, InputError("row 900"))
    with EarlyStart(SEED, gate, None, window_bytes=WINDOW_BYTES) as early:
        early.prepare(spec, tokenizer(), memory())
        early.check()
        gate.open.set()
        wait_for(lambda: not early.going_on, "the error", timeout_s=30)
        with pytest.raises(InputError, match="row 900"):
            early.check()


def test_closed_it_stops_and_the_next_one_goes_on(spec):
    shared, gate = memory(), Gate(free=2)
    with EarlyStart(SEED, gate, None, window_bytes=WINDOW_BYTES) as early:
        early.prepare(spec, tokenizer(), shared)
    assert not early.going_on
    early.check()
    assert open_prepared(shared, spec.fingerprint) is None
    there, again = [w for w in range(4) if open_begun(shared, spec.fingerprint).ready(w)], Gate(free=99)
    assert 1 <= len(there) <= 3
    with EarlyStart(SEED, again, None, window_bytes=WINDOW_BYTES) as early:
        early.prepare(spec, tokenizer(), shared)
        wait_for(lambda: not early.going_on, "the last window", timeout_s=30)
    assert again.made == [w for w in order_of(spec, 4) if w not in there]
    assert open_prepared(shared, spec.fingerprint) is not None


def test_data_of_one_window_is_complete_when_training_begins(spec):
    """So that its counts, its warnings and too many bad rows are known before."""
    with EarlyStart(SEED, Gate(free=99), None) as early:
        data = early.prepare(spec, tokenizer(), memory())
    assert (data.count, len(data.windows)) == (1, 1)
    assert data.totals.samples > 0


@pytest.mark.parametrize(("steps", "epochs"), [(4, None), (None, 2)])
def test_only_a_recipe_that_says_its_steps_starts_early(tiny_model, tmp_path, spec, steps, epochs):
    write_rows(tmp_path / "data" / "x.jsonl", pairs(20))
    recipe = small_recipe("early", tiny_model, tmp_path, **{"training.steps": steps, "training.epochs": epochs})
    run, shared, asked = memory(), memory(), []

    def early(spec, tokenizer, shared):
        asked.append(spec)
        whole = prepare(spec, tokenizer, shared)
        shared.child(spec.fingerprint).delete([MANIFEST])
        return open_begun(shared, whole.fingerprint)

    data = prepare_data(recipe, run, shared, tokenizer, early=early)
    assert isinstance(data.train, PartialDataset) == bool(steps) == bool(asked)
    assert data.total_steps == steps or data.total_steps > 0
    assert isinstance(open_data(recipe, run, shared).train, PartialDataset) == bool(steps)
    assert (try_open_data(recipe, run, shared) is None) == bool(steps)
