"""The stream: each sample once an epoch, the same micro-batches for any number of ranks, resume at any step."""

from __future__ import annotations

import json
import threading
from collections import Counter
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.trainer.data.data_support import made, memory, stream
from trainer.data import Batch, Cursor, count_steps, eval_batches
from trainer.data.loading.prefetch import Prefetcher
from trainer.data.order.order_store import plan_key
from trainer.errors import CorruptObject, InputError, StorageError

LENGTH = 16
WINDOWS = st.lists(
    st.lists(st.tuples(st.integers(0, 1), st.integers(2, LENGTH)), max_size=14), min_size=1, max_size=4
).filter(any)
SIZES = st.tuples(st.integers(1, 7), st.integers(1, 4))


def steps_of(s, count, cursor=None):
    cursor = cursor or s.start()
    for _ in range(count):
        plan = s.step(cursor)
        yield plan
        cursor = plan.next


def refs(plan):
    return [ref for m in plan.micro_batches for pack in m.packs for ref in pack]


def count(prepared, epochs, global_batch, weights=None):
    spec = prepared.spec
    weights = weights or [1.0] * len(spec.sources)
    return count_steps(
        prepared,
        seed=17,
        epochs=epochs,
        global_batch=global_batch,
        sequence_length=spec.sequence_length,
        packing=spec.packing,
        weights=weights,
    )


@given(windows=WINDOWS, sizes=SIZES, packing=st.booleans())
@settings(max_examples=40)
def test_each_sample_exactly_once_per_epoch(windows, sizes, packing):
    prepared, (global_batch, micro_batch) = made(windows, LENGTH, packing), sizes
    s = stream(prepared, memory(), global_batch=global_batch, micro_batch=micro_batch)
    per_epoch = count(prepared, 1, global_batch)
    plans = list(steps_of(s, 2 * per_epoch))
    everything = {(w, i): 1 for w, window in enumerate(windows) for i in range(len(window))}
    for epoch in (0, 1):
        mine = plans[epoch * per_epoch : (epoch + 1) * per_epoch]
        assert {p.epoch for p in mine} == {epoch}
        assert Counter(tuple(r) for p in mine for r in refs(p)) == everything
        assert all(sum(len(m.packs) for m in p.micro_batches) == global_batch for p in mine[:-1])
    assert count(prepared, 2, global_batch) == 2 * per_epoch
    assert plans[-1].next.samples == 2 * len(everything) == sum(p.samples for p in plans)


@given(windows=WINDOWS, sizes=SIZES, world_size=st.integers(1, 5))
@settings(max_examples=30)
def test_any_number_of_ranks_feeds_the_same_micro_batches(windows, sizes, world_size):
    prepared, run = made(windows, LENGTH), memory()
    s = stream(prepared, run, global_batch=sizes[0], micro_batch=sizes[1])
    for plan in steps_of(s, 3):
        ranks = [s.read_step(plan, rank, world_size).batches for rank in range(world_size)]
        assert sorted(b.index for batches in ranks for b in batches) == list(range(len(plan.micro_batches)))
        assert max(map(len, ranks)) == plan.rounds(world_size)
        assert sum(b.tokens for batches in ranks for b in batches) == plan.tokens
        assert sum(b.target_tokens for batches in ranks for b in batches) == plan.target_tokens
        for batches in ranks:
            for batch in batches:
                assert_batch(batch, plan.micro_batches[batch.index], prepared)


def assert_batch(batch, micro_batch, prepared):
    """Every array of a batch against the samples that the plan names: sample n holds tokens n, n, …."""
    longest = 0
    for row, pack in enumerate(micro_batch.packs):
        at = 0
        for window, sample in pack:
            index = prepared.index(window)
            end = at + int(index.length[sample])
            assert batch.input_ids[row, at:end].tolist() == [index.row[sample]] * (end - at)
            assert batch.position_ids[row, at:end].tolist() == list(range(end - at))
            assert batch.targets[row, at:end].tolist() == [False] + [True] * (end - at - 1)
            at = end
        assert not batch.input_ids[row, at:].any()
        assert not batch.position_ids[row, at:].any()
        assert not batch.targets[row, at:].any()
        longest = max(longest, at)
    assert batch.input_ids.shape == (len(micro_batch.packs), longest)
    assert longest <= LENGTH
    assert batch.sample_ids == [prepared.index(w).sample_id(i) for pack in micro_batch.packs for w, i in pack]


@given(windows=WINDOWS, sizes=SIZES, stop=st.integers(0, 12))
@settings(max_examples=30)
def test_resuming_at_any_step_equals_going_on(windows, sizes, stop):
    prepared, run = made(windows, LENGTH), memory()
    given_sizes = {
        "global_batch": sizes[0],
        "micro_batch": sizes[1],
        "weights": [1.0, 0.5][: len(prepared.spec.sources)],
    }
    whole = list(steps_of(stream(prepared, run, **given_sizes), stop + 4))
    cursor = whole[stop - 1].next if stop else stream(prepared, run, **given_sizes).start()
    kept = Cursor.from_json(json.loads(json.dumps(cursor.to_json())))
    assert list(steps_of(stream(prepared, run, **given_sizes), 4, kept)) == whole[stop:]


def many(count=40, windows=3):
    return made([[(i % 2, 2 + i * 5 % 13) for i in range(count)] for _ in range(windows)], LENGTH)


def test_two_runs_of_one_seed_agree_and_of_two_do_not():
    prepared = many()
    orders = [[refs(p) for p in steps_of(stream(prepared, memory(), seed=s), 5)] for s in (17, 17, 18)]
    assert orders[0] == orders[1] != orders[2]


def test_resuming_reads_one_plan_and_makes_none(monkeypatch):
    prepared, run = many(), memory()
    *_, last = steps_of(stream(prepared, run), 12)
    before = [o.key for o in run.list()]
    monkeypatch.setattr("trainer.data.order.order_store.plan_window", lambda *_: pytest.fail("a plan was made again"))
    reads = []
    original = type(run).read
    monkeypatch.setattr(type(run), "read", lambda self, key: reads.append(key) or original(self, key))
    stream(prepared, run).step(replace(last.next))
    assert [k for k in reads if k.startswith("plan/")] == [plan_key(last.next.epoch, last.next.window)]
    assert [o.key for o in run.list()] == before


def test_a_run_does_not_plan_beyond_its_last_step():
    prepared, run = many(windows=1), memory()
    list(steps_of(stream(prepared, run), count(prepared, 1, 4)))
    assert [o.key for o in run.list()] == [plan_key(0, 0)]


def test_weights_sub_and_upsample():
    prepared = made([[(0, 4)] * 60 + [(1, 4)] * 60], LENGTH)
    weights = [2.0, 0.5]
    s = stream(prepared, memory(), weights=weights)
    seen = Counter(r.sample for p in steps_of(s, count(prepared, 1, 4, weights)) for r in refs(p))
    assert all(seen[i] == 2 for i in range(60))
    assert all(seen[i] <= 1 for i in range(60, 120))
    assert 15 <= sum(seen[i] for i in range(60, 120)) <= 45
    assert count(prepared, 3, 4, weights) == sum(
        1 for p in islice(steps_of(stream(prepared, memory(), weights=weights), 500), 500) if p.epoch < 3
    )


def test_a_step_never_crosses_into_the_next_epoch():
    prepared = made([[(0, LENGTH)] * 3, [(0, LENGTH)] * 2], LENGTH)
    plans = list(steps_of(stream(prepared, memory(), global_batch=4), 4))
    assert [(p.epoch, p.samples) for p in plans] == [(0, 4), (0, 1), (1, 4), (1, 1)]
    assert len({r.window for r in refs(plans[0])}) == 2


def test_a_start_that_was_given_up_does_not_bind_the_next_one_to_its_data(caplog):
    """Killed before its first checkpoint; then the data, or what orders them, was changed."""
    run = memory()
    list(steps_of(stream(made([[(0, 5)] * 9] * 3, LENGTH), run), 3))
    prepared = made([[(0, 7)] * 30, [(0, 4)] * 30], LENGTH)
    for seed in (17, 18):
        plans = list(steps_of(stream(prepared, run, seed=seed), 9))
        assert plans == list(steps_of(stream(prepared, memory(), seed=seed), 9))
    assert "of an earlier start on other data or settings, and is replaced" in caplog.text


def test_another_plan_than_the_cursors_is_refused():
    prepared, run = many(), memory()
    (first,) = steps_of(stream(prepared, run), 1)
    with pytest.raises(CorruptObject, match=r"plan/e00000-w000000\.arrow is not the plan that this run has followed"):
        stream(prepared, run).step(replace(first.next, chain="0" * 64))
    other = memory()
    stream(prepared, other, weights=[2.0, 1.0]).start()
    run.write(plan_key(0, 0), other.read(plan_key(0, 0)))
    with pytest.raises(CorruptObject, match="is not the plan"):
        stream(prepared, run).step(first.next)


def test_a_plan_that_is_gone_or_torn_is_named_not_made_again():
    prepared, run = many(), memory()
    (first,) = steps_of(stream(prepared, run), 1)
    raw = run.read(plan_key(0, 0))
    run.write(plan_key(0, 0), raw[: len(raw) // 2])
    with pytest.raises(CorruptObject, match="is not a complete plan"):
        stream(prepared, run).step(first.next)
    run.delete([plan_key(0, 0)])
    with pytest.raises(CorruptObject, match="is gone"):
        stream(prepared, run).step(first.next)


@pytest.mark.parametrize("change", [{"fingerprint": "other"}, {"seed": 3}])
def test_a_cursor_of_other_data_or_another_seed_is_refused(change):
    s = stream(many(), memory())
    with pytest.raises(CorruptObject, match="the data cursor belongs to"):
        s.step(replace(s.start(), **change))


@pytest.mark.parametrize("change", [{"pack": "1"}, {"extra": 1}, {"epoch": True}])
def test_a_torn_cursor_is_refused(change):
    whole = stream(many(), memory()).start().to_json()
    with pytest.raises(CorruptObject, match=next(iter(change))):
        Cursor.from_json({**whole, **change})


def test_settings_other_than_the_preparations_are_refused():
    with pytest.raises(InputError, match="prepared for sequence_length 16"):
        stream(many(), memory(), sequence_length=8)


def test_weights_that_leave_nothing_are_an_error_not_a_hang():
    s = stream(made([[(0, 4)]], LENGTH), memory(), weights=[1e-12])
    with pytest.raises(InputError, match="select none of the 1 samples"):
        s.step(s.start())


def test_blocks_are_bounded_and_read_once_while_they_last(monkeypatch):
    prepared = made([[(0, LENGTH)] * 60], LENGTH)
    s = stream(prepared, memory())
    fetched = Counter()
    original = type(prepared).block_bytes
    monkeypatch.setattr(
        type(prepared), "block_bytes", lambda self, w, b: fetched.update([(w, b)]) or original(self, w, b)
    )
    for plan in steps_of(s, 15):
        s.read_step(plan, 0, 1)
    assert len(fetched) == len(prepared.index(0).meta.blocks) > 5
    assert set(fetched.values()) == {1}
    small = stream(prepared, memory(), memory_bytes=500)
    for plan in steps_of(small, 15):
        small.read_step(plan, 0, 1)
        assert small.reader.held_bytes <= 500


def test_many_threads_fetch_a_block_once(monkeypatch):
    prepared = many()
    s, gate, fetched = stream(prepared, memory()), threading.Event(), []
    original = type(prepared).block_bytes

    def slow(self, window, block):
        fetched.append(block)
        assert gate.wait(10)
        return original(self, window, block)

    monkeypatch.setattr(type(prepared), "block_bytes", slow)
    blocks = []
    threads = [threading.Thread(target=lambda: blocks.append(s.reader.block(0, 0))) for _ in range(4)]
    for t in threads:
        t.start()
    gate.set()
    for t in threads:
        t.join(10)
    assert fetched == [0]
    assert len(blocks) == 4
    assert len(set(map(id, blocks))) == 1


def test_a_failed_fetch_is_tried_again_by_the_next_reader(monkeypatch):
    prepared = many()
    s = stream(prepared, memory())
    with monkeypatch.context() as m:
        m.setattr(type(prepared), "block_bytes", lambda *_: (_ for _ in ()).throw(StorageError("away")))
        with pytest.raises(StorageError):
            s.reader.block(0, 0)
    assert len(s.reader.block(0, 0).tokens)


@pytest.mark.parametrize("world_size", [1, 3])
def test_prefetching_gives_the_steps_in_order(world_size):
    s = stream(many(), memory())
    expected = [s.read_step(p, 0, world_size) for p in steps_of(s, 9)]
    with s.prefetch(s.start(), 0, world_size, steps=9) as steps:
        got = list(steps)
    assert [g.plan for g in got] == [e.plan for e in expected]
    for g, e in zip(got, expected, strict=True):
        assert all(np.array_equal(a.input_ids, b.input_ids) for a, b in zip(g.batches, e.batches, strict=True))


def test_prefetching_ends_when_it_is_closed():
    s = stream(many(), memory())
    with s.prefetch(s.start(), 0, 1) as steps:
        next(steps)
        assert steps._thread.is_alive()
    assert not steps._thread.is_alive()
    assert list(steps) == []
    steps.close()


def test_what_fails_while_reading_ahead_is_raised_where_its_step_would_be():
    s = stream(many(), memory())
    plans = list(steps_of(s, 3))

    class Failing:
        def step(self, cursor):
            return s.step(cursor)

        def read_step(self, plan, rank, world_size):
            if plan == plans[2]:
                raise StorageError("the storage is away")
            return s.read_step(plan, rank, world_size)

        def ahead(self, plan):
            s.ahead(plan)

    steps = Prefetcher(Failing(), s.start(), 0, 1)
    assert [next(steps).plan, next(steps).plan] == plans[:2]
    with pytest.raises(StorageError, match="away"):
        next(steps)
    assert not steps._thread.is_alive()


@given(windows=WINDOWS, micro_batch=st.integers(1, 4), world_size=st.integers(1, 4), packing=st.booleans())
@settings(max_examples=30)
def test_evaluation_feeds_each_sample_once_and_every_rank_as_often(windows, micro_batch, world_size, packing):
    prepared = made(windows, LENGTH, packing)
    ranks = [list(eval_batches(prepared, micro_batch, rank, world_size)) for rank in range(world_size)]
    assert len({len(batches) for batches in ranks}) == 1
    ids = Counter(i for batches in ranks for b in batches for i in b.sample_ids)
    assert len(ids) == sum(map(len, windows))
    assert set(ids.values()) == {1}
    (alone,) = [list(eval_batches(prepared, micro_batch, 0, 1))]
    shared = sorted((b for batches in ranks for b in batches if b.index >= 0), key=lambda b: b.index)
    assert [b.sample_ids for b in shared] == [b.sample_ids for b in alone]


def test_the_empty_batch_weighs_nothing():
    empty = Batch.empty()
    assert empty.input_ids.shape == empty.position_ids.shape == empty.targets.shape == (1, 8)
    assert not empty.targets.any()
    assert (empty.tokens, empty.target_tokens, empty.sample_ids) == (0, 0, [])


def test_order_within_a_window_is_shuffled_and_sources_are_mixed():
    prepared = made([[(0, 8)] * 100 + [(1, 8)] * 100], LENGTH)
    order = [r.sample for p in steps_of(stream(prepared, memory()), count(prepared, 1, 4)) for r in refs(p)]
    assert abs(np.corrcoef(np.arange(len(order)), order)[0, 1]) < 0.25
    assert 30 < sum(i >= 100 for i in order[:100]) < 70
