"""Of the many failures of one attempt, the one that began it."""

from __future__ import annotations

import pickle

import pytest

from launcher.attempt import placed_death
from launcher.raytrain.failures import first_cause
from trainer.errors import (
    Fenced,
    InputError,
    MusterError,
    NonFiniteLoss,
    StorageError,
    WorkerFailed,
    note_where,
)
from trainer.run.events import FailureEvent
from trainer.run.failure import SHOWN_LINES, Failure, WorkerError

GLOO = RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.2]:31337")


def failure(error: BaseException, when: float, rank: int) -> WorkerError:
    return WorkerError.of(error, when, rank, f"host{rank}", "Traceback (most recent call last):\n  …\nthe last line")


class Wrapped(Exception):
    """As Ray Train hands over what a training function raised."""

    def __init__(self, inner: BaseException) -> None:
        super().__init__(str(inner))
        self._base_exc = inner


class Unhealthy(Exception):
    """As Ray Train hands over a worker that did not answer."""

    def __init__(self, inner: BaseException) -> None:
        super().__init__(str(inner))
        self.health_check_failure = inner


def test_a_broken_collective_is_not_the_cause_although_it_came_first() -> None:
    cause = first_cause({0: failure(GLOO, 1.0, 0), 1: failure(ValueError("bad shape"), 2.0, 1)})
    assert cause.message == "rank 1 on host1: ValueError: bad shape"
    assert (cause.rank, cause.host, cause.fatal) == (1, "host1", False)


def test_of_equals_the_earliest() -> None:
    cause = first_cause({0: failure(ValueError("b"), 2.0, 0), 1: failure(ValueError("a"), 1.0, 1)})
    assert cause.rank == 1
    assert first_cause({0: failure(GLOO, 2.0, 0), 1: failure(GLOO, 1.0, 1)}).rank == 1


def test_a_dead_worker_comes_before_what_the_others_raised() -> None:
    died = RuntimeError("The actor died unexpectedly before finishing this task.\n\tclass_name: Worker\n\tpid: 7")
    cause = first_cause({0: failure(GLOO, 1.0, 0), 1: Unhealthy(died)})
    assert cause.message == "rank 1 died: RuntimeError: The actor died unexpectedly before finishing this task."
    assert not cause.fatal


def test_the_line_that_tells_something_is_taken() -> None:
    cause = first_cause({2: RuntimeError("Task failed.\nclass_name: X\nThe worker was killed: out of memory.\nMore.")})
    assert cause.message == "rank 2 died: RuntimeError: The worker was killed: out of memory."
    assert first_cause({2: RuntimeError("")}).message == "rank 2 died: RuntimeError: no message"


@pytest.mark.parametrize("error", [InputError("a row"), NonFiniteLoss("step 3"), Fenced("attempt 2")])
def test_what_would_end_the_same_again_is_fatal_and_comes_before_a_death(error: MusterError) -> None:
    cause = first_cause({0: RuntimeError("the worker died"), 1: Wrapped(failure(error, 5.0, 1))})
    assert cause.fatal
    assert cause.message == f"rank 1 on host1: {error}"


def test_what_may_pass_is_tried_again() -> None:
    assert not first_cause({0: failure(StorageError("503"), 1.0, 0)}).fatal


def test_the_exit_code_follows_the_cause() -> None:
    usage = first_cause({0: failure(InputError("no such column"), 1.0, 0)}).as_error()
    assert (usage.exit_code, str(usage)) == (2, "rank 0 on host0: no such column")
    other = first_cause({0: failure(NonFiniteLoss("inf"), 1.0, 0)}).as_error()
    assert isinstance(other, WorkerFailed)
    assert other.exit_code == 1


def test_muster_errors_come_without_a_trace_and_others_end_with_its_end() -> None:
    assert "Traceback" not in str(first_cause({0: failure(StorageError("503"), 1.0, 0)}).as_error())
    text = str(first_cause({0: failure(KeyError("x"), 1.0, 0)}).as_error())
    assert text.startswith("rank 0 on host0: KeyError: 'x'\n")
    assert text.endswith("the last line")


def test_a_long_trace_is_cut_at_its_beginning() -> None:
    error = Failure("m", trace="\n".join(f"line {i}" for i in range(100))).as_error()
    assert error.cause == "m"
    assert str(error).splitlines() == ["m", *(f"line {i}" for i in range(100 - SHOWN_LINES, 100))]


def test_a_failure_survives_pickling() -> None:
    there = failure(InputError("x"), 1.5, 3)
    back = pickle.loads(pickle.dumps(there))
    assert vars(back) == vars(there)
    assert str(back) == str(there)


def test_a_killed_rank_and_a_broken_collective_may_have_failed_of_another() -> None:
    assert Failure("rank 1 died: ActorDiedError", died=True).by_another
    assert Failure("rank 0 on a: RuntimeError: [gloo] Connection closed by peer").by_another
    assert not Failure("rank 0 on a: KeyError: 'x'").by_another


def test_a_death_is_told_with_its_host_and_where_others_saw_it_last() -> None:
    died = RuntimeError("The actor died unexpectedly before finishing this task.")
    cause = first_cause({0: failure(GLOO, 1.0, 0), 1: Unhealthy(died)})
    line = "RuntimeError: The actor died unexpectedly before finishing this task."
    placed = placed_death(cause, "b", "step 15, backward of micro-batch 1", 14)
    assert placed.message == f"rank 1 on b died (last seen at step 15, backward of micro-batch 1): {line}"
    assert (placed.host, placed.event("", retried=False).phase) == ("b", "backward of micro-batch 1")
    alone = placed_death(cause, "b", "", 14)
    assert alone.message == f"rank 1 on b died (after step 14): {line}"
    assert alone.event("", retried=False).phase is None
    assert placed_death(cause, None, "", 0).message == f"rank 1 died: {line}"


def test_an_own_error_says_where_it_came_up_once() -> None:
    """A storage's error names a call, and not what it was for."""
    away = StorageError("could not write s3://b/x: 9 attempts failed, the last one with connection reset")
    note_where(away, "step 14, checkpoint")
    cause = failure(away, 1.0, 0).cause
    assert cause.message == f"rank 0 on host0: step 14, checkpoint: {away}"
    assert cause.event("", retried=False).phase == "checkpoint"
    assert not cause.by_another, "it is the storage's connection that was reset"
    lost = NonFiniteLoss("step 3: the loss is not finite")
    note_where(lost, "step 3, exchange of the loss")
    told = failure(lost, 1.0, 0).cause
    assert told.message == "rank 0 on host0: step 3: the loss is not finite"
    assert told.event("", retried=False).phase == "exchange of the loss"


def test_what_is_kept_of_a_failure() -> None:
    error = ValueError("bad shape")
    note_where(error, "loading the model")
    event = failure(error, 1.0, 2).cause.event("  next: x", retried=True, driver=4, step=7)
    assert event == FailureEvent(
        cause="rank 2 on host2: loading the model: ValueError: bad shape",
        rank=2,
        host="host2",
        phase="loading the model",
        trace="Traceback (most recent call last):\n  …\nthe last line",
        advice="  next: x",
        step=7,
        retried=True,
        driver=4,
    )
