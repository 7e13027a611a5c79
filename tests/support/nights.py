"""Cases of a test of which a few run by day, and all by night."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def few_by_day(cases: Iterable[Any], by_day: int) -> list[Any]:
    """Marks all cases but the first ``by_day`` for the night. A tuple is the arguments of a case."""
    return [
        case if at < by_day else pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.night)
        for at, case in enumerate(cases)
    ]
