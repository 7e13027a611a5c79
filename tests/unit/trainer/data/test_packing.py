"""Packs and plans: pure, over many shapes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.trainer.data.data_support import made
from trainer.data.order.pack_order import PlanSettings, copies, epoch_order, plan_in_order, plan_window
from trainer.data.order.packing import ExactFit, best_fit, fill_packs
from trainer.data.seeding import permutation, uniforms

CAPACITY = 64
LENGTHS = st.lists(st.integers(1, CAPACITY), max_size=120)


@pytest.mark.parametrize("pack", [fill_packs, best_fit, lambda a, c: ExactFit(a, c).packs()])
@given(lengths=LENGTHS)
@settings(max_examples=80)
def test_each_sample_is_in_one_pack_and_no_pack_overflows(pack, lengths):
    array = np.array(lengths, dtype=np.int32)
    packs = pack(array, CAPACITY)
    assert sorted(i for p in packs for i in p) == list(range(len(lengths)))
    assert all(0 < sum(lengths[i] for i in p) <= CAPACITY for p in packs)


@given(lengths=LENGTHS, seed=st.integers(0, 99))
@settings(max_examples=80)
def test_the_number_of_packs_depends_on_the_lengths_alone(lengths, seed):
    array = np.array(lengths, dtype=np.int32)
    shuffled = array[permutation(len(array), "test", seed)]
    assert len(fill_packs(array, CAPACITY)) == len(fill_packs(shuffled, CAPACITY))


def test_lengths_without_small_change_still_fill_the_packs():
    lengths = np.random.default_rng(0).integers(200, 1024, 4000).astype(np.int32)
    fill = lengths.sum() / 2048 / len(fill_packs(lengths, 2048))
    assert fill > 0.995
    assert fill > lengths.sum() / 2048 / len(best_fit(lengths, 2048)) + 0.01


def test_two_samples_of_half_a_pack_are_a_pair_and_one_is_not():
    assert ExactFit(np.array([4, 4, 4]), 8).packs() == [[0, 1], [2]]


def test_a_length_beyond_the_pack_is_refused():
    with pytest.raises(AssertionError):
        fill_packs(np.array([65]), CAPACITY)


def plan_of(seed=17, epoch=0, weights=(1.0, 1.0), window=0):
    prepared = made([[(i % 2, 2 + i * 7 % 11) for i in range(60)]], sequence_length=24)
    shape = PlanSettings(prepared.spec.order_key, seed, 24, True, weights)
    return prepared.index(0), plan_window(prepared.index(0), shape, epoch, window)


def test_a_plan_is_a_function_of_seed_epoch_and_window():
    _, plan = plan_of()
    assert plan.digest() == plan_of()[1].digest()
    others = [plan_of(seed=18), plan_of(epoch=1), plan_of(window=1)]
    assert len({plan.digest(), *(p.digest() for _, p in others)}) == 4


def test_the_plan_of_these_lengths_never_changes():
    """A change here would give every run another order: raise the format version if it is meant."""
    assert plan_of()[1].digest()[:16] == "d43d6043850b10e4"


def test_a_plan_knows_its_packs_tokens_and_targets():
    index, plan = plan_of()
    for p in range(len(plan)):
        assert plan.tokens[p] == index.length[plan.pack(p)].sum() <= 24
        assert plan.targets[p] == index.targets[plan.pack(p)].sum()
    assert sorted(plan.samples) == list(range(60))


def test_the_company_that_a_sample_keeps_differs_between_epochs():
    packs = [{frozenset(plan.pack(p)) for p in range(len(plan))} for _, plan in (plan_of(epoch=0), plan_of(epoch=1))]
    assert len(packs[0] & packs[1]) < len(packs[0]) / 2


def test_whole_weights_repeat_and_fractions_draw_anew_each_epoch():
    prepared = made([[(i % 2, 3) for i in range(2000)]], sequence_length=24)
    index = prepared.index(0)
    drawn = []
    for epoch in (0, 1):
        times = copies(index, PlanSettings("k", 17, 24, True, (2.0, 1.25)), epoch)
        assert set(times[index.source == 0]) == {2}
        assert set(times[index.source == 1]) == {1, 2}
        assert abs(times[index.source == 1].mean() - 1.25) < 0.05
        drawn.append(times)
    assert not np.array_equal(*drawn)


def test_evaluation_takes_each_sample_once_without_packing():
    prepared = made([[(0, 3), (0, 5), (0, 4)]], sequence_length=24, packing=False)
    plan = plan_in_order(prepared.index(0), 24, packing=False)
    assert [plan.pack(p) for p in range(len(plan))] == [[0], [1], [2]]


def test_permutations_and_numbers_are_the_same_on_every_machine():
    assert permutation(8, "a", 1).tolist() == [0, 2, 5, 1, 6, 7, 4, 3]
    numbers = uniforms((np.array([1, 2], np.int32), np.array([3, 3])), "a", 1)
    assert numbers.tolist() == pytest.approx([0.8462955933283006, 0.26710191289951335])


def test_windows_are_permuted_anew_each_epoch():
    orders = [epoch_order("k", 17, epoch, 20) for epoch in (0, 1)]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(20))
    assert orders[0] != orders[1]
