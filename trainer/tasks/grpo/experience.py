"""What GRPO makes of the rollouts of a step: the advantages of each group.

Legend: T tokens of the texts of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trainer.recipe.sections.rollouts.grpo import GRPOSection
from trainer.tasks.grpo.groups import advantages
from trainer.tasks.rollouts.rollout import (
    Experience,
    Floats,
    Ints,
    PromptCompletionBatch,
    Rollout,
    RolloutMicroBatch,
    flat,
)
from trainer.tasks.rollouts.writer import by_prompt, is_alike


@dataclass
class GRPOMicroBatch(RolloutMicroBatch):
    """The inputs of the losses, each float32 [T], row by row along ``texts.targets``. ``lengths``: of the texts.
    ``logps``, ``reference``, ``sampled``: see `Rollout`; of no tokens where they are not needed."""

    lengths: list[int]
    advantages: Floats
    logps: Floats
    reference: Floats
    sampled: Floats


class GRPOExperience(Experience):
    def __init__(self, rollouts: Sequence[Rollout], section: GRPOSection) -> None:
        super().__init__(rollouts)
        self._section = section
        self._groups = list(by_prompt(self.rollouts).values())
        kl_coef = section.kl_coef if section.row.kl_in_reward else 0.0
        self._kl = [r.kl for r in self.rollouts] if kl_coef else []
        scores = [np.array([r.score - (kl_coef * r.kl if kl_coef else 0.0) for r in group]) for group in self._groups]
        found = advantages(scores, section.scale, leave_one_out=section.row.leave_one_out)
        self.advantages = np.concatenate(found)
        self._alike = np.concatenate([np.full(len(group), is_alike(group)) for group in self._groups])

    def metrics(self) -> dict[str, float]:
        spreads = [float(np.std([r.score for r in group])) for group in self._groups]
        of_groups = {"group_reward_std": float(np.mean(spreads)), "groups_alike": float(self._alike.mean())}
        if self._kl:
            of_groups["kl"] = sum(self._kl) / sum(r.length for r in self.rollouts)
        return {**super().metrics(), **of_groups, "left_out": 1.0 - len(self.learned()) / len(self.rollouts)}

    def learned(self) -> Ints:
        section = self._section
        out = np.array([section.overlong_filter and not r.ended for r in self.rollouts])
        if section.dynamic_sampling:
            out |= self._alike
        (kept,) = (~out).nonzero()
        return kept

    def moving(self, part: Ints) -> Ints:
        section = self._section
        if section.entropy_coef == 0.0 and (section.kl_coef == 0.0 or section.row.kl_in_reward):
            part = part[self.advantages[part] != 0.0]
        return super().moving(part)

    def units(self, part: Ints) -> int:
        mean = self._section.row.mean
        if mean == "tokens":
            return sum(self.rollouts[n].length for n in part)
        return len(part) * (self._section.longest if mean == "length" else 1)

    def micro_batch(self, part: Ints, index: int) -> GRPOMicroBatch:
        some = [self.rollouts[n] for n in part]
        lengths = [r.length for r in some]
        return GRPOMicroBatch(
            PromptCompletionBatch.of_rollouts(some, index),
            lengths,
            flat([np.full(length, self.advantages[n]) for n, length in zip(part, lengths, strict=True)]),
            flat([r.logps for r in some]),
            flat([r.reference for r in some]),
            flat([r.sampled for r in some]),
        )
