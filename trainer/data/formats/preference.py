"""preference: a prompt with a chosen and a rejected answer (`trainer.data.formats.answers`), each with targets on the
answer.

Tasks that judge answers one by one get two samples of a row, the chosen answer and the rejected one. Task ppo reads the
prompts, and the chosen answer as the one that rewards may compare with.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from trainer.data.formats.answers import AnswerEncoder
from trainer.data.sample import Row, RowError, Sample
from trainer.data.spec import FrozenSource, PreparationSpec
from trainer.recipe.tasks import TASKS

SIDES = ("chosen", "rejected")


class Preference:
    def __init__(self, source: FrozenSource, tokenizer: Any, spec: PreparationSpec) -> None:
        self.answers, self.task = AnswerEncoder(source, tokenizer, spec), TASKS[spec.task]

    def encode(self, rows: Sequence[Row]) -> list[Sample | list[Sample] | RowError]:
        if self.task.generates:
            return list(self.answers.encode(rows, SIDES[0]))
        sides = [self.answers.encode(rows, side) for side in SIDES]
        made = _unpaired if self.task.unpairs else self._paired
        return [made(row, *answers) for row, *answers in zip(rows, *sides, strict=True)]

    def _paired(self, row: Row, chosen: Sample | RowError, rejected: Sample | RowError) -> Sample | RowError:
        margin = self.answers.columns.optional(row, "margin")
        for part in (chosen, rejected, margin):
            if isinstance(part, RowError):
                return part
        if margin is not None and (isinstance(margin, bool) or not isinstance(margin, int | float)):
            return RowError(f"the margin has to be a number, not {type(margin).__name__} ({margin!r:.40})")
        if margin is not None and not math.isfinite(margin):
            return RowError(f"the margin has to be a finite number, not {margin}")
        assert isinstance(chosen, Sample)
        assert isinstance(rejected, Sample)
        warnings = tuple(dict.fromkeys((*chosen.warnings, *rejected.warnings)))
        return replace(chosen, rejected=rejected, warnings=warnings, margin=None if margin is None else float(margin))


def _unpaired(row: Row, chosen: Sample | RowError, rejected: Sample | RowError) -> list[Sample] | RowError:
    if isinstance(chosen, RowError):
        return chosen
    if isinstance(rejected, RowError):
        return rejected
    # The turn keeps the two samples of a row apart in their ids: #1 is the chosen answer, #2 the rejected one.
    return [replace(chosen, desirable=True, turn=1), replace(rejected, desirable=False, turn=2)]
