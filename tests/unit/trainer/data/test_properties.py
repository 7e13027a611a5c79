"""What holds of the order of the data for any sizes, weights and numbers of ranks."""

from __future__ import annotations

import json
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.golden import plans as golden
from tests.unit.trainer.data.data_support import made, memory, stream
from trainer.data import count_steps
from trainer.data.prepare.split import Span, windows

LENGTH = 16
WINDOW = st.lists(st.tuples(st.integers(0, 2), st.integers(2, LENGTH)), max_size=12)
WINDOWS = st.lists(WINDOW, min_size=1, max_size=5).filter(any)
WEIGHT = st.sampled_from([0.25, 0.5, 1.0, 1.5, 2.0, 3.0])
GLOBAL_BATCH, MICRO_BATCH = st.integers(1, 9), st.integers(1, 4)


def count(prepared, epochs, global_batch, weights):
    return count_steps(
        prepared,
        seed=17,
        epochs=epochs,
        global_batch=global_batch,
        sequence_length=LENGTH,
        packing=True,
        weights=weights,
    )


def run(s, steps, cursor=None):
    cursor = cursor or s.start()
    for _ in range(steps):
        plan = s.step(cursor)
        yield plan
        cursor = plan.next


def refs(plan):
    return [tuple(ref) for m in plan.micro_batches for pack in m.packs for ref in pack]


def weights_of(prepared, weights):
    return weights[: len(prepared.spec.sources)]


@given(
    shape=WINDOWS,
    weights=st.tuples(WEIGHT, WEIGHT, WEIGHT),
    global_batch=GLOBAL_BATCH,
    micro_batch=MICRO_BATCH,
)
@settings(max_examples=60)
def test_weights_decide_how_often_each_sample_comes_in_each_epoch(shape, weights, global_batch, micro_batch):
    prepared = made(shape, LENGTH)
    weights = weights_of(prepared, weights)
    per_epoch = [
        count(prepared, e + 1, global_batch, weights) - count(prepared, e, global_batch, weights) for e in (0, 1, 2)
    ]
    assume(all(per_epoch))
    s = stream(prepared, memory(), weights=weights, global_batch=global_batch, micro_batch=micro_batch)
    steps = list(run(s, sum(per_epoch)))
    assert [p.epoch for p in steps] == [e for e, n in enumerate(per_epoch) for _ in range(n)]
    for epoch in range(3):
        seen = Counter(r for p in steps if p.epoch == epoch for r in refs(p))
        for w, window in enumerate(shape):
            for i, (source, _) in enumerate(window):
                assert seen[w, i] in (math.floor(weights[source]), math.ceil(weights[source]))


@given(
    shape=WINDOWS,
    global_batch=GLOBAL_BATCH,
    micro_batch=MICRO_BATCH,
    sizes=st.lists(st.integers(1, 7), min_size=1, max_size=6),
)
@settings(max_examples=40)
def test_a_run_that_changes_its_number_of_ranks_feeds_what_one_rank_feeds(shape, global_batch, micro_batch, sizes):
    prepared, kept = made(shape, LENGTH), memory()
    given_sizes = {"global_batch": global_batch, "micro_batch": micro_batch}
    alone = stream(prepared, memory(), **given_sizes)
    cursor = alone_cursor = alone.start()
    for world_size in sizes:
        attempt = stream(prepared, kept, **given_sizes)
        attempt.start()
        expected = alone.step(alone_cursor)
        plan = attempt.step(cursor)
        parts = [b for rank in range(world_size) for b in attempt.read_step(plan, rank, world_size).batches]
        whole = alone.read_step(expected, 0, 1).batches
        parts.sort(key=lambda b: b.index)
        assert [b.index for b in parts] == [b.index for b in whole]
        assert all(
            np.array_equal(a.input_ids, b.input_ids) and a.sample_ids == b.sample_ids
            for a, b in zip(parts, whole, strict=True)
        )
        assert sum(b.target_tokens for b in parts) == plan.target_tokens == expected.target_tokens
        cursor, alone_cursor = plan.next, expected.next


@given(shape=WINDOWS, global_batch=GLOBAL_BATCH, first=st.integers(0, 30))
@settings(max_examples=40)
def test_every_cursor_is_the_state_whatever_came_before_it(shape, global_batch, first):
    """Window edges and epoch edges among them: a new process goes on from any cursor as the old one would have."""
    prepared, kept = made(shape, LENGTH), memory()
    going_on = list(run(stream(prepared, kept, global_batch=global_batch), first + 3))
    if first:
        resumed = list(run(stream(prepared, kept, global_batch=global_batch), 3, going_on[first - 1].next))
        assert resumed == going_on[first:]
    samples = np.cumsum([p.samples for p in going_on])
    assert [p.next.samples for p in going_on] == samples.tolist()


@given(
    lengths=st.lists(st.integers(2, LENGTH), min_size=1, max_size=5), one_pack=st.booleans(), more=st.integers(0, 50)
)
@settings(max_examples=40)
def test_packs_and_steps_larger_than_the_data(lengths, one_pack, more):
    prepared = made([[(0, n) for n in lengths]], 1000 if one_pack else LENGTH)
    s = stream(prepared, memory(), global_batch=len(lengths) + more, micro_batch=2)
    first, second = run(s, 2)
    assert sorted(refs(first)) == sorted(refs(second)) == [(0, i) for i in range(len(lengths))]
    assert (first.epoch, second.epoch) == (0, 1)
    assert first.tokens == sum(lengths)
    assert first.target_tokens == sum(lengths) - len(lengths)
    ranks = [s.read_step(first, rank, 4).batches for rank in range(4)]
    assert sum(map(len, ranks)) == len(first.micro_batches)
    assert first.rounds(4) == max(map(len, ranks))


@pytest.mark.parametrize("name", sorted(json.loads(golden.FILE.read_text())))
def test_plans_are_what_they_were(name):
    assert golden.digests()[name] == json.loads(golden.FILE.read_text())[name]


# how well it is shuffled

SAMPLES = 400


def order_of(seed, epoch=0):
    """The samples of an epoch over four windows of two sources each, as (window, row in window, source)."""
    shape = [[(i >= SAMPLES // 2, 8) for i in range(SAMPLES)] for _ in range(4)]
    prepared = made([[(int(s), n) for s, n in window] for window in shape], LENGTH)
    steps = run(stream(prepared, memory(), seed=seed, global_batch=8), 2 * 4 * SAMPLES // 2 // 8)
    return [(w, i, int(i >= SAMPLES // 2)) for p in steps if p.epoch == epoch for w, i in refs(p)]


@pytest.mark.parametrize("seed", [17, 18, 19])
def test_a_samples_place_says_nothing_about_its_turn(seed):
    order = order_of(seed)
    assert len(order) == 4 * SAMPLES
    for window in range(4):
        rows = [i for w, i, _ in order if w == window]
        # 4 standard deviations of the correlation of two random permutations
        assert abs(np.corrcoef(np.arange(SAMPLES), rows)[0, 1]) < 4 / math.sqrt(SAMPLES - 1)


@pytest.mark.parametrize("seed", [17, 18, 19])
def test_an_epoch_says_nothing_about_the_next(seed):
    turns = []
    for epoch in (0, 1):
        place = {(w, i): at for at, (w, i, _) in enumerate(order_of(seed, epoch))}
        turns.append([place[key] for key in sorted(place)])
    within = np.corrcoef(*[np.array(t) % SAMPLES for t in turns])[0, 1]
    assert abs(within) < 4 / math.sqrt(4 * SAMPLES - 1)


@pytest.mark.parametrize("seed", [17, 18, 19])
def test_sources_come_in_runs_as_short_as_chance_makes_them(seed):
    """Wald and Wolfowitz: the number of runs of two kinds in a random order, n of each, is n + 1 give or take."""
    sources = np.array([source for _, _, source in order_of(seed)])
    n = len(sources) // 2
    runs = 1 + int((np.diff(sources) != 0).sum())
    deviation = math.sqrt(2 * n * n * (2 * n * n - 2 * n) / ((2 * n) ** 2 * (2 * n - 1)))
    assert abs(runs - (n + 1)) < 4 * deviation
    longest = max(len(list(group)) for group in np.split(sources, np.flatnonzero(np.diff(sources)) + 1))
    assert longest < 3 * math.log2(2 * n)


@given(
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=4),
    window_bytes=st.integers(1, 400),
    key=st.text("ab", min_size=1, max_size=3),
)
@settings(max_examples=60)
def test_windows_hold_every_span_once_and_are_about_as_large_as_each_other(sizes, window_bytes, key):
    spans = [Span(s, 0, 10 * i, 10 * i + 10, 10) for s, n in enumerate(sizes) for i in range(n)]
    groups = windows(spans, key, window_bytes)
    assert sorted(s for g in groups for s in g) == sorted(spans)
    assert max(len(g) for g in groups) - min(len(g) for g in groups) <= 1


def test_every_window_holds_the_sources_in_their_proportion():
    spans = [Span(s, 0, i, i + 1, 1) for s, n in enumerate((600, 300, 100)) for i in range(n)]
    for group in windows(spans, "key", 100):
        shares = [sum(s.source == source for s in group) for source in range(3)]
        for share, expected in zip(shares, (60, 30, 10), strict=True):
            # 4 standard deviations of drawing 100 of 1000 without putting back
            p = expected / 100
            assert abs(share - expected) < 4 * math.sqrt(100 * p * (1 - p) * 0.9)
