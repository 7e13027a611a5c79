"""Environments: the calculator, and objects in processes of their own that fail in every way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from trainer.errors import InputError, RewardFailed
from trainer.tasks.environments.calculator import Calculator, answer_of
from trainer.tasks.environments.environments import Environments

HERE = "tests.support.environments"


@contextmanager
def environments(name: str, processes: int = 1, timeout_s: float = 20.0) -> Iterator[Environments]:
    made = Environments(f"{HERE}:{name}", processes, timeout_s, "grpo.environment")
    try:
        yield made
    finally:
        made.close()


@pytest.mark.parametrize(
    ("term", "value"),
    [
        ("3*4", "12"),
        (" (1 + 2) * -3 ", "-9"),
        ("7/2", "3.5"),
        ("7//2 + 7 % 4", "6"),
        ("0.1+0.2", "0.3"),
        *((term, "error") for term in ("1/0", "2**9", "9e14*9", "__import__('os')", "len('a')", "True", "'a'*9", "1+")),
        ("9" * 300, "error"),
        ("(" * 99 + ")" * 99, "error"),
        ("", "error"),
    ],
)
def test_the_calculator_computes_terms_of_numbers_only(term: str, value: str) -> None:
    assert answer_of(term) == value


def test_the_calculator_answers_a_term_and_rates_the_last_number() -> None:
    one = Calculator()
    one.reset("3 times 4?", "It is 3*4 = 12. #### 12")
    assert one.step("Let me see: <<3*4") == ("12", 0.0)
    assert one.step("so <<12>>") == ("12", 0.0)
    assert one.step("#### 12") == (None, 1.0)
    one.reset("3 times 4?", "#### 13")
    assert one.step("#### 12, and not <<3*4>> more") == (None, 0.0)


def test_objects_stay_in_their_process_and_keep_their_state() -> None:
    with environments("Where", processes=2) as made:
        made.reset([(prompt, "") for prompt in "abcde"])
        first = made.step(dict.fromkeys(range(5), "x"))
        second = made.step({4: "x", 1: "x"})
        pids = [first[n].answer.split()[0] for n in range(5) if first[n].answer]
        assert (len(set(pids)), pids[0], pids[1]) == (2, pids[4], pids[3])
        assert [second[n].answer for n in (1, 4)] == [f"{pids[1]} b 2", f"{pids[4]} e 2"]
        made.reset([("f", "")])
        assert made.step({0: "x"})[0].answer == f"{pids[0]} f 1"
        with pytest.raises(RewardFailed, match="its objects with it"):
            made.step({2: "x"})


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("Broken", r"Broken\.step raised KeyError: 'tool' \(line \d+ of .*environments\.py\)"),
        ("Hanging", r"Hanging\.step did not return within 1 s for 1 texts; raise environment_timeout_s"),
        ("Dying", r"Dying\.step was called for 1 texts: its process ended with exit code 3"),
        ("OneNumber", r"OneNumber\.step returned 1\.0; it has to return an answer, which is a text or None, and a n"),
        ("NotFinite", r"NotFinite\.step returned the reward nan; it has to be finite"),
        ("Unmade", r"Unmade\.reset raised OSError: no licence"),
    ],
)
def test_what_fails_names_the_environment(name: str, said: str) -> None:
    def played() -> None:
        made.reset([("p", "r")])
        made.step({0: "x"})

    with environments(name, timeout_s=1.0) as made:
        with pytest.raises(RewardFailed, match=said):
            played()
        with pytest.raises(RewardFailed, match="has ended between two calls"):
            played()


@pytest.mark.parametrize(
    ("name", "said"),
    [("Missing", "has no function 'Missing'"), ("NoSteps", "grpo.environment '.*:NoSteps' has no method step")],
)
def test_what_is_no_environment_is_refused_at_the_start(name: str, said: str) -> None:
    with pytest.raises(InputError, match=said), environments(name):
        pass
