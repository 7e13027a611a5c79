"""A rank that stops in the middle of training is named and ended, so that its group can be started again."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.multiprocessing as mp

from tests.support.nights import few_by_day
from tests.support.ranks import run_ranks
from tests.support.training import run_of, small_recipe, train_rank, write_pairs
from trainer.data import Batch
from trainer.recipe import Recipe
from trainer.run import layout
from trainer.run.jsonl import read_rows
from trainer.tasks.sft import SFT
from trainer.worker import attempt, hang_detector

LIMIT_S = 90


def _hanging_rank(rank: int, recipe: Recipe, how: str, stops: int) -> None:
    """Rank ``stops`` stops at its 9th micro-batch: the whole process (SIGSTOP), or its training thread only. One more
    is computed before the first step."""
    attempt.LEAST_PATIENCE_S, hang_detector.STALE_S, hang_detector.BEAT_S = 3.0, 2.0, 0.2
    if rank == stops:
        plain, calls = SFT.loss_sum, iter(range(1000))

        def stuck(self: SFT, *args: Any) -> Any:
            if next(calls) == 9:
                if how == "stopped":
                    os.kill(os.getpid(), signal.SIGSTOP)
                else:
                    threading.Event().wait(120)
            return plain(self, *args)

        SFT.loss_sum = stuck  # type: ignore[method-assign]
    train_rank(rank, [recipe])


@pytest.mark.parametrize(
    ("how", "rank"),
    [
        ("stopped", 1),
        ("stuck", 0),
        *(pytest.param(*c, marks=pytest.mark.night) for c in (("stuck", 1), ("stopped", 0))),
    ],
)
def test_the_rank_is_named_with_its_phase_and_ended(how: str, rank: int, tiny_model: Path, tmp_path: Path) -> None:
    """Also rank 0, whose process keeps the store through which the others see each other."""
    write_pairs(tmp_path / "data" / "a.jsonl", 60)
    sizes = {"training.global_batch": 4, "training.micro_batch": 1}
    recipe = small_recipe(f"hang-{how}-{rank}", tiny_model, tmp_path, **sizes)
    ended = _end(run_ranks(_hanging_rank, 2, recipe, how, rank, join=False))
    assert (ended.error_index, ended.signal_name) == (rank, "SIGKILL")
    hang = next(e for e in read_rows(run_of(recipe), layout.EVENTS) if e["event"] == "hang")
    (culprit,) = hang["ranks"]
    assert culprit["rank"] == rank
    assert f"rank {rank} on" in hang["cause"]
    if how == "stuck":  # a stopped process's newest pulse is from shortly before
        assert culprit["step"] == 5
        assert culprit["phase"].startswith("forward of micro-batch")
        assert "stuck" in culprit["stack"]


def _evaluating_rank(rank: int, recipe: Recipe, how: str) -> None:
    """The evaluation takes three times as long as nobody may move. On rank 1 a batch is slow, its data is, or it gets
    stuck."""
    attempt.LEAST_PATIENCE_S, hang_detector.STALE_S, hang_detector.BEAT_S = 4.0, 2.0, 0.2
    plain, calls, read = SFT.eval_loss, iter(range(1000)), attempt.eval_batches
    pauses = {"slow batches": 1.0, "slow storage": 0.0, "stuck": 0.1}

    def evaluated(self: SFT, *args: Any) -> Any:
        threading.Event().wait(120 if how == "stuck" and rank == 1 and next(calls) == 3 else pauses[how])
        return plain(self, *args)

    def batches(*args: Any, **options: Any) -> Iterator[Batch]:
        for number, batch in enumerate(read(*args, **options)):
            threading.Event().wait(12 if how == "slow storage" and rank == 1 and number == 3 else 0)
            yield batch

    SFT.eval_loss, attempt.eval_batches = evaluated, batches  # type: ignore[method-assign]
    train_rank(rank, [recipe])


@pytest.mark.parametrize("how", few_by_day(["stuck", "slow batches", "slow storage"], 1))
def test_an_evaluation_may_take_long_as_long_as_it_goes_on(how: str, tiny_model: Path, tmp_path: Path) -> None:
    write_pairs(tmp_path / "data" / "a.jsonl", 30)
    write_pairs(tmp_path / "held-out" / "b.jsonl", 24)
    held_out = [{"path": f"{tmp_path}/held-out/*.jsonl", "format": "completion"}]
    sizes = {"training": {"steps": 6, "eval_every": 3, "global_batch": 4, "micro_batch": 1}}
    recipe = small_recipe(f"evaluation-{how[:4]}", tiny_model, tmp_path, **{"data.eval": held_out}, **sizes)
    context = run_ranks(_evaluating_rank, 2, recipe, how, join=False)
    if how == "stuck":
        ended = _end(context)
        assert (ended.error_index, ended.signal_name) == (1, "SIGKILL")
        hang = next(e for e in read_rows(run_of(recipe), layout.EVENTS) if e["event"] == "hang")
        assert [(r["rank"], r["step"], r["phase"]) for r in hang["ranks"]] == [(1, 3, "evaluation")]
        return
    deadline = time.monotonic() + LIMIT_S
    while not context.join(timeout=1):
        assert time.monotonic() < deadline
    assert not [e for e in read_rows(run_of(recipe), layout.EVENTS) if e["event"] == "hang"]
    assert len([r for r in read_rows(run_of(recipe), layout.METRICS) if "eval_loss" in r]) == 2


def _end(context: Any) -> mp.ProcessExitedException:
    """How the group ended: the first process that did."""
    deadline = time.monotonic() + LIMIT_S
    try:
        while not context.join(timeout=1):
            assert time.monotonic() < deadline, f"nobody was ended within {LIMIT_S} s"
    except mp.ProcessExitedException as ended:
        return ended
    finally:
        for process in context.processes:
            process.kill()
    raise AssertionError("the group ended as if nothing had happened")
