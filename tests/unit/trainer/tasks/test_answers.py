"""How generated answers are scored: figures worked out by hand, and SQuAD's rules."""

from __future__ import annotations

from decimal import Decimal

import pytest

from trainer.artifacts.chat import first_line, one_line
from trainer.tasks.answers import (
    exact_match,
    f1,
    last_number,
    means,
    normalised,
    reference_number,
    same_number,
    solution,
    solved,
)


def test_normalisation():
    assert normalised("  The  Cat's\tpaw, (a) theatre! ") == "cats paw theatre"
    assert normalised("an A The") == ""


@pytest.mark.parametrize(
    ("prediction", "answers", "exact", "words"),
    [
        ("the Beatles.", ["Beatles"], 1, 1),
        ("in Paris, France", ["Paris", "London"], 0, 2 * 1 / 4),
        ("New York City", ["Big Apple", "New York", "york"], 0, 2 * 2 / 5),
        ("one one two", ["one two two"], 0, 2 * 2 / 6),
        ("", ["nothing"], 0, 0),
        ("the", ["a"], 1, 1),
        ("NY", ["New York", "ny"], 1, 1),
    ],
)
def test_exact_match_and_f1_take_the_best_of_all_answers(prediction, answers, exact, words):
    assert exact_match(prediction, answers) == exact
    assert f1(prediction, answers) == pytest.approx(words)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("He has 3 + 4 = 7 apples.", "7"),
        ("so it is $1,234.50 a year", "1234.5"),
        ("10-3=7\n#### 7", "7"),
        ("down to -5 degrees", "-5"),
        ("it takes 8 - 3", "3"),
        ("9-4", "4"),
        ("half is .5", "0.5"),
        ("version 1.2.", "1.2"),
        ("none", None),
    ],
)
def test_the_last_number(text, number):
    assert last_number(text) == (None if number is None else Decimal(number))


def test_the_number_that_a_solution_ends_with():
    assert reference_number("16 - 3 = 13\n#### 1,300") == 1300
    assert reference_number("It is 13.") is None
    assert same_number("I think 13.0", ["a\n#### 13"]) == 1
    assert same_number("first 13, then 14", ["a\n#### 13"]) == 0
    assert same_number("no idea", ["a\n#### 13"]) == 0


def test_where_an_answer_ends():
    assert first_line("\n  Paris \nQuestion: and") == "Paris"
    assert first_line(" \n") == ""
    assert not one_line("\n Paris")
    assert one_line("\n Paris\n")
    assert solution("a\nb = 7\n\nQuestion: what") == "a\nb = 7"
    assert solved("7\nQuestion:")


def test_means_are_over_the_examples_that_have_a_score():
    assert means([{"f1": 1.0}, {"f1": 0.5}, {"accuracy": 1.0}]) == {"f1": 0.75, "accuracy": 1.0}
