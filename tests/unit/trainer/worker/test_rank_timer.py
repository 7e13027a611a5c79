"""A rank's own seconds in a step."""

from __future__ import annotations

import torch

from trainer.worker.rank_timer import MOST_RANKS, RankTimer, of_this_rank, rank_record


def test_only_what_lies_between_start_and_stop_counts() -> None:
    times = iter([1.0, 3.0, 10.0, 10.5])
    own = RankTimer(torch.device("cpu"), clock=lambda: next(times))
    own.start()
    own.start()  # the step's beginning holds
    own.stop()
    own.stop()
    own.start()
    own.stop()
    assert own.take() == 2.5
    assert own.take() == 0.0


def test_the_sum_over_the_ranks_has_everyones() -> None:
    vectors = [of_this_rank(1.0 + rank, rank, 3) for rank in range(3)]
    assert [sum(column) for column in zip(*vectors, strict=True)] == [1.0, 2.0, 3.0]


def test_the_record_names_the_slowest_and_stays_small() -> None:
    told = rank_record([1.0, 3.0, 2.0], [5.0, 6.0, 9.0])
    assert told.pop("memory_bytes") == 9
    assert told.pop("memory_rank") == 2
    assert told == {"slowest_rank": 1, "slowest_rank_s": 3.0, "mean_rank_s": 2.0, "rank_s": [1.0, 3.0, 2.0]}
    assert "rank_s" not in rank_record([1.0] * (MOST_RANKS + 1), [1.0] * (MOST_RANKS + 1))
