"""Runs that take turns: one works at a time, calls that go together are answered together, and ends concern whom they
should."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from trainer.worker.together.turns import BACKWARD, EVALUATION, TRAINING, Left, ModelPass, Turns


class Model:
    """Answers each call with the numbers of all that were answered with it."""

    def __init__(self) -> None:
        self.passes: list[list[Any]] = []

    def answer(self, calls: Sequence[ModelPass]) -> None:
        asked = [call.asked for call in calls]
        self.passes.append(asked)
        for call in calls:
            call.answer = asked


class Apart(Exception):
    pass


def started(model: Model) -> Turns[Any]:
    return Turns(model.answer, lambda error: isinstance(error, Apart))


def steps(turns: Turns[Any], name: str, count: int) -> Callable[[], str]:
    def run() -> str:
        for _ in range(count):
            turns.wait_for(ModelPass(TRAINING, None, name))
            turns.wait_for(ModelPass(BACKWARD, None, name))
        return name

    return run


def test_runs_share_each_pass_until_they_end() -> None:
    model = Model()
    turns = started(model)
    ends = turns.run([steps(turns, "a", 2), steps(turns, "b", 1), steps(turns, "c", 2)], lambda: None)
    assert [end.result() for end in ends] == ["a", "b", "c"]
    assert model.passes == [["a", "b", "c"]] * 2 + [["a", "c"]] * 2


def test_an_evaluation_comes_before_the_next_step_of_the_others() -> None:
    model = Model()
    turns = started(model)

    def evaluates() -> str:
        steps(turns, "e", 1)()
        for _ in range(3):
            turns.wait_for(ModelPass(EVALUATION, "e", "eval"))
        return steps(turns, "e", 1)()

    turns.run([steps(turns, "a", 2), evaluates], lambda: None)
    assert model.passes == [["a", "e"]] * 2 + [["eval"]] * 3 + [["a", "e"]] * 2


def test_calls_of_another_kind_are_answered_apart() -> None:
    model = Model()
    turns = started(model)
    runs = [lambda kind=kind: turns.wait_for(ModelPass(TRAINING, kind, kind)) for kind in ("x", "y", "x")]
    ends = turns.run(runs, lambda: None)
    assert [end.result() for end in ends] == [["x", "x"], ["y"], ["x", "x"]]


def test_calls_of_another_kind_get_their_turns() -> None:
    """The run with the lowest number does not keep the model until it has ended."""
    model = Model()
    turns = started(model)

    def run(kind: str) -> Callable[[], None]:
        def work() -> None:
            for _ in range(3):
                turns.wait_for(ModelPass(TRAINING, kind, kind))
                turns.wait_for(ModelPass(BACKWARD, None, kind))

        return work

    turns.run([run("x"), run("y")], lambda: None)
    assert model.passes == [["x"], ["x"], ["y"], ["y"]] * 3


def test_only_one_run_works_at_a_time() -> None:
    model, working, seen = Model(), threading.Semaphore(1), list[str]()
    turns = started(model)

    def run(name: str) -> Callable[[], None]:
        def work() -> None:
            for _ in range(20):
                assert working.acquire(blocking=False)
                seen.append(name)
                working.release()
                turns.wait_for(ModelPass(TRAINING, None, name))

        return work

    turns.run([run("a"), run("b")], lambda: None)
    assert seen == ["a", "b"] * 20, "the order of the runs is that of all ranks"


def test_a_run_that_fails_apart_leaves_the_others() -> None:
    model = Model()
    turns = started(model)

    def fails() -> str:
        turns.wait_for(ModelPass(TRAINING, None, "f"))
        raise Apart

    ends = turns.run([fails, steps(turns, "b", 2)], lambda: None)
    assert isinstance(ends[0].exception(), Apart)
    assert ends[1].result() == "b"


@pytest.mark.parametrize("place", ["run", "model"])
def test_any_other_failure_ends_all_and_is_raised(place: str) -> None:
    model, ended = Model(), list[BaseException]()
    turns = started(model)

    def waits() -> None:
        try:
            steps(turns, "w", 5)()
        except BaseException as error:
            ended.append(error)
            raise

    def fails() -> None:
        turns.wait_for(ModelPass(TRAINING, None, "f"))
        if place == "run":
            raise ZeroDivisionError
        turns.wait_for(ModelPass(BACKWARD, None, 1 / 0))

    with pytest.raises(ZeroDivisionError):
        turns.run([waits, fails], lambda: None)
    assert [type(error) for error in ended] == [Left], "it could put its records away"
    assert str(ended[0]) == ("" if place == "run" else "division by zero"), "and knows why"


def test_a_signal_in_the_starting_thread_ends_all_runs() -> None:
    ended = list[str]()

    def answer(calls: Sequence[ModelPass]) -> None:
        raise KeyboardInterrupt

    turns: Turns[Any] = Turns(answer, lambda error: False)

    def run(name: str) -> Callable[[], None]:
        def work() -> None:
            try:
                turns.wait_for(ModelPass(TRAINING, None, name))
            finally:
                ended.append(name)

        return work

    with pytest.raises(KeyboardInterrupt):
        turns.run([run("a"), run("b")], lambda: None)
    assert ended == ["a", "b"]


def test_outside_of_runs_nobody_is_waited_for() -> None:
    assert started(Model()).wait_for(ModelPass(TRAINING, None, "alone")) == ["alone"]


def test_each_thread_is_prepared() -> None:
    names: list[str] = []
    turns = started(Model())
    turns.run([steps(turns, "a", 1), steps(turns, "b", 1)], lambda: names.append(threading.current_thread().name))
    assert names == ["run-0", "run-1"]
