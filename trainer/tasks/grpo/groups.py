"""Advantages of the answers to a prompt: pure functions in numpy (float64), without ranks or models."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Row = npt.NDArray[np.float64]
FLOOR = 1e-4
"""Added to a standard deviation before it divides, as in trl."""


def advantages(groups: Sequence[Row], scale: str, *, leave_one_out: bool) -> list[Row]:
    """Returns the advantage of each answer of each group, from the scores of its K answers (Shao et al. 2024, 4.1.2):

    A_i = (r_i - mean(r)) / (std(r) + 1e-4)

    ``scale``: std is that of the ``group``, that of all scores (``batch``), or there is no division (``none``). With
    ``leave_one_out`` the mean is that of the other answers (Ahmadian et al. 2024, arXiv:2402.14740, equation 8). A
    standard deviation has K - 1 in its denominator."""
    spread = float(np.concatenate(groups).std(ddof=1))
    found = []
    for scores in groups:
        centred = scores - scores.mean()
        if leave_one_out:
            centred *= len(scores) / (len(scores) - 1)
        if scale != "none":
            centred /= (float(scores.std(ddof=1)) if scale == "group" else spread) + FLOOR
        found.append(centred)
    return found


def overlong_penalty(tokens: int, longest: int, buffer: int) -> float:
    """Returns the penalty of a text, from 0 to 1: how far it reaches into the last ``buffer`` of ``longest`` tokens (Yu
    et al. 2025, arXiv:2503.14476, equation 13)."""
    return max(0, tokens - (longest - buffer)) / buffer if buffer else 0.0
