"""The shipped environment ``Calculator``: it computes the terms that a text puts between ``<<`` and ``>>``."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable

from trainer.tasks.environments.interface import Step
from trainer.tasks.rewards.shipped import final_number

TERM = re.compile(r"<<([^<>]*)(?:>>)?\s*\Z")
LONGEST = 200
"""Characters of a term."""
LARGEST = 1e15
"""Largest number: numbers stay exact, and a product of large ones takes no time."""
BINARY: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
UNARY: dict[type[ast.unaryop], Callable[[float], float]] = {ast.UAdd: operator.pos, ast.USub: operator.neg}


class Calculator:
    """Answers a turn that ends in ``<<3*4>>`` by ``12``, and one whose term it cannot compute by ``error``. Any other
    turn ends the text: its reward is 1 if its final number equals that of the reference (`final_number`), else 0.

    For rows that are no chats, ``stop: [">>"]`` ends a turn."""

    def __init__(self) -> None:
        self._wanted: float | None = None

    def reset(self, prompt: str, reference: str) -> None:
        self._wanted = final_number(reference)

    def step(self, text: str) -> Step:
        if term := TERM.search(text):
            return Step(answer_of(term[1]))
        return Step(None, float(self._wanted is not None and final_number(text) == self._wanted))


def answer_of(term: str) -> str:
    """Returns the value of a term, with up to 12 digits, or ``error``."""
    try:
        return f"{value_of(term):.12g}"
    except (ValueError, SyntaxError, ArithmeticError, RecursionError, MemoryError):
        return "error"


def value_of(term: str) -> float:
    """Returns the value of a term of numbers, ``+ - * / // %`` and brackets. Raises ValueError for any other one."""
    if len(term) > LONGEST:
        raise ValueError(f"a term of {len(term)} characters; at most {LONGEST} are computed")
    return _value(ast.parse(term.strip(), mode="eval").body)


def _value(node: ast.expr) -> float:
    match node:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            pass
        case ast.BinOp(left=left, op=op, right=right) if type(op) in BINARY:
            value = BINARY[type(op)](_value(left), _value(right))
        case ast.UnaryOp(op=sign, operand=operand) if type(sign) in UNARY:
            value = UNARY[type(sign)](_value(operand))
        case _:
            raise ValueError(f"{type(node).__name__} is not computed")
    if not abs(value) <= LARGEST:
        raise ValueError(f"the value is larger than {LARGEST:g}")
    return value
