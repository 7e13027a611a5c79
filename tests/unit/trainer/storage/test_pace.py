"""How often ranks write, and how often all of them together."""

from __future__ import annotations

import pytest

from trainer.storage.pace import WRITES_S, write_interval_s


@pytest.mark.parametrize(
    ("rank", "ranks", "interval_s"), [(0, 1, 3.0), (7, 8, 3.0), (30, 64, 6.4), (1023, 1024, 102.4)]
)
def test_few_ranks_write_soon_and_many_take_turns(rank: int, ranks: int, interval_s: float) -> None:
    assert write_interval_s(rank, ranks, 3.0) == pytest.approx(interval_s)


def test_rank_0_is_always_followed_closely() -> None:
    assert write_interval_s(0, 100_000, 3.0) == 3.0


@pytest.mark.parametrize("ranks", [8, 64, 1024, 100_000])
def test_all_ranks_together_make_a_bounded_number_of_writes(ranks: int) -> None:
    assert sum(1 / write_interval_s(rank, ranks, 3.0) for rank in range(ranks)) <= WRITES_S + 1 / 3
